"""The thread that answers a dataset's page faults when the service has gone: native/libhotpot/watch.c.

It is not Python's, as a Python thread that faults holds the interpreter lock. Without it such a thread would wait for
ever.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

from guest_agents.hotpot.errors import NotJoined

LIBRARY = "libhotpot.so"
"""Found as the loader finds libraries; every blade has it in /usr/lib."""


@cache
def library() -> ctypes.CDLL:
    """libhotpot. NotJoined when it is not there."""
    try:
        found = ctypes.CDLL(LIBRARY, use_errno=True)
    except OSError as failure:
        raise NotJoined(f"no {LIBRARY}: {failure}", hint="it is on every blade; `make` in guest_agents/native makes it "
                        "for LD_LIBRARY_PATH") from None  # fmt: skip
    found.hotpot_watch.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_char_p)
    found.hotpot_watch.restype = ctypes.c_void_p
    found.hotpot_unwatch.argtypes = (ctypes.c_void_p,)
    found.hotpot_unwatch.restype = None
    return found


def start(service: int, faults: int, address: int, size: int, name: str) -> int:
    """Have a mapped dataset watched; what `stop` wants. OSError.

    service -- the connection, whose end is waited for
    faults -- the mapping's userfaultfd; it must stay open until `stop`
    """
    watch: int | None = library().hotpot_watch(service, faults, address, size, name.encode())
    if watch is None:
        raise OSError(ctypes.get_errno(), f"nobody can watch {name!r}: {os.strerror(ctypes.get_errno())}")
    return watch


def stop(watch: int) -> None:
    """End it; to be called before the dataset is unmapped. In a forked child too, which has no such thread."""
    library().hotpot_unwatch(watch)
