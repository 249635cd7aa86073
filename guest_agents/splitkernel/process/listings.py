"""Directories being read: each open one is a list of names, taken when its reader began.

So a place in it (readdir's offset) stays that place while files come and go: `rm -r` misses none.
"""

from __future__ import annotations

import itertools
import stat
import threading
from collections.abc import Callable

from guest_agents.splitkernel.storage import wire

UNKNOWN_INODE = 0xFFFFFFFF
"""For "." and "..": who wants to know asks for attributes."""
Entry = tuple[int, int, bytes]
"""Inode, d_type, name."""
_DOTS = [(UNKNOWN_INODE, stat.S_IFDIR >> 12, name) for name in (b".", b"..")]


class Listings:
    """Open directories by the handle that the kernel gives back to us."""

    def __init__(self) -> None:
        self._lists: dict[int, list[Entry]] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()

    def open(self) -> int:
        """A new handle."""
        with self._lock:
            return next(self._numbers)

    def close(self, handle: int) -> None:
        """Nobody reads it any more."""
        with self._lock:
            self._lists.pop(handle, None)

    def entries(self, handle: int, start: int, ask: Callable[[str], bytes]) -> list[Entry]:
        """The list, with the dots first; taken anew at the beginning.

        ask -- a READDIR reply with what comes after a name
        """
        with self._lock:
            known = self._lists.get(handle)
        if known is None or start == 0:
            known = list(_DOTS)
            after = ""
            while reply := ask(after):
                known += wire.unpack_entries(reply)
                after = known[-1][2].decode(errors="surrogateescape")
            with self._lock:
                self._lists[handle] = known
        return known
