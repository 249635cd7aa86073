"""The file service's requests, shared by the storage monitor and the processor's /vnode.

Stateless and by full path, as LegoOS's storage component is: every request names its file, so a storage blade that
restarts has nothing to remember (legoos.md 1.2, P2S and M2S messages). Paths are relative to the service's root,
with no leading slash; "" is the root.

A path may mean another file by the time a request comes: another blade has renamed or replaced it. So a request can
also say which file it means, by the `identity` that attributes carry; ESTALE answers one whose path means another.

What a file's contents are at a moment is its version. READs and WRITEs tell it, so that memory blades may keep what
went through them (memory/buffers.py): two contents of a file never have the same one.

Request, first part: u64 identity (0: whichever), u64 a, u64 b, u64 c, u32 flags, u32 length of path, path, second
path or name. Bulk data of a WRITE is the second part of the message, that of a READ the second part of the reply.
To a memory blade a READ's and a WRITE's second path is the storage blade's name, and a READ's second part the version
that the asking blade knows, if it knows one.
"""

from __future__ import annotations

import errno
import os
import struct
from enum import IntEnum
from typing import NamedTuple


class Op(IntEnum):
    """What is asked; in brackets what a, b, c and flags mean, and the reply."""

    GETATTR = 1  # -> attributes
    READ = 2  # [offset, size] -> version; second part: bytes, fewer at the end of the file
    WRITE = 3  # [offset; flags O_APPEND: at the end, DROP_SUID] -> WRITTEN, version before, version after
    CREATE = 4  # [mode with type: regular, FIFO or socket; uid, gid] -> attributes; EEXIST if there is one
    OPEN = 5  # [flags O_TRUNC] -> attributes
    TRUNCATE = 6  # [size] -> attributes
    RENAME = 7  # [flags RENAME_NOREPLACE, RENAME_EXCHANGE] second path: the new one
    UNLINK = 8
    MKDIR = 9  # [mode, uid, gid] -> attributes
    RMDIR = 10
    READDIR = 11  # second: the name to begin after -> second part: entries, sorted, as many as fit
    STATFS = 12  # -> u64 block size, blocks, free, available, files, free files, name length
    FSYNC = 13  # [flags 1: data only]
    SYMLINK = 14  # [-, uid, gid] second path: what it says -> attributes
    READLINK = 15  # -> first part: what it says
    CHMOD = 16  # [mode] -> attributes
    CHOWN = 17  # [uid, gid; 2**32 - 1 keeps one] -> attributes
    UTIMENS = 18  # [atime ns, mtime ns, signed; flags SET_...] -> attributes
    LINK = 19  # second path: the new name -> attributes
    FALLOCATE = 20  # [offset, length; flags as of fallocate(2)] -> attributes
    SEEK = 21  # [offset; flags SEEK_DATA or SEEK_HOLE] -> u64 offset
    LOOK = 22  # second part: names in a directory, NUL after each -> second part: attributes, zeros for what is gone


SET_ATIME, SET_MTIME, SET_ATIME_NOW, SET_MTIME_NOW = 1, 2, 4, 8
"""Flags of UTIMENS; what no flag names stays."""
DROP_SUID = 1
"""Flag of WRITE: the writer is not root, so the file is set-user-ID and set-group-ID no more."""
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
MAX_PATH = 4095
"""Longest path below the root, bytes: the kernel takes no longer one either."""
MAX_REPLY = 1 << 20
ATTIC = ".vnode-removed"
"""A folder in the root that programs do not see: files that are removed while open, and what is on its way."""
NOT_NOW = errno.EHOSTDOWN
"""The answer to a request that was not carried out, because the files are moving: ask again."""
_REQUEST = struct.Struct("<QQQQII")
_ATTRIBUTES = struct.Struct("<3Q3q7Q")
_ENTRY = struct.Struct("<QII")
STATFS = struct.Struct("<7Q")
COUNT = struct.Struct("<Q")
WRITTEN = struct.Struct("<QQQ")
"""u64 bytes written, u64 where, u64 whether set-user-ID was dropped."""
_VERSION = struct.Struct("<Qqq")
_U64 = (1 << 64) - 1


class Request(NamedTuple):
    """A decoded request."""

    identity: int
    a: int
    b: int
    c: int
    flags: int
    path: str
    second: str


class Attributes(NamedTuple):
    """What stat tells; times in nanoseconds. No two files ever have the same identity, not even one after the other."""

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
    identity: int


class Version(NamedTuple):
    """What tells one contents of a file from all others; times in nanoseconds. mtime alone can be set back."""

    size: int
    mtime: int
    ctime: int

    def pack(self) -> bytes:
        """For the wire; `unpack_version` reads it."""
        return _VERSION.pack(*self)

    @property
    def moment(self) -> tuple[int, int]:
        """Of two versions of a file the later one has the greater, unless the storage blade's clock was set back."""
        return self.ctime, self.mtime


ATTRIBUTES_BYTES = _ATTRIBUTES.size
VERSION_BYTES = _VERSION.size


def encode(path: str, second: str = "", a: int = 0, b: int = 0, c: int = 0, flags: int = 0, identity: int = 0) -> bytes:
    """A request's first part; OSError(ENAMETOOLONG) if a path is too long."""
    name, other = os.fsencode(path), os.fsencode(second)
    if len(name) > MAX_PATH or len(other) > MAX_PATH:
        raise OSError(errno.ENAMETOOLONG, "path too long")
    return _REQUEST.pack(identity, a & _U64, b & _U64, c & _U64, flags, len(name)) + name + other


def decode(data: bytes | memoryview) -> Request:
    """The request in a message's first part; OSError(EBADMSG) if it is malformed."""
    if len(data) < _REQUEST.size:
        raise OSError(errno.EBADMSG, "short request")
    identity, a, b, c, flags, length = _REQUEST.unpack_from(data)
    paths = bytes(data[_REQUEST.size :])
    if length > len(paths) or b"\0" in paths:
        raise OSError(errno.EBADMSG, "malformed paths")
    return Request(identity, a, b, c, flags, os.fsdecode(paths[:length]), os.fsdecode(paths[length:]))


def signed(value: int) -> int:
    """A number of a request as the signed one it was."""
    return value - (1 << 64) if value >> 63 else value


def pack_attributes(stat: os.stat_result, identity: int) -> bytes:
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
        identity,
    )


def unpack_attributes(data: bytes | memoryview, offset: int = 0) -> Attributes:
    """Attributes from the wire."""
    return Attributes(*_ATTRIBUTES.unpack_from(data, offset))


def version_of(known: os.stat_result | Attributes) -> Version:
    """The version that attributes tell."""
    if isinstance(known, Attributes):
        return Version(known.size, known.mtime, known.ctime)
    return Version(known.st_size, known.st_mtime_ns, known.st_ctime_ns)


def unpack_version(data: bytes | memoryview, offset: int = 0) -> Version:
    """A version from the wire."""
    return Version(*_VERSION.unpack_from(data, offset))


def repack_attributes(attributes: Attributes) -> bytes:
    """Attributes as they came: a fifth of the memory."""
    return _ATTRIBUTES.pack(*attributes)


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
