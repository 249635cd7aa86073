"""Giving out pieces of a range of numbers, such as the bytes of a slab of memory."""

from __future__ import annotations

import mmap
from bisect import bisect_left, insort


class Extents:
    """First-fit allocation of [0, size) in multiples of `unit` bytes; neighbouring free pieces are joined."""

    def __init__(self, size: int, unit: int = mmap.PAGESIZE) -> None:
        self.unit = unit
        self.size = size // unit * unit
        self._free: list[tuple[int, int]] = [(0, self.size)] if self.size else []  # (offset, length), sorted
        self._taken: dict[int, int] = {}
        self.allocated = 0
        """Bytes given out."""

    def allocate(self, size: int) -> int | None:
        """Offset of a free piece of at least `size` bytes, or None."""
        size = max(1, -(-size // self.unit)) * self.unit
        for number, (offset, length) in enumerate(self._free):
            if length >= size:
                if length == size:
                    del self._free[number]
                else:
                    self._free[number] = (offset + size, length - size)
                self._taken[offset] = size
                self.allocated += size
                return offset
        return None

    def taken(self) -> list[int]:
        """Offsets of the pieces that were given out."""
        return list(self._taken)

    def free(self, offset: int) -> None:
        """Give a piece back; KeyError if there is none at `offset`."""
        length = self._taken.pop(offset)
        self.allocated -= length
        number = bisect_left(self._free, (offset, 0))
        if number < len(self._free) and self._free[number][0] == offset + length:
            length += self._free.pop(number)[1]
        if number and sum(self._free[number - 1]) == offset:
            before, more = self._free.pop(number - 1)
            offset, length = before, more + length
        insort(self._free, (offset, length))
