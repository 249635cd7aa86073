"""Registered memory: one mapping, one memory region (one rkey), given out in pieces.

User space cannot register physical memory as LITE does, so an agent registers one big arena and sub-allocates;
whoever holds the rkey can reach all of it. Agents trust each other, as in LITE (lite-and-hotpot.md, section 7.1).
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

from pyverbs.mr import MR

from guest_agents.extents import Extents
from guest_agents.verbs.device import Device
from guest_agents.verbs.enums import E

LOCAL = int(E.IBV_ACCESS_LOCAL_WRITE)
REMOTE = LOCAL | int(E.IBV_ACCESS_REMOTE_READ) | int(E.IBV_ACCESS_REMOTE_WRITE)
_HUGE = 2 << 20
ATOMIC = REMOTE | int(E.IBV_ACCESS_REMOTE_ATOMIC)


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
