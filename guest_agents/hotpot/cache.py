"""The pages of a dataset that programs of this node have mapped: their states, faults, and what a commit does to them.

All programs of a node map one memory file, as they would map the same persistent memory; the file has a page only when
the page was fetched. Page states are the paper's:

    committed   clean, write-protected: the latest committed version that this node was told of
    dirty       written since; what it was before is kept (copy-on-write: `twin`), nobody else sees the stores
    redundant   not here, but a copy is on this node's media (datanode.py): a fault needs no network

Section 4.2 of the Hotpot paper. Programs' page faults come from userfault.py; every page of a program was mapped by
this file, read-only until the program's first store.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from guest_agents.hotpot import userfault
from guest_agents.hotpot.blocks import PAGE, Copy
from guest_agents.hotpot.errors import HotpotError, NotClean, Retry, StoresLost
from guest_agents.hotpot.records import Piece, Record, patched
from guest_agents.hotpot.userfault import Fault

_FETCH_SECONDS = 60.0


@dataclass
class Page:
    """A page that this node has, or is about to."""

    version: int = 0
    """Latest committed version known here."""
    seen: int = 0
    """Version on which the bytes in memory are based; older than `version` if a commit came while it was in use."""
    arriving: bool = False
    """It is being fetched."""
    twin: bytes | None = None
    """The page of version `seen`, if it was written since: it is dirty."""
    fresh: bytes | None = None
    """The page of version `version`, if that is newer than `seen`."""
    transaction: int = 0
    """Who has acquired it on this node."""
    committing: bool = False
    """Nobody may write it for a moment."""

    @property
    def dirty(self) -> bool:
        """Written since the last commit."""
        return self.twin is not None


class Frozen(NamedTuple):
    """A page that no program writes for a moment."""

    seen: int
    dirty: bool
    data: bytes


class Cache:
    """A dataset on this node. Thread-safe; no lock is held while something is fetched.

    fetch -- gets the present versions of pages from wherever they are
    """

    def __init__(self, record: Record, fetch: Callable[[Record, list[int]], list[Copy]]) -> None:
        self.record = record
        self.file = os.memfd_create(f"hotpot {record.name}", os.MFD_CLOEXEC)
        os.ftruncate(self.file, record.size)
        self.counts = {"faults": 0, "fetches": 0, "cow": 0, "updates": 0, "evicted": 0}
        self._fetch_pages = fetch
        self._pages: dict[int, Page] = {}
        self._programs: set[int] = set()
        self._lost: set[int] = set()
        """Pages that had to be dropped with stores that were not committed, which nobody has been told yet."""
        self._changed = threading.Condition()

    def close(self) -> None:
        """Nobody has it mapped any more; news of it are for nobody."""
        with self._changed:
            self._pages.clear()
            os.close(self.file)

    # Programs and their faults

    def attach(self, program: int) -> None:
        """A program's userfaultfd."""
        with self._changed:
            self._programs.add(program)

    def detach(self, program: int) -> None:
        """The program unmaps it, or has ended."""
        with self._changed:
            self._programs.discard(program)

    def answer(self, program: int, fault: Fault) -> None:
        """Let a thread that waits for a page go on, fetching the page if need be."""
        page = (fault.address - self.record.address) // PAGE
        self.counts["faults"] += 1
        with self._changed:
            state = self._pages.get(page)
            if state is None:
                state = self._pages[page] = Page(arriving=True)
            elif state.arriving or (state.committing and fault.write):
                return  # whoever is at it wakes all who wait for this page
            else:
                self._used(page)
                self._let(program, page, state, fault)
                return
        self._fetch([page])
        with self._changed:
            state = self._pages.get(page)
            if state is not None and not state.arriving and not (state.committing and fault.write):
                self._let(program, page, state, fault)

    def _let(self, program: int, page: int, state: Page, fault: Fault) -> None:
        if fault.write and not state.dirty:
            state.twin = self._bytes(page)
            self.counts["cow"] += 1
        if fault.protected:
            userfault.unprotect(program, fault.address)
        else:
            userfault.let(program, fault.address, writable=fault.write)

    # Fetching

    def ensure(self, pages: Iterable[int]) -> None:
        """Have these pages here. What fetching raises is raised."""
        missing = []
        with self._changed:
            for page in pages:
                if page not in self._pages:
                    self._pages[page] = Page(arriving=True)
                    missing.append(page)
        self._fetch(missing)
        with self._changed:
            if not self._changed.wait_for(lambda: not any(self._is_arriving(page) for page in pages), _FETCH_SECONDS):
                raise HotpotError("pages do not arrive")

    def _is_arriving(self, page: int) -> bool:
        return page in self._pages and self._pages[page].arriving

    def _fetch(self, pages: list[int]) -> None:
        """Pages that were marked as arriving; if they cannot be had they are unmarked, and who waits tries again."""
        try:
            copies = self._fetch_pages(self.record, pages)
        except BaseException:
            with self._changed:
                for page in pages:
                    del self._pages[page]
                    self._wake(page)
                self._changed.notify_all()
            raise
        with self._changed:
            for page, fetched in zip(pages, copies, strict=True):
                state, copy = self._pages[page], fetched
                if state.fresh is not None and state.version > copy.version:
                    copy = Copy(state.version, state.fresh)  # it was committed meanwhile
                os.pwrite(self.file, copy.data, page * PAGE)
                self._pages[page] = Page(copy.version, copy.version)
                self.counts["fetches"] += 1
                self._wake(page)
            self._changed.notify_all()

    # News from owners

    def updated(self, page: int, copy: Copy) -> None:
        """A page has a new version. What programs here have stored in it, or read for a transaction, stays."""
        with self._changed:
            state = self._pages.get(page)
            if state is None or copy.version <= state.version:
                return
            self.counts["updates"] += 1
            state.version = copy.version
            if state.arriving or state.dirty or state.transaction or state.committing:
                state.fresh = copy.data
            else:
                os.pwrite(self.file, copy.data, page * PAGE)
                state.seen = copy.version

    def refreshed(self, page: int, copy: Copy) -> None:
        """A page as it is at its home, after this node or the home was away. What is newer here is of a commit that did
        not survive its owner: forget it."""
        with self._changed:
            state = self._pages.get(page)
            ahead = state is not None and state.version > copy.version and not (state.arriving or state.committing)
            if state is not None and ahead:
                if state.dirty and not state.transaction:
                    self._lost.add(page)
                self._forget(page)
        if not ahead:
            self.updated(page, copy)

    # Transactions

    def acquire(self, pages: Iterable[int], transaction: int) -> None:
        """Have pages here, up to date and clean, for one transaction. Retry, NotClean: it gets none."""
        wanted = list(pages)
        self.ensure(wanted)
        with self._changed:
            new = [page for page in wanted if self._page(page).transaction != transaction]
            for page in new:
                state = self._page(page)
                if state.transaction or state.committing:
                    raise Retry("a page is in another transaction of this node")
                if state.dirty:
                    raise NotClean(f"page {page} of {self.record.name} has stores that were not committed")
            for page in new:
                self._page(page).transaction = transaction
                self._used(page)

    def release(self, pages: Iterable[int]) -> None:
        """A transaction was committed: the pages are nobody's."""
        with self._changed:
            for page in pages:
                state = self._pages.get(page)
                if state is not None:
                    state.transaction = 0
                    if not state.dirty:
                        self._settle(page, state, state.fresh)

    def give_up(self, pages: Iterable[int]) -> None:
        """Take back the stores to these pages: they are what was last committed, and nobody's."""
        with self._changed:
            for page in pages:
                state = self._pages.get(page)
                if state is None or state.arriving or state.committing:
                    continue
                self._settle(page, state, self._latest(state))
                state.transaction = 0
            self._changed.notify_all()

    def free(self, pages: Iterable[int]) -> list[int]:
        """Those of the pages that are here; stores to all of them are given up. NotClean: one is in a transaction."""
        wanted = list(pages)
        with self._changed:
            here = [page for page in wanted if page in self._pages]
            if any(self._pages[page].transaction for page in here):
                raise NotClean("a page is in a transaction", hint="abort that instead")
            self._lost.difference_update(wanted)
            return here

    @contextmanager
    def frozen(self, pages: Mapping[int, list[Piece]], transaction: int) -> Iterator[dict[int, Frozen]]:
        """No program writes to these pages meanwhile; gives those that are here.

        Retry: another transaction of this node has one of them, or (in a transaction) somebody else committed one since
        it was acquired. StoresLost (in none).

        transaction -- 0 for a commit without one
        """
        with self._changed:
            if not transaction and (lost := self._lost & pages.keys()):
                self._lost -= lost
                raise StoresLost(f"pages {sorted(lost)} of {self.record.name} had to be dropped")
            here = {page: self._pages[page] for page in pages
                    if page in self._pages and not self._pages[page].arriving}  # fmt: skip
            for state in here.values():
                if state.committing or state.transaction != transaction:
                    raise Retry("a page is in another transaction of this node")
                if transaction and state.fresh is not None:
                    raise Retry("somebody committed a page since it was acquired")
            if transaction and len(here) < len(pages):
                raise Retry("a page was dropped meanwhile")
            for page, state in here.items():
                state.committing = True
                self._protect(page)
        try:
            yield {page: Frozen(state.seen, state.dirty, self._bytes(page)) for page, state in here.items()}
        finally:
            with self._changed:
                for page, state in here.items():
                    state.committing = False
                    # News that came when it was clean already; what has stores, or is acquired, waits for their end.
                    if state.fresh is not None and not state.dirty and not state.transaction:
                        self._settle(page, state, state.fresh)
                    self._wake(page)
                self._changed.notify_all()

    def committed(self, pages: Mapping[int, list[Piece]], versions: Mapping[int, int]) -> None:
        """While they are frozen: the parts of these pages were committed, and gave them these versions."""
        with self._changed:
            for page, version in versions.items():
                state = self._pages[page]
                now, twin = self._bytes(page), state.twin
                assert twin is not None
                ours = _cut(now, pages[page])
                others = patched(now, _cut(twin, pages[page]))
                if state.version == version - 1:
                    after, state.version = patched(self._latest(state) or twin, ours), version
                elif state.version >= version and state.fresh is not None:
                    after = state.fresh  # it has come back from the owner, and what others committed after it, too
                else:
                    if others != twin:
                        self._lost.add(page)
                    self._forget(page)
                    continue
                if others == twin:
                    self._settle(page, state, after)
                else:  # there are more stores on this page, which stay uncommitted
                    changed = (new if mine == old else mine for mine, old, new in zip(others, twin, after, strict=True))
                    os.pwrite(self.file, patched(bytes(changed), _cut(after, pages[page])), page * PAGE)
                    state.twin, state.fresh, state.seen = after, None, state.version

    def doubtful(self, pages: Iterable[int]) -> None:
        """What became of these pages is not known: forget them."""
        with self._changed:
            for page in pages:
                self._forget(page)

    def evict(self, most: int) -> int:
        """Take so many pages out of programs, those first that were longest not asked for; none that was written, or is
        in a transaction. How many."""
        with self._changed:
            free = [page for page, state in self._pages.items()
                    if not (state.arriving or state.dirty or state.transaction or state.committing)][:most]  # fmt: skip
            for page in free:
                self._forget(page)
            self.counts["evicted"] += len(free)
        return len(free)

    def pages(self) -> list[int]:
        """All pages that are here, or on their way."""
        with self._changed:
            return list(self._pages)

    def states(self) -> dict[str, set[int]]:
        """Pages by state."""
        with self._changed:
            dirty = {page for page, state in self._pages.items() if state.dirty}
            return {"dirty": dirty, "committed": {p for p, state in self._pages.items() if not state.arriving} - dirty}

    # Inside; the lock is held

    def _page(self, page: int) -> Page:
        try:
            return self._pages[page]
        except KeyError:
            raise Retry("a page was dropped meanwhile") from None

    def _bytes(self, page: int) -> bytes:
        return os.pread(self.file, PAGE, page * PAGE)

    def _latest(self, state: Page) -> bytes | None:
        """The latest committed page, None if it is what is in memory."""
        return state.twin if state.fresh is None else state.fresh

    def _settle(self, page: int, state: Page, data: bytes | None) -> None:
        """The page is committed, with these bytes (None: as it is)."""
        if state.dirty:
            self._protect(page)
        if data is not None:
            os.pwrite(self.file, data, page * PAGE)
        state.twin = state.fresh = None
        state.seen = state.version

    def _used(self, page: int) -> None:
        self._pages[page] = self._pages.pop(page)  # the last of them

    def _forget(self, page: int) -> None:
        if self._pages.pop(page, None) is not None:
            _punch(self.file, page * PAGE)
            self._wake(page)

    def _protect(self, page: int) -> None:
        for program in self._programs:
            userfault.protect(program, self.record.address + page * PAGE)

    def _wake(self, page: int) -> None:
        for program in self._programs:
            userfault.wake(program, self.record.address + page * PAGE)


def _cut(page: bytes, pieces: Iterable[Piece]) -> list[tuple[Piece, bytes]]:
    return [(piece, page[piece.offset : piece.offset + piece.length]) for piece in pieces]


_PUNCH_HOLE, _KEEP_SIZE = 2, 1


def _punch(file: int, offset: int) -> None:
    """Take a page out of a memory file, and so out of all programs that have it mapped."""
    if _libc.fallocate(file, _PUNCH_HOLE | _KEEP_SIZE, ctypes.c_long(offset), ctypes.c_long(PAGE)):
        raise OSError(ctypes.get_errno(), "a page cannot be taken out of its memory file")


_libc = ctypes.CDLL(None, use_errno=True)
