"""The owner of pages (the paper's ON): keeps their homes, orders their commits, and has copies made.

A home page lies twice: in registered memory (an LMR of LITE), which others read by RDMA, and on media. A commit writes
a redo record first, then the copies at data nodes, then the home, then tells nodes that have the page cached.
Source: section 4 of the Hotpot paper (MRMW's three phases, MRSW's two).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from guest_agents.hotpot.blocks import Copy
from guest_agents.hotpot.busy import Busy, let_go_of
from guest_agents.hotpot.changes import Change, decode, encode
from guest_agents.hotpot.errors import (
    BadArgument,
    HotpotError,
    InDoubt,
    NoSuchTransaction,
    NotOwner,
    Retry,
)
from guest_agents.hotpot.home import Entry, Home, Key, Origin, open_home
from guest_agents.hotpot.lease import Lease
from guest_agents.hotpot.log import Log, State
from guest_agents.hotpot.media import Folder
from guest_agents.hotpot.messages import Handler, Message, pack, unpack
from guest_agents.hotpot.records import Record
from guest_agents.hotpot.replicas import Replicas

log = logging.getLogger("rackless.hotpot")
_REFUSED = 10_000
"""Transactions that were given up, of which messages may still come."""
_ROOM = (1 << 63) + 3
"""Whose pages are of which a copy goes; no transaction has this number."""
EntryKey = tuple[int, int, int]
"""Transaction, dataset, part."""


class Owner:
    """All homes of this node. Thread-safe."""

    def __init__(self, lease: Lease, folder: Folder, log: Log) -> None:
        self.lease = lease
        self._links = lease.links
        self._folder = folder
        self.log = log
        self._homes: dict[Key, Home] = {}
        self._entries: dict[EntryKey, Entry] = {}
        self._refused: dict[EntryKey, None] = {}
        self._lock = threading.Lock()
        self.counts: dict[str, int] = defaultdict(int)
        self.replicas = Replicas(lease, self.counts)

    def handlers(self) -> dict[str, Handler]:
        """What others may ask, on PORT."""
        return {"prepare": self._prepare, "commit": self._commit, "release": self._release,
                "commit_now": self._commit_now, "rejoin": self._rejoin, "make_room": self._make_room}  # fmt: skip

    def leaf_handlers(self) -> dict[str, Handler]:
        """What others may ask, on LEAF."""
        return {"caching": self._caching, "owner_claims": self._claims}

    # Homes

    def home(self, dataset: int, part: int) -> Home:
        """A part of a dataset. NotOwner."""
        with self._lock:
            found = self._homes.get((dataset, part))
        if found is None:
            raise NotOwner(f"node {self._links.node.node_id} is not the home of part {part} of dataset {dataset}")
        return found

    def homes(self) -> list[Home]:
        """All of them."""
        with self._lock:
            return list(self._homes.values())

    def open(self, record: Record, part: int, *, new: bool = False) -> Home:
        """Make a home, or (unless it shall be `new`) take over the one that is on media. NoSpace."""
        if new:
            self._folder.remove(f"home-{record.id}-{part}")
        home = open_home(self._links.node, self._folder, record, part)
        with self._lock:
            self._homes[home.key] = home
        return home

    def drop(self, home: Home) -> None:
        """It is not this node's any more: forget it, and all that was going on in it; who is at a commit notices."""
        with self._lock:
            if self._homes.get(home.key) is home:
                del self._homes[home.key]
            gone = [key for key, entry in self._entries.items() if entry.home is home]
            entries = [self._entries.pop(key) for key in gone]
        home.ready = False
        for entry in entries:
            entry.over = True
            entry.last = partial(self.log.drop, entry.place)
            if entry.busy.acquire(blocking=False):
                let_go_of(entry)
        home.remove()

    def freeze(self, home: Home) -> None:
        """No commit begins in it any more; it is leaving."""
        with self._lock:
            assert home.leave is not None
            home.leave.frozen = time.monotonic()

    def busy(self, home: Home) -> bool:
        """Whether commits to it have not ended, or some may come."""
        with self._lock:
            return bool(home.locks or home.claims
                        or any(entry.home is home for entry in self._entries.values()))  # fmt: skip

    # What has been logged and not ended

    def entries(self) -> list[Entry]:
        """All of them."""
        with self._lock:
            return list(self._entries.values())

    def entry(self, xid: int, home: Home) -> Entry | None:
        """One of them."""
        with self._lock:
            return self._entries.get((xid, *home.key))

    def refuse(self, xid: int, home: Home) -> bool:
        """Promise that a transaction which is not known here will never be; False: it is known now."""
        with self._lock:
            if (xid, *home.key) in self._entries:
                return False
            self._refused[xid, *home.key] = None
            while len(self._refused) > _REFUSED:
                del self._refused[next(iter(self._refused))]
            return True

    def refused(self, home: Home) -> list[int]:
        """Transactions of which that was promised."""
        with self._lock:
            return [xid for xid, *key in self._refused if tuple(key) == home.key]

    def reload(self, home: Home, place: int, xid: int, state: State, body: bytes) -> None:
        """An entry of an earlier life: its pages are locked again."""
        header, payload = unpack(body)
        size = header["size"]
        changes = decode(header["pages"], payload[:size])
        old = decode(header["old"], payload[size:])
        entry = Entry(home, xid, state, changes, old, place, header["replicas"], header["degree"],
                      Origin(*header["origin"]), _everywhere(header), time.monotonic())  # fmt: skip
        if state != State.ENDED:
            home.locks |= dict.fromkeys(entry.pages, xid)
        with self._lock:
            self._entries[xid, *home.key] = entry

    def _claims(self, _source: int, header: Message, _payload: memoryview) -> Message:
        """Commits of which other parts are here, and of which it is not known here whether they have come to a part."""
        return {"claims": [
            {"xid": entry.xid, "origin": list(entry.origin), "parts": entry.parts,
             "pages": entry.everywhere[header["part"]]}
            for entry in self.entries()
            if entry.home.record.id == header["dataset"] and entry.home.part != header["part"]
            and header["part"] in entry.everywhere and entry.state != State.ENDED
        ]}  # fmt: skip

    # Phase 1

    def _prepare(self, _source: int, header: Message, payload: memoryview) -> Message:
        """Lock the pages and log what is to become of them. Retry, TooFewNodes, TooLarge, Corrupt: as if not asked."""
        self._begin(header, payload, State.PREPARED)
        return {}

    # Phase 2

    def _commit(self, _source: int, header: Message, _payload: memoryview) -> Message:
        """It is decided. Returns when the pages have their copies and are what others read: their versions, copies."""
        entry = self._known(header)
        if entry.frozen and entry.state == State.PREPARED:
            raise Retry("the owners settle it themselves")
        return self.decide(entry, 0 if header.get("late") else entry.origin.node)

    def decide(self, entry: Entry, writer: int = 0) -> Message:
        """Commit what is prepared; `writer` knows what he has written. Retry, InDoubt, Isolated: it will be done."""
        with Busy(entry):
            if entry.state == State.ENDED:
                return {"versions": [[change.page, change.expected + 1] for change in entry.changes if change.pieces],
                        "copies": entry.replicas}  # fmt: skip
            if entry.state == State.PREPARED:
                self.set_state(entry, State.COMMITTED)
            return self._carry_out(entry, writer)

    # Phase 3

    def _release(self, _source: int, header: Message, _payload: memoryview) -> Message:
        """Drop the record and unlock. Before the commit this is the abort; with `abort` also after a part of it (MRSW).
        Those not known are released already."""
        with self._lock:
            home = self._homes.get((header["dataset"], header["part"]))
        if home is None:
            return {}
        if header.get("abort"):
            self.refuse(header["xid"], home)
        entry = self.entry(header["xid"], home)
        if entry is not None:
            if entry.frozen:
                raise Retry("the owners settle it themselves")
            self.end(entry, abort=bool(header.get("abort")))
        return {}

    def end(self, entry: Entry, *, abort: bool, keep: bool = False) -> None:
        """What is left of an entry when it is known whether it is committed. Retry: it has not been carried out.

        keep -- other owners may still ask
        """
        with Busy(entry):
            if entry.state == State.PREPARED:
                self._finish(entry)
            elif entry.state == State.ENDED:
                return
            elif abort and entry.state in (State.DONE, State.UNDO):
                self._carry_out(entry)
                if entry.state == State.DONE:
                    self.set_state(entry, State.UNDO)
                self._redo(entry, 0, entry.old, 0)
                self._finish(entry)
            elif entry.outcome is None:
                raise Retry("it has not been carried out yet")
            elif entry.state == State.DONE or keep:
                self.set_state(entry, State.ENDED)
                self._unlock(entry.home, entry)
            else:
                self._finish(entry)

    # All at once: there is no other owner whose vote counts, or the pages are the writer's alone (MRSW)

    def _commit_now(self, source: int, header: Message, payload: memoryview) -> Message:
        """Log, copy, write home, unlock. What `prepare` raises; InDoubt: locks and log stay."""
        home, xid = self.home(header["dataset"], header["part"]), header["xid"]
        alone = len(header["parts"]) == 1 or header.get("moved", False)
        entry = self.entry(xid, home)
        if entry is None:
            if header.get("again") or not alone:
                changes = decode(header["pages"], payload)
                done = self._done_already(home, xid, changes)
                if done is not None:
                    return done
                if header.get("again"):
                    self._must_be_untouched(home, xid, changes, moved=header.get("moved", False))
            entry = self._begin(header, payload, State.NOW if alone else State.DONE)
            with Busy(entry, mine=True):
                return self._all_at_once(entry, source if not header.get("again") else 0)
        if entry.state == State.PREPARED:
            raise BadArgument(f"transaction {xid:x} was prepared")
        with Busy(entry):
            return self._all_at_once(entry, 0)

    def _all_at_once(self, entry: Entry, writer: int) -> Message:
        outcome = self._carry_out(entry, writer)
        if entry.state == State.NOW:
            self._finish(entry)
        return outcome

    def _done_already(self, home: Home, xid: int, changes: list[Change]) -> Message | None:
        """The outcome of a commit that was carried out, if that can still be seen; it is seen as long as nobody else
        has written all of its pages."""
        copies = {change.page: home.read(change.page) for change in changes if change.pieces}
        if xid not in home.xids and not any(copy.xid == xid for copy in copies.values()):
            return None
        least = min(len(home.copies[page]) + 1 for page in copies)
        return {"versions": [[page, copy.version] for page, copy in copies.items()], "copies": least}

    def _must_be_untouched(self, home: Home, xid: int, changes: list[Change], *, moved: bool) -> None:
        """NoSuchTransaction: others have changed the pages since it was sent for the first time, or it cannot be said;
        it may have been carried out before them, or given up. Where it is known that it was not, as this is a new home
        (`moved`), it may not care what others have done."""
        whatever = {-1} if moved else set()
        if any(change.expected not in {home.version(change.page)} | whatever for change in changes):
            raise NoSuchTransaction(f"it is not known what became of transaction {xid:x}")

    def finish_now(self, entry: Entry) -> None:
        """Carry out what was interrupted, and end it if nobody else has a say."""
        with Busy(entry):
            if entry.state == State.UNDO:
                self._redo(entry, 0, entry.old, 0)
                self._finish(entry)
                return
            self._carry_out(entry)
            if entry.state == State.NOW:
                self._finish(entry)

    # Inside

    def _known(self, header: Message) -> Entry:
        entry = self.entry(header["xid"], self.home(header["dataset"], header["part"]))
        if entry is None:
            raise NoSuchTransaction(f"transaction {header['xid']:x} is not prepared here")
        return entry

    def set_state(self, entry: Entry, state: State) -> None:
        """On media, too."""
        self.log.set_state(entry.place, state)
        entry.state = state

    def _begin(self, header: Message, payload: memoryview, state: State) -> Entry:
        home, xid, replicas = self.home(header["dataset"], header["part"]), header["xid"], header["replicas"]
        changes = decode(header["pages"], payload)
        for change in changes:
            if not 0 <= change.page < home.record.pages or home.record.part(change.page) != home.part:
                raise BadArgument(f"page {change.page} of {home.record.name} is not of part {home.part}")
        if not home.ready:
            raise Retry(f"the home of pages of {home.record.name} is being recovered")
        self.lease.check()
        self._lock_pages(home, xid, [change.page for change in changes])
        try:
            based, old, degree = [], [], replicas
            for change in changes:
                version = home.version(change.page)
                if change.expected not in (-1, version):
                    self.counts["owner_conflicts"] += 1
                    raise Retry("somebody committed a page since it was acquired")
                based.append(replace(change, expected=version))
                if change.pieces:
                    copy = home.read(change.page)  # whether it can be: later would be too late to refuse
                    degree = max(degree, copy.degree)
                    if state == State.DONE:
                        pieces = [(piece, copy.data[piece.offset : piece.offset + piece.length])
                                  for piece, _ in change.pieces]  # fmt: skip
                        old.append(Change(change.page, version + 1, pieces))
            self.replicas.plan(home, [change.page for change in changes if change.pieces], replicas)
            return self._logged(home, {**header, "degree": degree}, state, based, old)
        except BaseException:
            self._let_go(home, xid, [change.page for change in changes])
            raise

    def _logged(self, home: Home, header: Message, state: State, based: list[Change], old: list[Change]) -> Entry:
        xid = header["xid"]
        pages, payload = encode(based)
        before, more = encode(old)
        kept = {name: header[name] for name in ("replicas", "degree", "origin", "everywhere")}
        body = {**kept, "dataset": home.record.id, "part": home.part, "pages": pages, "old": before,
                "size": len(payload)}  # fmt: skip
        place = self.log.append(xid, state, pack(body, payload + more))
        entry = Entry(home, xid, state, based, old, place, header["replicas"], header["degree"],
                      Origin(*header["origin"]), _everywhere(header), time.monotonic())  # fmt: skip
        if state != State.PREPARED:
            entry.busy.acquire()  # for who has begun it, before anybody else sees it
        with self._lock:
            if (xid, *home.key) not in self._refused:
                self._entries[xid, *home.key] = entry
                return entry
        self.log.drop(place)
        raise NoSuchTransaction(f"transaction {xid:x} was given up")

    def _carry_out(self, entry: Entry, writer: int = 0) -> Message:
        """What is logged as committed. InDoubt, Isolated: part of it may be done; it will be tried again."""
        if entry.outcome is None:
            try:
                entry.outcome = self._redo(entry, entry.xid, entry.changes, writer)
            except HotpotError as failure:
                raise InDoubt(f"the owner of pages of {entry.home.record.name} waits: {failure.message}") from failure
            except Exception as failure:
                log.exception("a commit to %s", entry.home.record.name)
                raise InDoubt(f"the owner of pages of {entry.home.record.name} failed: {failure}") from failure
        return entry.outcome

    def _redo(self, entry: Entry, xid: int, changes: Sequence[Change], writer: int) -> Message:
        home, replicas, degree = entry.home, entry.replicas, entry.degree
        written = [change for change in changes if change.pieces]
        home.accessed[entry.origin.node] += sum(len(data) for change in written for _, data in change.pieces)
        fresh: dict[int, Copy] = {change.page: home.after(change, xid, degree) for change in written}
        copies = self.replicas.replicate(home, xid, written, fresh, replicas, degree) if fresh else replicas
        self.lease.check()
        home.write(fresh)
        self.replicas.tell(home, fresh, writer)
        self.counts["owner_commits"] += 1
        return {"versions": [[page, copy.version] for page, copy in fresh.items()], "copies": copies}

    def _finish(self, entry: Entry) -> None:
        """It is over: nothing of it is kept."""
        entry.over = True
        with self._lock:
            mine = self._entries.get((entry.xid, *entry.home.key)) is entry
            if mine:
                del self._entries[entry.xid, *entry.home.key]
            entry.home.claims.pop(entry.xid, None)
        if mine:  # else the home was dropped meanwhile
            self.log.drop(entry.place)
        self._unlock(entry.home, entry)

    def forget(self, entry: Entry) -> None:
        """Nobody will ask any more whether it was committed."""
        with Busy(entry):
            self._finish(entry)

    def _lock_pages(self, home: Home, xid: int, pages: Sequence[int]) -> None:
        with self._lock:
            if home.leave is not None and home.leave.frozen:
                raise Retry("the pages are moving to another owner")
            if any(home.locks.get(page, xid) != xid for page in pages):
                self.counts["owner_conflicts"] += 1
                raise Retry("a page is in another commit")
            home.locks |= dict.fromkeys(pages, xid)

    def _let_go(self, home: Home, xid: int, pages: Sequence[int]) -> None:
        with self._lock:
            for page in pages:
                if home.locks.get(page) == xid:
                    del home.locks[page]

    def _unlock(self, home: Home, entry: Entry) -> None:
        self._let_go(home, entry.xid, list(entry.pages))

    def disclaim(self, home: Home, xid: int) -> None:
        """A commit that was to come when this became the home does not come."""
        with self._lock:
            home.claims.pop(xid, None)
            for page in [page for page, holder in home.locks.items() if holder == xid]:
                if (xid, *home.key) not in self._entries:
                    del home.locks[page]

    def held_still(self, home: Home, pages: Sequence[int], xid: int) -> list[int]:
        """Lock those of these pages that nobody else has locked; which."""
        with self._lock:
            free = [page for page in pages if page not in home.locks]
            home.locks |= dict.fromkeys(free, xid)
            return free

    def let_go(self, home: Home, pages: Sequence[int], xid: int) -> None:
        """Unlock them again."""
        self._let_go(home, xid, pages)

    def _rejoin(self, source: int, header: Message, _payload: memoryview) -> Message:
        """A data node asks what of its copies is still good. Retry."""
        home = self.home(header["dataset"], header["part"])
        if not home.ready:
            raise Retry("the home is being recovered")
        pages = dict(header["pages"])
        with self._lock:
            if any(page in home.locks for page in pages):
                return {"again": True}
            stale = [page for page, version in pages.items() if home.version(page) != version]
            if stale:
                return {"stale": stale}
        if self.replicas.register(home, {source}, pages, cleared=True):
            return {"again": True}
        with self._lock:
            if source not in home.synced or any(page in home.locks for page in pages):
                return {"again": True}
            if any(home.version(page) != version for page, version in pages.items()):
                return {"again": True}
            for page in pages:
                home.copies[page].add(source)
        return {"stale": []}

    def _make_room(self, source: int, header: Message, _payload: memoryview) -> Message:
        """A data node has no room for copies: those go that are not needed there, or can be elsewhere. Retry,
        Isolated, NodeLost: it is not known which have gone."""
        home = self.home(header["dataset"], header["part"])
        if not home.ready or home.leave is not None:
            raise Retry("the home is being recovered, or moves")
        pages = [page for page in header["pages"] if source in home.copies[page]]
        free = self.held_still(home, pages, _ROOM)
        try:
            gone = self.replicas.withdraw(home, source, free)
        finally:
            self.let_go(home, free, _ROOM)
        self.counts["evictions_refused"] += len(header["pages"]) - len(gone)
        return {"pages": gone}

    def _caching(self, source: int, header: Message, _payload: memoryview) -> Message:
        """A node is about to cache pages of a chunk, or has closed the dataset (no chunk)."""
        home = self.home(header["dataset"], header["part"])
        if not home.ready:
            raise Retry("the home is being recovered")
        with self._lock:
            if header.get("chunk") is not None:
                home.caching[header["chunk"]].add(source)
            else:
                for nodes in home.caching.values():
                    nodes.discard(source)
        return {"memory": home.name, "epoch": home.record.epoch(home.part)}


def _everywhere(header: Message) -> dict[int, list[int]]:
    return dict(header["everywhere"])
