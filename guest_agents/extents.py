"""Giving out pieces of a range of numbers, such as the bytes of a slab of memory."""

from __future__ import annotations

import mmap
import random

from guest_agents.gaps import Gap, first_fit, join, leftmost, rightmost, split, without


class Extents:
    """First-fit allocation of [0, size) in multiples of `unit` bytes; neighbouring free pieces are joined."""

    def __init__(self, size: int, unit: int = mmap.PAGESIZE) -> None:
        self.unit = unit
        self.size = size // unit * unit
        self._random = random.Random(0)
        self._free = self._gap(0, self.size)
        self._taken: dict[int, int] = {}
        self.allocated = 0
        """Bytes given out."""

    @property
    def max_gap(self) -> int:
        """Bytes of the largest piece that could be given out."""
        return self._free.max_gap if self._free else 0

    def allocate(self, size: int) -> int | None:
        """Offset of a free piece of at least `size` bytes, or None."""
        size = max(1, -(-size // self.unit)) * self.unit
        found = first_fit(self._free, size)
        if found is None:
            return None
        low, rest = split(self._free, found.start)
        self._free = join(join(low, self._gap(found.start + size, found.length - size)), without(rest, found))
        self._taken[found.start] = size
        self.allocated += size
        return found.start

    def taken(self) -> list[int]:
        """Offsets of the pieces that were given out."""
        return list(self._taken)

    def free(self, offset: int) -> None:
        """Give a piece back; KeyError if there is none at `offset`."""
        length = self._taken.pop(offset)
        self.allocated -= length
        low, high = split(self._free, offset)
        last, first = rightmost(low), leftmost(high)
        if first is not None and first.start == offset + length:
            high = without(high, first)
            length += first.length
        if last is not None and last.start + last.length == offset:
            low = without(low, last)
            offset, length = last.start, last.length + length
        self._free = join(join(low, self._gap(offset, length)), high)

    def _gap(self, start: int, length: int) -> Gap | None:
        return Gap(start, length, self._random.random()) if length else None
