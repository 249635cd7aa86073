"""The kernel's FUSE protocol, spoken directly over /dev/fuse (Linux uapi, fuse.h, minor 38).

Direct, because start-up counts on an emulated blade (pyfuse3 brings trio: seconds) and because a READ's data then
goes from the RDMA buffer to the kernel in one writev. Only what /vnode uses is here.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from guest_agents.splitkernel.storage.wire import Attributes

MAX_DATA = 1 << 20
"""Largest READ or WRITE asked of us, bytes: one RPC message."""
READ_AHEAD_KIB = 4096
"""How far the kernel reads ahead of a sequential reader: several READs are then in flight."""
BLOCK_SIZE = 256 << 10
"""Preferred I/O size told to programs: stdio then writes in pieces worth a round trip."""
ROOT = 1


class Opcode(IntEnum):
    """Requests of the kernel that /vnode answers; all others get ENOSYS."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46


_IN = struct.Struct("<IIQQIIIHH")
_OUT = struct.Struct("<IiQ")
_INIT_OUT = struct.Struct("<IIIIHHIIHHI28x")
_NOTICE = struct.Struct("<IiQQqq")
_ATTR = struct.Struct("<3Q3q10I")
_ENTRY = struct.Struct("<4Q2I")
_ATTR_OUT = struct.Struct("<QII")
_DIRENT = struct.Struct("<QQII")
SETATTR_IN = struct.Struct("<IIQQQQQQIIIIIIII")
READ_IN = struct.Struct("<QQIIQII")
WRITE_IN = READ_IN
OPEN_OUT = struct.Struct("<QII")
WRITE_OUT = struct.Struct("<II")
STATFS_OUT = struct.Struct("<5Q4I24x")

FALLOCATE_IN = struct.Struct("<QQQII")
LSEEK_IN = struct.Struct("<QQII")

ASYNC_READ, ATOMIC_O_TRUNC, BIG_WRITES, AUTO_INVAL_DATA = 1 << 0, 1 << 3, 1 << 5, 1 << 12
DO_READDIRPLUS, READDIRPLUS_AUTO, PARALLEL_DIROPS = 1 << 13, 1 << 14, 1 << 18
MAX_PAGES, CACHE_SYMLINKS, INIT_EXT = 1 << 22, 1 << 23, 1 << 30
DIRECT_IO_ALLOW_MMAP = 1 << 36
DIRECT_IO, KEEP_CACHE = 1 << 0, 1 << 1
WRITE_CACHE = 1 << 0
"""In a WRITE: the kernel writes back a changed mapping, in nobody's name."""
_NOTIFY_INVAL_INODE = 2
VALID_SECONDS = 1
"""How long the kernel may believe names and attributes; another processor blade's changes show after that."""


class Call(NamedTuple):
    """One request of the kernel."""

    opcode: int
    unique: int
    node: int
    uid: int
    gid: int
    body: memoryview


def mount(where: Path) -> int:
    """Mount a FUSE file system at `where`; returns its descriptor. The kernel checks permissions by mode bits."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.umount2(os.fsencode(where), 2)  # MNT_DETACH what an agent that died left behind: one cannot even look at it
    where.mkdir(parents=True, exist_ok=True)
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other,max_read={MAX_DATA}"
    nosuid_nodev = 2 | 4
    if libc.mount(b"vnode", os.fsencode(where), b"fuse.vnode", nosuid_nodev, options.encode()) != 0:
        number = ctypes.get_errno()
        os.close(fd)
        raise OSError(number, os.strerror(number), str(where))
    return fd


def set_read_ahead(where: Path) -> None:
    """Raise the kernel's read-ahead. The mount table knows the device: `stat` would wait for a storage blade."""
    mounts = (line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines())
    device = next(fields[2] for fields in mounts if fields[4] == str(where))
    Path(f"/sys/class/bdi/{device}/read_ahead_kb").write_text(str(READ_AHEAD_KIB))


