"""Pieces of files that a memory blade keeps: of each file, those of one version of its contents.

A file is kept in blocks of 16 KiB (LegoOS's page cache on memory components has lines of 64 pages; small files are
many), each in a slot of a slab, and the one that was not used for longest makes room. Slabs come from the blade's
budget, at most `limit` bytes, and go back when others ask for memory.
"""

from __future__ import annotations

import mmap
import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field

from guest_agents.budget import Budget
from guest_agents.splitkernel.storage.wire import Version

BLOCK = 16 << 10
SLAB = 4 << 20
USER = "buffers"


@dataclass
class _File:
    version: Version
    blocks: dict[int, memoryview] = field(default_factory=dict)
    """By number: the whole slot. What lies past the end of the file is zeros."""


class Blocks:
    """Thread-safe. A file's key is the caller's; data is copied in and out."""

    def __init__(self, budget: Budget, limit: int) -> None:
        self._budget = budget
        self._limit = limit
        self._files: dict[Hashable, _File] = {}
        self._used: OrderedDict[tuple[Hashable, int], int] = OrderedDict()
        """Blocks, that unused for longest first, and the slab each is in."""
        self._slabs: dict[int, mmap.mmap] = {}
        self._free: dict[int, list[memoryview]] = {}
        self._next = 0
        self._lock = threading.RLock()

    @property
    def size(self) -> int:
        """Bytes taken from the budget."""
        return len(self._slabs) * SLAB

    def counts(self) -> dict[str, int]:
        """Files and bytes kept, and the most bytes that may be."""
        with self._lock:
            return {"files": len(self._files), "bytes": len(self._used) * BLOCK, "limit": self._limit}

    def read(self, key: Hashable, version: Version, offset: int, out: memoryview) -> list[tuple[int, int]] | None:
        """Copy what is kept of that version into `out`, which begins at `offset` and ends in the file.

        Returns what is missing, as offsets of blocks that are whole or end with the file: (first, past the last).
        None if nothing of that version is kept.
        """
        with self._lock:
            file = self._files.get(key)
            if file is None or file.version != version:
                return None
            end = offset + len(out)
            missing: list[tuple[int, int]] = []
            for number in range(offset // BLOCK, -(-end // BLOCK)) if out else ():
                start = number * BLOCK
                block = file.blocks.get(number)
                if block is None:
                    past = min(start + BLOCK, version.size)
                    first = missing.pop()[0] if missing and missing[-1][1] == start else start
                    missing.append((first, past))
                    continue
                self._used.move_to_end((key, number))
                low, high = max(offset, start), min(end, start + BLOCK)
                out[low - offset : high - offset] = block[low - start : high - start]
            return missing

    def keep(self, key: Hashable, version: Version, offset: int, data: memoryview) -> None:
        """Keep what was read of that version: the blocks that `data` covers whole, or to the end of the file."""
        with self._lock:
            file = self._files.get(key)
            if file is not None and file.version != version:
                self._drop(key)
                if version.moment < file.version.moment:  # late: another answer was faster. Or a clock was set back
                    return
                file = None
            if file is None:
                file = self._files[key] = _File(version)
            self._cover(key, file, offset, data)
            self._drop_if_empty(key)

    def written(self, key: Hashable, before: Version, after: Version, offset: int, data: memoryview) -> None:
        """A write has changed the contents from one version to another, and nothing else in between."""
        with self._lock:
            file = self._files.get(key)
            if file is not None and file.version != before:
                self._drop(key)
                if after.moment < file.version.moment:  # a later write's answer was faster
                    return
                file = None
            if file is None:
                file = self._files[key] = _File(after)
            file.version = after
            end = offset + len(data)
            for number in range(offset // BLOCK, -(-end // BLOCK)):
                block = file.blocks.get(number)
                if block is not None:
                    start = number * BLOCK
                    low, high = max(offset, start), min(end, start + BLOCK)
                    block[low - start : high - start] = data[low - offset : high - offset]
                    self._used.move_to_end((key, number))
            self._cover(key, file, offset, data)
            self._drop_if_empty(key)

    def drop(self, key: Hashable) -> None:
        """Forget a file."""
        with self._lock:
            self._drop(key)

    def shrink(self, size: int) -> None:
        """Give slabs of at least `size` bytes back to the budget, as far as there are any."""
        with self._lock:
            for slab in list(self._slabs)[: -(-size // SLAB)]:
                for (key, number), where in list(self._used.items()):
                    if where == slab:
                        self._evict(key, number)
                del self._slabs[slab], self._free[slab]  # unmapped when nobody looks at it any more
                self._budget.give(USER, SLAB)

    def _cover(self, key: Hashable, file: _File, offset: int, data: memoryview) -> None:
        """Make the blocks that are not there yet and that `data` covers."""
        end = offset + len(data)
        for number in range(-(-offset // BLOCK), -(-end // BLOCK)):
            start = number * BLOCK
            if number in file.blocks or end < min(start + BLOCK, file.version.size):
                continue
            slot = self._slot(key, number)
            if slot is None:
                return
            piece = data[start - offset : start - offset + BLOCK]
            slot[: len(piece)] = piece
            slot[len(piece) :] = bytes(BLOCK - len(piece))
            file.blocks[number] = slot
            self._files[key] = file  # which the last one may have made room in

    def _slot(self, key: Hashable, number: int) -> memoryview | None:
        slab = next((slab for slab, free in self._free.items() if free), None)
        if slab is None and self.size + SLAB <= self._limit and self._budget.take(USER, SLAB, press=False):
            self._next += 1
            slab, memory = self._next, mmap.mmap(-1, SLAB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._slabs[slab] = memory
            view = memoryview(memory)
            self._free[slab] = [view[at : at + BLOCK] for at in range(0, SLAB, BLOCK)]
        if slab is None:
            oldest = next(iter(self._used), None)
            if oldest is None:
                return None
            slab = self._used[oldest]
            self._evict(*oldest)
        self._used[key, number] = slab
        return self._free[slab].pop()

    def _evict(self, key: Hashable, number: int) -> None:
        slab = self._used.pop((key, number))
        self._free[slab].append(self._files[key].blocks.pop(number))
        self._drop_if_empty(key)

    def _drop(self, key: Hashable) -> None:
        file = self._files.get(key)
        if file is not None:
            for number in list(file.blocks):
                self._evict(key, number)
            self._files.pop(key, None)

    def _drop_if_empty(self, key: Hashable) -> None:
        file = self._files.get(key)
        if file is not None and not file.blocks:
            del self._files[key]
