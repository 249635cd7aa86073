"""Where datasets are in a program: a region of addresses that nothing else gets, and mappings in it."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading

from guest_agents.hotpot.errors import AddressTaken
from guest_agents.hotpot.records import REGION, REGION_BYTES

_FIXED, _FIXED_NOREPLACE = 0x10, 0x100000
_NORESERVE = 0x4000
_DONTFORK = 10
_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_lock = threading.Lock()
_reserved = False


def reserve() -> None:
    """Keep the region for datasets, once in a process. AddressTaken."""
    global _reserved
    with _lock:
        if not _reserved:
            place = _libc.mmap(REGION, REGION_BYTES, 0, _ANONYMOUS | _FIXED_NOREPLACE, -1, 0)
            if place != REGION:
                raise AddressTaken(f"{REGION_BYTES} bytes at {REGION:#x}: {os.strerror(ctypes.get_errno())}")
            _reserved = True


def map_file(file: int, address: int, size: int) -> memoryview:
    """Map a file there; its bytes. The mapping is not inherited by children: nobody would answer their faults."""
    _mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _FIXED, file)
    _libc.madvise(address, size, _DONTFORK)
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")


def unmap(address: int, size: int) -> None:
    """The addresses are reserved again: whoever still uses them gets SIGSEGV."""
    _mmap(address, size, 0, _ANONYMOUS | _FIXED, -1)


def _mmap(address: int, size: int, protection: int, flags: int, file: int) -> None:
    if _libc.mmap(address, size, protection, flags, file, 0) != address:
        raise OSError(ctypes.get_errno(), f"cannot map {size} bytes at {address:#x}")
