"""Registered memory: one mapping, one memory region (one rkey), given out in pieces.

User space cannot register physical memory as LITE does, so an agent registers one big arena and sub-allocates;
whoever holds the rkey can reach all of it. Agents trust each other, as in LITE (lite-and-hotpot.md, section 7.1).
"""

from __future__ import annotations

import ctypes
import mmap
from bisect import bisect_left, insort
from typing import Any

from pyverbs.mr import MR

from guest_agents.verbs.device import Device
from guest_agents.verbs.enums import E

LOCAL = int(E.IBV_ACCESS_LOCAL_WRITE)
REMOTE = LOCAL | int(E.IBV_ACCESS_REMOTE_READ) | int(E.IBV_ACCESS_REMOTE_WRITE)
_HUGE = 2 << 20
ATOMIC = REMOTE | int(E.IBV_ACCESS_REMOTE_ATOMIC)


class Extents:
    """First-fit allocation of [0, size) in multiples of `unit` bytes; neighbouring free pieces are joined."""

    def __init__(self, size: int, unit: int = mmap.PAGESIZE) -> None:
        self.unit = unit
        self.size = size // unit * unit
        self._free: list[tuple[int, int]] = [(0, self.size)] if self.size else []  # (offset, length), sorted
        self._taken: dict[int, int] = {}

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
                return offset
        return None

    def free(self, offset: int) -> None:
        """Give a piece back; KeyError if there is none at `offset`."""
        length = self._taken.pop(offset)
        number = bisect_left(self._free, (offset, 0))
        if number < len(self._free) and self._free[number][0] == offset + length:
            length += self._free.pop(number)[1]
        if number and sum(self._free[number - 1]) == offset:
            before, more = self._free.pop(number - 1)
            offset, length = before, more + length
        insort(self._free, (offset, length))

    @property
    def allocated(self) -> int:
        """Bytes given out."""
        return sum(self._taken.values())


class Arena:
    """`size` bytes of zeroed, registered memory.

    view -- a writable memoryview of all of it; address -- where it starts, as peers name it.
    """

    def __init__(self, device: Device, size: int, access: int = REMOTE) -> None:
        self.size = size
        self._memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if size >= _HUGE:  # pinned page by page a slab takes seconds without KVM
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._anchor = (ctypes.c_char * size).from_buffer(self._memory)
        self.address = ctypes.addressof(self._anchor)
        self.view = memoryview(self._memory)
        self._mr: Any = MR(device.pd, size, access, address=self.address)
        self.lkey = int(self._mr.lkey)
        self.rkey = int(self._mr.rkey)
        self.extents = Extents(size)

    def close(self) -> None:
        """Deregister; the memory itself goes when nobody looks at `view` any more."""
        self._mr.close()
