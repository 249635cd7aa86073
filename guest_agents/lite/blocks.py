"""The memory that this node gives to LMRs and locks: slabs of registered memory, cut into blocks.

Registering pins memory, so slabs come when they are needed and go when their last block does; the splitkernel's memory
monitor draws on the same budget. It also takes long: the first slabs are small. A block is zero when it is given out.
"""

from __future__ import annotations

import mmap
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from guest_agents.budget import Budget
from guest_agents.extents import Extents
from guest_agents.lite.errors import Freed, NoMemory

UNIT = 64
"""Blocks are multiples of this; a cache line, so that two locks never share one."""
USER = "lite"
_SMALLEST = 1 << 20


class Slab(Protocol):
    """Registered memory (core.Slab)."""

    address: int
    bytes: int
    rkey: int

    def close(self) -> None: ...


class Memory(Protocol):
    """What of the core this needs."""

    def slab(self, size: int) -> Slab: ...

    def memset_local(self, address: int, byte: int, length: int) -> None: ...


@dataclass
class _Shelf:
    slab: Slab
    extents: Extents
    used: int = 0
    """Bytes from here on have never been given out: they are still zero."""


@dataclass(frozen=True)
class Held:
    """A block that is given out."""

    owner: int
    address: int
    rkey: int
    length: int


class Blocks:
    """All of them, by owner: an LMR's id, or 0 for locks. Thread-safe.

    slab -- most bytes that are registered at once, unless more are asked for
    """

    def __init__(self, core: Memory, budget: Budget, slab: int) -> None:
        self._core = core
        self._budget = budget
        self._slab = slab
        self._shelves: list[_Shelf] = []
        self._held: dict[int, tuple[_Shelf, Held]] = {}
        self._owned: dict[int, dict[int, Held]] = {}
        """By owner, then by address."""
        self._busy: Counter[int] = Counter()
        """Copies of this tier under way, by the address of the block."""
        self._lock = threading.Condition()

    def allocate(self, owner: int, lengths: Sequence[int]) -> list[Held]:
        """Blocks of these lengths, zeroed; NO_MEMORY if there is not room for all of them, and then none is taken."""
        taken: list[Held] = []
        with self._lock:
            try:
                for index, length in enumerate(lengths):
                    taken.append(self._one(owner, length, sum(lengths[index:])))
            except BaseException:
                for held in taken:
                    self._return(held.address)
                raise
        return taken

    def free(self, owner: int, addresses: Iterable[int]) -> None:
        """Give blocks back, when nothing is copied to them any more; those that are not the owner's are left alone."""
        with self._lock:
            for address in addresses:
                found = self._held.get(address)
                if found is not None and found[1].owner == owner:
                    self._return_when_idle(address)

    def free_all(self) -> None:
        """Give everything back: a new life begins."""
        with self._lock:
            for address in list(self._held):
                self._return_when_idle(address)

    @contextmanager
    def using(self, owner: int, address: int, length: int) -> Iterator[None]:
        """Keep the block of a range from being given back meanwhile. FREED unless it is one block of that owner."""
        with self._lock:
            for held in self._owned.get(owner, {}).values():
                if held.address <= address and address + length <= held.address + held.length:
                    break
            else:
                raise Freed("this memory does not belong to that LMR any more")
            block = held.address
            self._busy[block] += 1
        try:
            yield
        finally:
            with self._lock:
                self._busy[block] -= 1
                if not self._busy[block]:
                    del self._busy[block]
                self._lock.notify_all()

    def has(self, owner: int) -> bool:
        """Whether it has any block here."""
        with self._lock:
            return owner in self._owned

    def held(self) -> list[Held]:
        """All blocks that are given out."""
        with self._lock:
            return [held for _shelf, held in self._held.values()]

    def stat(self) -> dict[str, int]:
        """blocks; bytes: given out, registered (both of LITE), total (of the blade's budget), free (to anybody)."""
        with self._lock:
            registered = sum(shelf.slab.bytes for shelf in self._shelves)
            allocated = sum(held.length for _shelf, held in self._held.values())
        free = self._budget.room + registered - allocated
        return {"blocks": len(self._held), "bytes_allocated": allocated, "bytes_registered": registered,
                "bytes_total": self._budget.total, "bytes_free": free}  # fmt: skip

    def _one(self, owner: int, length: int, more: int) -> Held:
        """A block; `more` bytes are wanted in all, so that a new slab has the right size."""
        for shelf in self._shelves:
            offset = shelf.extents.allocate(length)
            if offset is not None:
                break
        else:
            shelf = self._register(more)
            offset = shelf.extents.allocate(length)
            assert offset is not None
        address = shelf.slab.address + offset
        if offset < shelf.used:
            self._core.memset_local(address, 0, length)
        shelf.used = max(shelf.used, offset + length)
        held = Held(owner, address, shelf.slab.rkey, length)
        self._held[address] = (shelf, held)
        self._owned.setdefault(owner, {})[address] = held
        return held

    def _register(self, more: int) -> _Shelf:
        room = self._budget.room
        usual = min(self._slab, max(_SMALLEST, sum(shelf.slab.bytes for shelf in self._shelves)))
        size = min(max(usual, -(-more // mmap.PAGESIZE) * mmap.PAGESIZE), room // mmap.PAGESIZE * mmap.PAGESIZE)
        if size < more or not self._budget.take(USER, size):
            raise NoMemory(f"{more} bytes asked, {room} can still be registered on this node")
        try:
            slab = self._core.slab(size)
        except BaseException:
            self._budget.give(USER, size)
            raise
        shelf = _Shelf(slab, Extents(slab.bytes, UNIT))
        self._shelves.append(shelf)
        return shelf

    def _return_when_idle(self, address: int) -> None:
        self._lock.wait_for(lambda: not self._busy[address])
        if address in self._held:  # nobody else gave it back meanwhile
            self._return(address)

    def _return(self, address: int) -> None:
        shelf, held = self._held.pop(address)
        del self._owned[held.owner][address]
        if not self._owned[held.owner]:
            del self._owned[held.owner]
        shelf.extents.free(held.address - shelf.slab.address)
        if not shelf.extents.allocated:
            self._shelves.remove(shelf)
            size = shelf.slab.bytes
            shelf.slab.close()
            self._budget.give(USER, size)
