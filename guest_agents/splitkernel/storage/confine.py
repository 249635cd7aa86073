"""Opening paths under a root, and nothing outside it, whatever a client sends.

The client's kernel has resolved every directory and symbolic link before a path comes here, so no component may be a
symbolic link: openat2 with RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS refuses races as well.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

_SYS_OPENAT2 = 437
_NO_MAGICLINKS, _NO_SYMLINKS, _BENEATH = 0x02, 0x04, 0x08
_HOW = struct.Struct("<QQQ")
_libc = ctypes.CDLL(None, use_errno=True)


def open_beneath(root: int, path: str, flags: int, mode: int = 0) -> int:
    """A descriptor for `path` below the directory descriptor `root`; OSError (EXDEV, ELOOP) if it would leave it."""
    how = _HOW.pack(flags | os.O_CLOEXEC | os.O_NOFOLLOW, mode, _NO_MAGICLINKS | _NO_SYMLINKS | _BENEATH)
    name = os.fsencode(path) or b"."
    fd = int(_libc.syscall(_SYS_OPENAT2, root, name, how, len(how)))
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return fd


@contextmanager
def opened(root: int, path: str, flags: int) -> Iterator[int]:
    """`open_beneath` for a block."""
    fd = open_beneath(root, path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def parent(root: int, path: str) -> Iterator[tuple[int, str]]:
    """The directory that holds `path`, and the last name in it; OSError(EINVAL) if there is no such name."""
    directory, _, name = path.rpartition("/")
    if name in ("", ".", ".."):
        raise OSError(22, "no name", path)
    with opened(root, directory, os.O_PATH | os.O_DIRECTORY) as fd:
        yield fd, name
