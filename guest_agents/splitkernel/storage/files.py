"""The file service: each request of wire.py carried out below one directory."""

from __future__ import annotations

import ctypes
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from guest_agents.splitkernel.storage import wire
from guest_agents.splitkernel.storage.confine import open_beneath, opened, parent
from guest_agents.splitkernel.storage.wire import Op, Request

KEPT_OPEN = 64
"""Files kept open between requests, so that a sequential read is not an open per request."""
_LOOK = os.O_PATH
_KEEP = 0xFFFFFFFF
_libc = ctypes.CDLL(None, use_errno=True)


class Files:
    """Carries out requests; safe to call from several threads. Counts what it does in `counts`."""

    def __init__(self, root: Path) -> None:
        self._root = os.open(root, os.O_PATH | os.O_DIRECTORY)
        self._open: OrderedDict[str, tuple[int, tuple[int, int]]] = OrderedDict()
        self._lock = threading.Lock()
        self.counts = {"requests": 0, "bytes_in": 0, "bytes_out": 0}

    def handle(
        self, opcode: int, first: memoryview, second: memoryview, out: memoryview
    ) -> tuple[int, int]:
        """One request of the RPC service; writes the reply into `out` and returns the lengths of its two parts."""
        request = wire.decode(first)
        self.counts["requests"] += 1
        if opcode == Op.READ:
            return 0, self._read(request, out)
        if opcode == Op.READDIR:
            return 0, self._readdir(request, out)
        reply = self._write(request, second) if opcode == Op.WRITE else self._other(opcode, request)
        out[: len(reply)] = reply
        return len(reply), 0

    def statfs(self) -> os.statvfs_result:
        """Of the file system that holds the root."""
        return os.statvfs(f"/proc/self/fd/{self._root}")

    # -- data --

    @contextmanager
    def _file(self, path: str) -> Iterator[int]:
        """A descriptor of a regular file, from those kept open if it still is the file of that name.

        The lock is held meanwhile: another thread must not close it. One blade has one disk, so little is lost.
        """
        with self._lock:
            with opened(self._root, path, _LOOK) as look:
                status = os.fstat(look)
            if stat.S_ISDIR(status.st_mode):
                raise OSError(21, "is a directory", path)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(22, "not a regular file", path)
            identity = status.st_dev, status.st_ino
            fd, known = self._open.pop(path, (-1, (0, 0)))
            if fd >= 0 and known != identity:
                os.close(fd)
                fd = -1
            if fd < 0:
                fd = open_beneath(self._root, path, os.O_RDWR)
            self._open[path] = fd, identity
            while len(self._open) > KEPT_OPEN:
                os.close(self._open.popitem(last=False)[1][0])
            yield fd

    def _forget(self, path: str) -> None:
        """Close what is kept open of `path` and below it: it is about to go, or to be another file."""
        with self._lock:
            for name in [n for n in self._open if n == path or n.startswith(path + "/")]:
                os.close(self._open.pop(name)[0])

    def _read(self, request: Request, out: memoryview) -> int:
        with self._file(request.path) as fd:
            count = os.preadv(fd, [out[: min(request.b, len(out))]], request.a)
        self.counts["bytes_out"] += count
        return count

    def _write(self, request: Request, data: memoryview) -> bytes:
        done = 0
        with self._file(request.path) as fd:
            while done < len(data):
                done += os.pwrite(fd, data[done:], request.a + done)
        self.counts["bytes_in"] += done
        return wire.COUNT.pack(done)

    def _readdir(self, request: Request, out: memoryview) -> int:
        with opened(self._root, request.path, os.O_RDONLY | os.O_DIRECTORY) as fd, os.scandir(fd) as entries:
            listing = sorted((os.fsencode(entry.name), entry.inode(), _kind(entry)) for entry in entries)
        used = 0
        for name, ino, kind in listing[request.a :]:
            packed = wire.pack_entry(ino, kind, name)
            if used + len(packed) > min(len(out), 1 << 20):
                break
            out[used : used + len(packed)] = packed
            used += len(packed)
        return used

    # -- everything else --

    def _other(self, opcode: int, r: Request) -> bytes:
        root = self._root
        match opcode:
            case Op.GETATTR:
                return self._attributes(r.path)
            case Op.CREATE:
                fd = open_beneath(root, r.path, os.O_CREAT | os.O_RDWR | (r.flags & os.O_EXCL), r.a & 0o7777)
                try:
                    _own(fd, r.b, r.c)
                    return wire.pack_attributes(os.fstat(fd))
                finally:
                    os.close(fd)
            case Op.OPEN:
                with self._file(r.path) as fd:
                    if r.flags & os.O_TRUNC:
                        os.ftruncate(fd, 0)
                    return wire.pack_attributes(os.fstat(fd))
            case Op.TRUNCATE:
                with self._file(r.path) as fd:
                    os.ftruncate(fd, r.a)
                    return wire.pack_attributes(os.fstat(fd))
            case Op.FSYNC:
                self._fsync(r)
                return b""
            case Op.STATFS:
                s = self.statfs()
                return wire.STATFS.pack(
                    s.f_frsize, s.f_blocks, s.f_bfree, s.f_bavail, s.f_files, s.f_ffree, s.f_namemax
                )
            case Op.READLINK:
                with parent(root, r.path) as (directory, name):
                    return os.fsencode(os.readlink(name, dir_fd=directory))
            case Op.RENAME:
                self._rename(r)
                return b""
            case Op.UNLINK:
                self._forget(r.path)
                with parent(root, r.path) as (directory, name):
                    os.unlink(name, dir_fd=directory)
                return b""
            case Op.RMDIR:
                with parent(root, r.path) as (directory, name):
                    os.rmdir(name, dir_fd=directory)
                return b""
            case Op.MKDIR:
                with parent(root, r.path) as (directory, name):
                    os.mkdir(name, r.a & 0o7777, dir_fd=directory)
                    os.chown(name, r.b, r.c, dir_fd=directory, follow_symlinks=False)
                return self._attributes(r.path)
            case Op.SYMLINK:
                with parent(root, r.path) as (directory, name):
                    os.symlink(r.second, name, dir_fd=directory)
                    os.chown(name, r.b, r.c, dir_fd=directory, follow_symlinks=False)
                return self._attributes(r.path)
            case Op.LINK:
                with parent(root, r.path) as (old, name), parent(root, r.second) as (new, new_name):
                    os.link(name, new_name, src_dir_fd=old, dst_dir_fd=new, follow_symlinks=False)
                return self._attributes(r.path)
            case Op.CHMOD:
                with opened(root, r.path, _LOOK) as fd:
                    if not stat.S_ISLNK(os.fstat(fd).st_mode):
                        os.chmod(f"/proc/self/fd/{fd}", r.a & 0o7777)
                return self._attributes(r.path)
            case Op.CHOWN:
                uid, gid = (-1 if value == _KEEP else value for value in (r.a, r.b))
                with opened(root, r.path, _LOOK) as fd:
                    os.chown(f"/proc/self/fd/{fd}", uid, gid)
                return self._attributes(r.path)
            case Op.UTIMENS:
                with parent(root, r.path) as (directory, name):
                    os.utime(name, ns=(r.a, r.b), dir_fd=directory, follow_symlinks=False)
                return self._attributes(r.path)
        raise OSError(38, f"unknown request {opcode}")

    def _attributes(self, path: str) -> bytes:
        with opened(self._root, path, _LOOK) as fd:
            return wire.pack_attributes(os.fstat(fd))

    def _fsync(self, r: Request) -> None:
        with opened(self._root, r.path, _LOOK) as look:
            directory = stat.S_ISDIR(os.fstat(look).st_mode)
        if directory:
            with opened(self._root, r.path, os.O_RDONLY) as fd:
                os.fsync(fd)
        else:
            with self._file(r.path) as fd:
                (os.fdatasync if r.flags & 1 else os.fsync)(fd)

    def _rename(self, r: Request) -> None:
        self._forget(r.path)
        self._forget(r.second)
        with parent(self._root, r.path) as (old, name), parent(self._root, r.second) as (new, new_name):
            arguments = old, os.fsencode(name), new, os.fsencode(new_name), r.flags
            if _libc.renameat2(*arguments) != 0:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number), r.path)


def _own(fd: int, uid: int, gid: int) -> None:
    if os.geteuid() == 0:
        os.fchown(fd, uid, gid)


def _kind(entry: os.DirEntry[str]) -> int:
    """d_type: 4 directory, 10 symbolic link, 8 regular file."""
    return 10 if entry.is_symlink() else 4 if entry.is_dir(follow_symlinks=False) else 8
