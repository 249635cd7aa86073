"""The committing node (the paper's CN): carries a commit through its phases at the owners.

MRMW: 1. every owner, in the order of parts so that two commits cannot hold each other up for ever, locks the pages and
logs; any refusal undoes it. 2. all owners at once make copies and change the home pages. 3. they drop their logs and
unlock. With a single part there is nothing to vote on, and it is one message.

MRSW: the pages are the writer's alone since he acquired them at the master, so each owner does all at once, this node
last; a second message tells them that all have done it.

What this node intends is on its own media too, with all bytes, before anybody else knows of it. A commit that was
decided goes on until every owner has carried it out, also after a crash of this node: an owner that comes back finds it
in its log, and one that has come in the place of a lost one is told all of it again.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from guest_agents.hotpot.atlas import Atlas
from guest_agents.hotpot.changes import Change, encode
from guest_agents.hotpot.errors import (
    HotpotError,
    InDoubt,
    Isolated,
    NodeLost,
    NoSuchDataset,
    NoSuchTransaction,
    NotOwner,
    Retry,
    TooFewNodes,
    TooLarge,
)
from guest_agents.hotpot.home import Origin
from guest_agents.hotpot.lease import Lease
from guest_agents.hotpot.log import Kept, Log, State
from guest_agents.hotpot.messages import MAX_MESSAGE, PORT, Call, Handler, Message, pack, unpack
from guest_agents.hotpot.records import Record

_HEADER_MOST = 48
"""Bytes of a page, or of a range, in a message's header."""
_PAUSE = 0.005
Groups = dict[int, tuple[Message, bytes]]
"""By part, in order: what its owner is asked, and the bytes."""
_FOR_A_WHILE = (Retry, NodeLost, NotOwner, Isolated, InDoubt)
"""Failures after which it may go on."""


class Outcome(NamedTuple):
    """A commit that took place."""

    versions: dict[int, int]
    """New version of each page that was written."""
    copies: int
    """Of the page that has fewest."""


@dataclass
class Attempt:
    """A commit that is under way."""

    xid: int
    record: Record
    """As it was when the commit began."""
    groups: Groups
    intent: int | None = None
    decided: bool | None = None
    """Whether it is committed; None: not known yet."""
    asked: set[int] = field(default_factory=set)
    """Parts whose owners may know of it."""
    tried: set[int] = field(default_factory=set)
    """Parts whose owners may have done theirs (MRSW)."""
    done: dict[int, Message] = field(default_factory=dict)
    """What parts have said that have carried it out."""
    moved: set[int] = field(default_factory=set)
    """Parts of which the new homes have to be told all of it."""
    released: set[int] = field(default_factory=set)
    """Parts that have dropped their logs."""
    late: bool = False
    """The program that wanted it has been told that it is in doubt, or has gone with an earlier life."""
    prepared: bool = False
    """The owners have it in their logs (MRMW)."""


def new_xid() -> int:
    """A number for a transaction, of which there is no second."""
    return secrets.randbits(63) | 1


