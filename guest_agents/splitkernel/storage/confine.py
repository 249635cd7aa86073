"""Opening paths under a root, and nothing outside it, whatever a client sends.

The client's kernel has resolved every directory and symbolic link before a path comes here, so no component may be a
symbolic link, and none another file system's: openat2 with RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV
refuses races as well. What is done to a file is done to a descriptor that came from here, or to one name in one.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SYS_OPENAT2 = 437
_NO_XDEV, _NO_MAGICLINKS, _NO_SYMLINKS, _BENEATH = 0x01, 0x02, 0x04, 0x08
_RESOLVE = _NO_XDEV | _NO_MAGICLINKS | _NO_SYMLINKS | _BENEATH
_HOW = struct.Struct("<QQQ")
_AT_EMPTY_PATH = 0x1000
_IDENTITY = "trusted.rackless.identity"
"""An extended attribute, which only root sees; files whose identity is their handle have none."""
_HANDLE_HEAD, _HANDLE_BYTES = 8, 128  # struct file_handle: u32 length, i32 type, MAX_HANDLE_SZ bytes
_libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, path: str = "") -> int:
    """What a function of libc returned, unless it failed: then the OSError."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return result


def open_beneath(root: int, path: str, flags: int, mode: int = 0) -> int:
    """A descriptor for `path` below the directory descriptor `root`; OSError (EXDEV, ELOOP) if it would leave it."""
    how = _HOW.pack(flags | os.O_CLOEXEC | os.O_NOFOLLOW, mode, _RESOLVE)
    name = os.fsencode(path) or b"."
    return check(int(_libc.syscall(_SYS_OPENAT2, root, name, how, len(how))), path)


@contextmanager
def opened(root: int, path: str, flags: int = os.O_PATH) -> Iterator[int]:
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
        raise OSError(errno.EINVAL, "no name", path)
    with opened(root, directory, os.O_PATH | os.O_DIRECTORY) as fd:
        yield fd, name


def keep_identity(path: Path, identity: int) -> None:
    """Give a file that came from another storage blade the identity that it had there: who has it open goes on."""
    os.setxattr(path, _IDENTITY, struct.pack("<Q", identity), follow_symlinks=False)


def identity_of(fd: int, ino: int) -> int:
    """A number that this file has and no other ever had: the one that it came with, or else its handle, of inode and
    generation. Not 0.

    ino -- its inode number, which has to do where the file system knows no handles
    """
    kept = ctypes.create_string_buffer(8)
    if _libc.getxattr(b"/proc/self/fd/%d" % fd, _IDENTITY.encode(), kept, 8) == len(kept.raw):
        return int.from_bytes(kept.raw, "little")
    handle = ctypes.create_string_buffer(_HANDLE_HEAD + _HANDLE_BYTES)
    struct.pack_into("<I", handle, 0, _HANDLE_BYTES)
    mount = ctypes.c_int()
    if _libc.name_to_handle_at(fd, b"", handle, ctypes.byref(mount), _AT_EMPTY_PATH) != 0:
        if ctypes.get_errno() != errno.EOPNOTSUPP:
            check(-1)
        return ino
    (length,) = struct.unpack_from("<I", handle)
    folded = 0
    for at in range(_HANDLE_HEAD, _HANDLE_HEAD + length, 8):
        folded ^= int.from_bytes(handle.raw[at : min(at + 8, _HANDLE_HEAD + length)], "little")
    return folded or ino
