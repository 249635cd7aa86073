"""The committing node (the paper's CN): carries a commit through its phases at the owners.

MRMW: 1. every owner, in the order of node ids so that two commits cannot hold each other up for ever, locks the pages
and logs; any refusal undoes it. 2. all owners at once make copies and change the home pages. 3. they drop their logs
and unlock. With a single owner there is nothing to vote on, and it is one message.

MRSW: the pages are the writer's alone since he acquired them at the master, so each owner does all at once.

What this node intends is on its own media too, before anybody else knows of it.
"""

from __future__ import annotations

import secrets
import time
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from guest_agents.hotpot.errors import HotpotError, InDoubt, NodeLost, Retry, TooLarge
from guest_agents.hotpot.log import Log, State
from guest_agents.hotpot.messages import MAX_MESSAGE, PORT, Links, Message, pack
from guest_agents.hotpot.owner import Change, encode
from guest_agents.hotpot.records import Record

_HEADER_MOST = 48
"""Bytes of a page, or of a range, in a message's header."""
_REDO_SECONDS = 30.0
_REDO_EVERY = 0.005
Groups = dict[int, tuple[Message, bytes]]
"""By owner, in order: what it is asked, and the bytes."""


class Outcome(NamedTuple):
    """A commit that took place."""

    versions: dict[int, int]
    """New version of each page that was written."""
    copies: int
    """Of the page that has fewest."""


def new_xid() -> int:
    """A number for a transaction, of which there is no second."""
    return secrets.randbits(63) | 1


class Coordinator:
    """Commits of this node. Thread-safe."""

    def __init__(self, links: Links, intents: Log) -> None:
        self._links = links
        self._intents = intents

    def commit(self, record: Record, xid: int, changes: Iterable[Change], replicas: int) -> Outcome:
        """Returns when the changes are durable in `replicas` places and are what others read.

        Retry, TooFewNodes, TooLarge, NodeLost: nothing of it took place. InDoubt: some may have, and not all.
        """
        groups = _by_owner(record, xid, changes, replicas)
        if len(groups) == 1:
            return self._single(*next(iter(groups.items())))
        if record.mode == "mrsw":
            return self._at_once(xid, groups)
        return self._three_phases(xid, groups)

    def _single(self, owner: int, request: tuple[Message, bytes]) -> Outcome:
        try:
            return _outcome([self._links.call(owner, "commit_now", *request)])
        except NodeLost as failure:
            raise InDoubt(failure.message) from None

    def _at_once(self, xid: int, groups: Groups) -> Outcome:
        bodies = [pack(header, payload) for header, payload in groups.values()]
        intent = self._intents.append(xid, State.COMMITTED, b"".join(bodies))
        done: list[Message] = []
        waiting, deadline = groups, time.monotonic() + _REDO_SECONDS
        while True:
            calls = ((owner, "commit_now", *request) for owner, request in waiting.items())
            replies = self._links.call_all(calls, PORT)
            failures = {owner: r for owner, r in zip(waiting, replies, strict=True) if isinstance(r, HotpotError)}
            done += [reply for reply in replies if not isinstance(reply, HotpotError)]
            if not failures:
                self._intents.drop(intent)
                return _outcome(done)
            lasting = [failure for failure in failures.values() if not isinstance(failure, Retry)]
            if not done and not any(isinstance(failure, NodeLost | InDoubt) for failure in lasting):
                self._intents.drop(intent)
                raise next(iter(failures.values()))
            if lasting or time.monotonic() > deadline:
                raise InDoubt("; ".join(failure.message for failure in failures.values()))  # the intent stays
            # What an owner could not do just now (its log was full), others have done: it must, too.
            waiting = {owner: groups[owner] for owner in failures}
            time.sleep(_REDO_EVERY)

    def _three_phases(self, xid: int, groups: Groups) -> Outcome:
        intent = self._intents.append(xid, State.PREPARED, pack({"owners": list(groups)}))
        asked: list[int] = []
        try:
            for owner, request in groups.items():
                asked.append(owner)
                self._links.call(owner, "prepare", *request)
        except HotpotError:
            self._release(xid, asked)
            self._intents.drop(intent)
            raise
        self._intents.set_state(intent, State.COMMITTED)
        replies = self._links.call_all(((owner, "commit", {"xid": xid}, b"") for owner in groups), PORT)
        failures = [reply for reply in replies if isinstance(reply, HotpotError)]
        if failures:
            raise InDoubt("; ".join(failure.message for failure in failures))  # the intent stays, for a recovery
        self._release(xid, asked)
        self._intents.drop(intent)
        return _outcome([reply for reply in replies if not isinstance(reply, HotpotError)])

    def _release(self, xid: int, owners: list[int]) -> None:
        self._links.call_all(((owner, "release", {"xid": xid}, b"") for owner in owners), PORT)


def _by_owner(record: Record, xid: int, changes: Iterable[Change], replicas: int) -> Groups:
    by_owner: dict[int, list[Change]] = defaultdict(list)
    for change in changes:
        by_owner[record.owner(change.page)].append(change)
    groups = {}
    for owner in sorted(by_owner):
        pages, payload = encode(by_owner[owner])
        if len(payload) + sum(_HEADER_MOST * (1 + len(change.pieces)) for change in by_owner[owner]) > MAX_MESSAGE:
            raise TooLarge(f"{len(payload)} bytes for one owner, at most {MAX_MESSAGE} with their ranges go at once")
        groups[owner] = ({"dataset": record.id, "xid": xid, "pages": pages, "replicas": replicas}, payload)
    return groups


def _outcome(replies: list[Message]) -> Outcome:
    versions = {page: version for reply in replies for page, version in reply["versions"]}
    return Outcome(versions, min(reply["copies"] for reply in replies))