class Coordinator:
    """Commits of this node. Thread-safe.

    media -- the number of this node's media
    ended -- told of the end of a commit that went on without anybody: until then its pages are nobody else's (MRSW)
    """

    def __init__(
        self, lease: Lease, atlas: Atlas, intents: Log, media: str, ended: Callable[[Record, int], None]
    ) -> None:
        self._ended = ended
        self._lease = lease
        self._links = lease.links
        self._atlas = atlas
        self._intents = intents
        self._origin = Origin(self._links.node.node_id, media)
        self._active: dict[int, Attempt] = {}
        self._late: dict[int, Attempt] = {}
        self._lock = threading.Lock()

    def handlers(self) -> dict[str, Handler]:
        """What owners may ask, on LEAF."""
        return {"outcome": self._outcome_asked, "claims": self._claims}

    def commit(self, record: Record, xid: int, changes: Iterable[Change], replicas: int) -> Outcome:
        """Returns when the changes are durable in `replicas` places and are what others read.

        Retry, TooFewNodes, TooLarge, NodeLost, Isolated: nothing of it took place. InDoubt: it will, or will not.
        """
        record = self._atlas.latest(record)
        attempt = Attempt(xid, record, self._by_part(record, xid, changes, replicas))
        with self._lock:
            self._active[xid] = attempt
        try:
            if len(attempt.groups) == 1:
                return self._single(attempt)
            if record.mode == "mrsw":
                return self._at_once(attempt)
            return self._three_phases(attempt)
        except NotOwner as failure:
            raise Retry(failure.message) from None
        finally:
            with self._lock:
                if xid not in self._late:
                    self._active.pop(xid, None)

    # A single part

    def _single(self, attempt: Attempt) -> Outcome:
        try:
            return self._alone(attempt)
        except InDoubt:
            if attempt.record.mode == "mrsw":
                # Its owner may still do it: until that is known nobody else may write these pages. He would be refused
                # when he has written others, whose new home (a copy) could not take it back.
                attempt.asked, attempt.tried = set(attempt.groups), set(attempt.groups)
                self._leave(attempt)
            raise

    def _alone(self, attempt: Attempt) -> Outcome:
        [(part, (header, payload))] = attempt.groups.items()
        deadline = time.monotonic() + self._lease.timing.patience
        again: Message = {}
        while True:
            try:
                reply = self._links.call(self._where(attempt, part), "commit_now", {**header, **again}, payload)
                return _outcome([reply])
            except (NodeLost, InDoubt) as failure:
                again = {"again": True}
                if time.monotonic() > deadline:
                    raise InDoubt(failure.message) from None
            except NotOwner as failure:
                moved = self._moved(attempt, part)
                if again and time.monotonic() > deadline:
                    raise InDoubt(failure.message) from None
                if not again and not moved:
                    raise
            except HotpotError as failure:
                if not again:
                    raise
                if not isinstance(failure, Retry | Isolated) or time.monotonic() > deadline:
                    raise InDoubt(failure.message) from None
            time.sleep(_PAUSE)
            self._look_again(attempt)

    def _moved(self, attempt: Attempt, part: int) -> bool:
        """Whether a part has another home than this node believed."""
        before = self._where(attempt, part)
        self._look_again(attempt)
        return self._where(attempt, part) != before

    # MRSW

    def _at_once(self, attempt: Attempt) -> Outcome:
        attempt.intent = self._intents.append(attempt.xid, State.NOW, _pack(attempt))
        deadline = time.monotonic() + self._lease.timing.patience
        doubtful = False
        while True:
            failures = self._write(attempt)
            if not failures:
                attempt.decided = True
                self._release(attempt)
                return _outcome(list(attempt.done.values()))
            doubtful = doubtful or any(isinstance(failure, NodeLost | InDoubt) for failure in failures.values())
            # An owner that has done its part, or may have, can be replaced by a copy of it, which cannot be undone.
            passing = (*_FOR_A_WHILE, TooFewNodes) if doubtful or attempt.done else _FOR_A_WHILE
            lasting = [failure for failure in failures.values() if not isinstance(failure, passing)]
            first = next(iter(failures.values()))
            if lasting or (not attempt.done and not doubtful):
                self._give_up(attempt)
                if doubtful:
                    raise InDoubt(first.message)
                raise lasting[0] if lasting else first
            if time.monotonic() > deadline:
                self._leave(attempt)
                raise InDoubt("; ".join(failure.message for failure in failures.values()))
            # What an owner could not do just now (its log was full), others have done: it must, too.
            time.sleep(_PAUSE)
            self._look_again(attempt)

    def _write(self, attempt: Attempt) -> dict[int, HotpotError]:
        """Every owner does its part, if it has not; what went wrong, by part."""
        attempt.asked |= attempt.groups.keys()
        waves: tuple[dict[int, Call], dict[int, Call]] = {}, {}
        for part, (header, payload) in attempt.groups.items():
            if part not in attempt.done:
                node = self._where(attempt, part)
                mine = node == self._links.node.node_id
                more: Message = {"again": True} if attempt.late and part in attempt.tried else {}
                waves[mine][part] = node, "commit_now", {**header, **more}, payload
        # What this node owns comes last: if it is lost as both owner and committing node, the others have all done
        # their parts when there can be copies of its own, and it is committed, or there are none, and it is undone.
        for wave in waves:
            attempt.tried |= wave.keys()
            if failures := self._collect(attempt, wave):
                return failures
        return {}

    def _collect(self, attempt: Attempt, calls: dict[int, Call]) -> dict[int, HotpotError]:
        failures = {}
        for part, reply in zip(calls, self._links.call_all(calls.values(), PORT), strict=True):
            if isinstance(reply, HotpotError):
                failures[part] = reply
            else:
                attempt.done[part] = reply
        return failures

    # MRMW

    def _three_phases(self, attempt: Attempt) -> Outcome:
        attempt.intent = self._intents.append(attempt.xid, State.PREPARED, _pack(attempt))
        try:
            for part, (header, payload) in attempt.groups.items():
                attempt.asked.add(part)
                self._links.call(self._where(attempt, part), "prepare", header, payload)
        except HotpotError:
            self._give_up(attempt)
            raise
        self._intents.set_state(attempt.intent, State.COMMITTED)
        attempt.decided = True
        attempt.prepared = True
        deadline = time.monotonic() + self._lease.timing.patience
        while failures := self._complete(attempt):
            if self._given_up(attempt):
                self._give_up(attempt)
                raise InDoubt("this node was taken for dead, and the owners have settled it among themselves")
            if time.monotonic() > deadline:
                self._leave(attempt)
                raise InDoubt("; ".join(failure.message for failure in failures.values()))
            time.sleep(_PAUSE)
            self._look_again(attempt)
        self._release(attempt)
        return _outcome(list(attempt.done.values()))

    def _given_up(self, attempt: Attempt) -> bool:
        return attempt.decided is False

    def _complete(self, attempt: Attempt) -> dict[int, HotpotError]:
        """Owners carry out what they have prepared; those in the place of lost ones all of it. What went wrong."""
        record, me = self._atlas.latest(attempt.record), self._links.node.node_id
        first: dict[int, Call] = {}
        calls: dict[int, Call] = {}
        last: dict[int, Call] = {}
        for part, (header, payload) in attempt.groups.items():
            node = record.homes[part]
            if part in attempt.done:
                continue
            if part in attempt.moved:
                last[part] = (node, "commit_now", {**header, "again": True, "moved": True}, payload)
            else:
                named = {"xid": attempt.xid, "dataset": record.id, "part": part, "late": attempt.late}
                (first if node == me else calls)[part] = (node, "commit", named, b"")
        # What this node owns comes first: if it is lost now, with decision and pages, others must not have seen the
        # decision before there are copies of these pages. New homes come last: they cannot tell whether the others
        # have agreed to undo it.
        failures: dict[int, HotpotError] = {}
        for wave in (first, calls, last):
            failures |= {} if failures else self._collect(attempt, wave)
        for part, failure in failures.items():
            if isinstance(failure, NoSuchTransaction):
                if part not in attempt.moved and record.epoch(part) != attempt.record.epoch(part):
                    attempt.moved.add(part)  # its new home does not have the log of the lost one
                else:  # this node was taken for dead: the owners have agreed, and all to the same
                    attempt.decided = False
        return failures

    # The end, and what has to wait for it

    def _give_up(self, attempt: Attempt) -> None:
        """Undo it where it was begun; owners that cannot be reached will ask, and hear that it is not committed."""
        attempt.decided = False
        if attempt.record.mode == "mrsw" and attempt.intent is not None:
            self._intents.set_state(attempt.intent, State.UNDO)
        self._release(attempt)

    def _leave(self, attempt: Attempt) -> None:
        attempt.late = True
        with self._lock:
            self._late[attempt.xid] = attempt

    def _release(self, attempt: Attempt) -> bool:
        """Phase 3; whether all owners have heard it. MRMW: those that have not will ask."""
        abort = attempt.decided is False
        parts = sorted(attempt.asked - attempt.released)
        calls: list[Call] = [
            (self._where(attempt, part), "release",
             {"xid": attempt.xid, "dataset": attempt.record.id, "part": part, "abort": abort}, b"")
            for part in parts
        ]  # fmt: skip
        replies = self._links.call_all(calls, PORT)
        attempt.released |= {p for p, reply in zip(parts, replies, strict=True) if not isinstance(reply, HotpotError)}
        whole = attempt.released >= attempt.asked
        if not whole and attempt.record.mode == "mrsw" and abort:
            self._leave(attempt)
            return False
        if attempt.intent is not None:
            self._intents.drop(attempt.intent)
            attempt.intent = None
        with self._lock:
            late = self._late.pop(attempt.xid, None)
            self._active.pop(attempt.xid, None)
        if late is not None:
            self._ended(attempt.record, attempt.xid)
        return True

    def resume(self) -> None:
        """Go on with what nobody waits for any more."""
        with self._lock:
            late = list(self._late.values())
        for attempt in late:
            try:
                self._atlas.refresh(attempt.record.id)
            except NoSuchDataset:
                attempt.asked.clear()
                self._give_up(attempt)
                continue
            except HotpotError:
                pass
            with suppress(HotpotError):
                if self._given_up(attempt):
                    self._release(attempt)
                    continue
                if not attempt.prepared:
                    attempt.done.clear()  # owners may have undone it since, if they could not reach this node
                failures = self._complete(attempt) if attempt.prepared else self._write(attempt)
                if self._given_up(attempt):
                    self._give_up(attempt)
                elif not failures:
                    attempt.decided = True
                    self._release(attempt)
                elif not attempt.prepared and any(
                    not isinstance(failure, (*_FOR_A_WHILE, TooFewNodes)) for failure in failures.values()
                ):
                    self._give_up(attempt)

    def goes_on(self, xid: int) -> bool:
        """Whether a commit goes on without anybody."""
        with self._lock:
            return xid in self._late

    @property
    def unfinished(self) -> int:
        """Commits that go on without anybody."""
        return len(self._late)

    def reload(self, found: Kept) -> None:
        """An intent of an earlier life: MRMW: redo it if it was decided; MRSW: redo it, unless it was given up."""
        header, payload = unpack(found.body)
        groups: Groups = {}
        at = 0
        for fields, length in header["groups"]:
            groups[fields["part"]] = (fields, bytes(payload[at : at + length]))
            at += length
        record = Record.from_json(header["record"])
        attempt = Attempt(found.xid, record, groups, found.place, asked=set(groups), tried=set(groups), late=True)
        if found.state in (State.PREPARED, State.UNDO):
            attempt.decided = False
        attempt.prepared = found.state == State.COMMITTED
        if attempt.prepared:
            attempt.decided = True
        with self._lock:
            self._active[found.xid] = self._late[found.xid] = attempt

    # What owners and the dispatcher ask

    def _outcome_asked(self, _source: int, header: Message, _payload: memoryview) -> Message:
        """What became of transactions: active (wait), commit, abort, unknown (it is over), or lost (these media are not
        those on which it was intended)."""
        if header["media"] != self._origin.media:
            return {"outcome": "lost"}
        with self._lock:
            attempt = self._active.get(header["xid"])
        if attempt is None:
            return {"outcome": "unknown"}
        if attempt.decided is None:
            return {"outcome": "active"}
        return {"outcome": "commit" if attempt.decided else "abort"}

    def _claims(self, _source: int, header: Message, _payload: memoryview) -> Message:
        """Commits under way here that are still going to change pages of a part."""
        with self._lock:
            attempts = list(self._active.values())
        claims = [
            {"xid": attempt.xid, "origin": list(self._origin), "parts": sorted(attempt.groups),
             "pages": [page for page, _expected, _pieces in attempt.groups[header["part"]][0]["pages"]]}
            for attempt in attempts
            if attempt.record.id == header["dataset"] and header["part"] in attempt.groups
            and attempt.decided is not False and (attempt.decided or attempt.record.mode == "mrsw")
        ]  # fmt: skip
        return {"claims": claims}

    def _where(self, attempt: Attempt, part: int) -> int:
        return self._atlas.latest(attempt.record).homes[part]

    def _look_again(self, attempt: Attempt) -> None:
        with suppress(HotpotError):
            self._atlas.refresh(attempt.record.id)

    def _by_part(self, record: Record, xid: int, changes: Iterable[Change], replicas: int) -> Groups:
        by_part: dict[int, list[Change]] = defaultdict(list)
        for change in changes:
            by_part[record.part(change.page)].append(change)
        groups = {}
        everywhere = [[part, [change.page for change in by_part[part]]] for part in sorted(by_part)]
        for part in sorted(by_part):
            pages, payload = encode(by_part[part])
            if len(payload) + sum(_HEADER_MOST * (1 + len(change.pieces)) for change in by_part[part]) > MAX_MESSAGE:
                raise TooLarge(f"{len(payload)} bytes for one owner, at most {MAX_MESSAGE} with ranges go at once")
            groups[part] = ({"dataset": record.id, "part": part, "xid": xid, "pages": pages, "replicas": replicas,
                             "origin": list(self._origin), "parts": sorted(by_part),
                             "everywhere": everywhere}, payload)  # fmt: skip
        return groups


def _pack(attempt: Attempt) -> bytes:
    groups = list(attempt.groups.values())
    header = {"record": attempt.record.to_json(), "groups": [[header, len(payload)] for header, payload in groups]}
    return pack(header, b"".join(payload for _, payload in groups))


def _outcome(replies: list[Message]) -> Outcome:
    versions = {page: version for reply in replies for page, version in reply["versions"]}
    return Outcome(versions, min(reply["copies"] for reply in replies))
