"""The file service's requests, shared by the storage monitor and the processor's /vnode.

Stateless and by full path, as LegoOS's storage component is: every request names its file, so a storage blade that
restarts has nothing to remember (legoos.md 1.2, P2S and M2S messages). Paths are relative to the service's root,
with no leading slash; "" is the root.

Request, first part: u64 a, u64 b, u64 c, u32 flags, u32 length of path, path, second path or name.
Bulk data of a WRITE is the second part of the message, that of a READ the second part of the reply.
"""

from __future__ import annotations

import os
import struct
from enum import IntEnum
from typing import NamedTuple


class Op(IntEnum):
    """What is asked; in brackets what a, b, c and flags mean, and the reply."""

    GETATTR = 1  # -> attributes
    READ = 2  # [offset, size] -> second part: bytes, fewer at the end of the file
    WRITE = 3  # [offset] -> u64 bytes written
    CREATE = 4  # [mode, uid, gid; flags O_EXCL] -> attributes
    OPEN = 5  # [flags O_TRUNC] -> attributes
    TRUNCATE = 6  # [size] -> attributes
    RENAME = 7  # [flags of renameat2] second path: the new one
    UNLINK = 8
    MKDIR = 9  # [mode, uid, gid] -> attributes
    RMDIR = 10
    READDIR = 11  # [first] -> second part: entries (u64 inode, u32 type, u32 name length, name)
    STATFS = 12  # -> u64 block size, blocks, free, available, files, free files, name length
    FSYNC = 13  # [flags 1: data only]
    SYMLINK = 14  # [-, uid, gid] second path: what it says -> attributes
    READLINK = 15  # -> first part: what it says
    CHMOD = 16  # [mode] -> attributes
    CHOWN = 17  # [uid, gid; 2**32 - 1 keeps one] -> attributes
    UTIMENS = 18  # [atime ns, mtime ns] -> attributes
    LINK = 19  # second path: the new name -> attributes


MAX_PATH = 4096
_REQUEST = struct.Struct("<QQQII")
_ATTRIBUTES = struct.Struct("<13Q")
_ENTRY = struct.Struct("<QII")
STATFS = struct.Struct("<7Q")
COUNT = struct.Struct("<Q")


class Request(NamedTuple):
    """A decoded request."""

    a: int
    b: int
    c: int
    flags: int
    path: str
    second: str


class Attributes(NamedTuple):
    """What stat tells; times in nanoseconds."""

    ino: int
    size: int
    blocks: int
    atime: int
    mtime: int
    ctime: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    blksize: int
    reserved: int


def encode(path: str, second: str = "", a: int = 0, b: int = 0, c: int = 0, flags: int = 0) -> bytes:
    """A request's first part; OSError(ENAMETOOLONG) if a path is too long."""
    name, other = os.fsencode(path), os.fsencode(second)
    if len(name) > MAX_PATH or len(other) > MAX_PATH:
        raise OSError(36, "path too long")
    return _REQUEST.pack(a, b, c, flags, len(name)) + name + other


def decode(data: bytes | memoryview) -> Request:
    """The request in a message's first part; OSError(EBADMSG) if it is malformed."""
    if len(data) < _REQUEST.size:
        raise OSError(74, "short request")
    a, b, c, flags, length = _REQUEST.unpack_from(data)
    paths = bytes(data[_REQUEST.size :])
    if length > len(paths) or b"\0" in paths:
        raise OSError(74, "malformed paths")
    return Request(a, b, c, flags, os.fsdecode(paths[:length]), os.fsdecode(paths[length:]))


def pack_attributes(stat: os.stat_result) -> bytes:
    """A stat result for the wire."""
    return _ATTRIBUTES.pack(
        stat.st_ino,
        stat.st_size,
        stat.st_blocks,
        stat.st_atime_ns,
        stat.st_mtime_ns,
        stat.st_ctime_ns,
        stat.st_mode,
        stat.st_nlink,
        stat.st_uid,
        stat.st_gid,
        stat.st_rdev,
        stat.st_blksize,
        0,
    )


def unpack_attributes(data: bytes | memoryview) -> Attributes:
    """Attributes from the wire."""
    return Attributes(*_ATTRIBUTES.unpack(data))


def pack_entry(ino: int, kind: int, name: bytes) -> bytes:
    """One directory entry; kind as in d_type."""
    return _ENTRY.pack(ino, kind, len(name)) + name


def unpack_entries(data: bytes | memoryview) -> list[tuple[int, int, bytes]]:
    """Directory entries: inode, d_type, name."""
    result, at = [], 0
    while at < len(data):
        ino, kind, length = _ENTRY.unpack_from(data, at)
        at += _ENTRY.size
        result.append((ino, kind, bytes(data[at : at + length])))
        at += length
    return result