def receive(fd: int, buffer: bytearray) -> Call | None:
    """The next request; None when the file system has been unmounted."""
    while True:
        try:
            count = os.readv(fd, [buffer])
        except OSError as failure:
            if failure.errno == errno.ENODEV:
                return None
            if failure.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT):  # ENOENT: interrupted meanwhile
                continue
            raise
        _, opcode, unique, node, uid, gid, _, _, _ = _IN.unpack_from(buffer)
        return Call(opcode, unique, node, uid, gid, memoryview(buffer)[_IN.size : count])


def reply(fd: int, unique: int, *parts: bytes | memoryview) -> None:
    """Answer a request."""
    head = _OUT.pack(_OUT.size + sum(map(len, parts)), 0, unique)
    _send(fd, [head, *parts])


def reply_error(fd: int, unique: int, number: int) -> None:
    """Answer a request with an errno."""
    _send(fd, [_OUT.pack(_OUT.size, -number, unique)])


def distrust(fd: int, node: int, data: bool) -> None:
    """Have the kernel ask again for a file's attributes, and forget what it has read of it if `data`.

    Forgetting waits for READs and WRITEs of that file that are under way: not for a thread that answers those.
    """
    _send(fd, [_NOTICE.pack(_NOTICE.size, _NOTIFY_INVAL_INODE, 0, node, 0 if data else -1, 0)])


def _send(fd: int, parts: list[bytes | memoryview]) -> None:
    try:
        os.writev(fd, parts)
    except OSError as failure:
        if failure.errno not in (errno.ENOENT, errno.ENODEV):  # the caller was interrupted, or all is over
            raise


def init_reply(body: memoryview) -> bytes:
    """Answer to INIT: what of the kernel's offer is used.

    Not FUSE_WRITEBACK_CACHE: sizes and times would then be the kernel's, and several blades write. Neither locks:
    without FUSE_POSIX_LOCKS and FUSE_FLOCK_LOCKS the kernel keeps them itself, for the programs of this blade.
    """
    major, minor, _, offered = struct.unpack_from("<IIII", body)
    (more,) = struct.unpack_from("<I", body, 16) if offered & INIT_EXT else (0,)
    wanted = (
        ASYNC_READ | ATOMIC_O_TRUNC | BIG_WRITES | AUTO_INVAL_DATA | DO_READDIRPLUS | READDIRPLUS_AUTO
        | PARALLEL_DIROPS | MAX_PAGES | CACHE_SYMLINKS | INIT_EXT | DIRECT_IO_ALLOW_MMAP
    )  # fmt: skip
    flags = (offered | more << 32) & wanted
    pages = MAX_DATA // os.sysconf("SC_PAGE_SIZE")
    minor, read_ahead = min(minor, 38), READ_AHEAD_KIB << 10
    return _INIT_OUT.pack(major, minor, read_ahead, flags & 0xFFFFFFFF, 16, 12, MAX_DATA, 1, pages, 0, flags >> 32)


def attributes(a: Attributes) -> bytes:
    """struct fuse_attr."""
    seconds = [t // 10**9 for t in (a.atime, a.mtime, a.ctime)]
    rest = [t % 10**9 for t in (a.atime, a.mtime, a.ctime)]
    numbers = (a.mode, a.nlink, a.uid, a.gid, a.rdev, BLOCK_SIZE, 0)
    return _ATTR.pack(a.ino, a.size, a.blocks, *seconds, *rest, *numbers)


def entry(node: int, a: Attributes) -> bytes:
    """struct fuse_entry_out."""
    return _ENTRY.pack(node, 0, VALID_SECONDS, VALID_SECONDS, 0, 0) + attributes(a)


NO_ENTRY = bytes(_ENTRY.size + _ATTR.size)
"""In a READDIRPLUS: nothing is said about this file."""


def attributes_reply(a: Attributes) -> bytes:
    """struct fuse_attr_out."""
    return _ATTR_OUT.pack(VALID_SECONDS, 0, 0) + attributes(a)


def directory_entry(ino: int, offset: int, kind: int, name: bytes) -> bytes:
    """struct fuse_dirent, padded."""
    packed = _DIRENT.pack(ino, offset, len(name), kind) + name
    return packed + bytes(-len(packed) % 8)
