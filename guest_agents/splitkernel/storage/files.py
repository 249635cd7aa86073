"""The file service: each request of wire.py carried out below one directory."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from guest_agents.splitkernel.opcodes import Tally, storage_name
from guest_agents.splitkernel.storage import wire
from guest_agents.splitkernel.storage.confine import check, identity_of, opened, parent
from guest_agents.splitkernel.storage.kept import KeptFiles
from guest_agents.splitkernel.storage.wire import Op, Request

_KEEP = 0xFFFFFFFF
_AT_EMPTY_PATH = 0x1000
_UTIME_NOW, _UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2
_SECOND = 10**9
_FALLOCATE_MODES = 0x01 | 0x02 | 0x10  # KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE: what FUSE passes on
_libc = ctypes.CDLL(None, use_errno=True)


class Files:
    """Carries out requests; safe to call from several threads. Counts what it does in `counts`."""

    def __init__(self, root: Path) -> None:
        self._root = os.open(root, os.O_PATH | os.O_DIRECTORY)
        self._kept = KeptFiles(self._root)
        self._naming = threading.Lock()
        """Held while a name is made or goes, so that a new file gets its owner before anybody finds it."""
        self.counts = {"requests": 0, "bytes_in": 0, "bytes_out": 0}
        self.tally = Tally()
        self._answers: dict[int, Callable[[Request], bytes]] = {
            Op.GETATTR: self._getattr,
            Op.CREATE: self._create,
            Op.OPEN: self._open,
            Op.TRUNCATE: lambda r: self._change(r, lambda fd: os.ftruncate(fd, r.a)),
            Op.RENAME: self._rename,
            Op.UNLINK: self._unlink,
            Op.MKDIR: self._mkdir,
            Op.RMDIR: self._rmdir,
            Op.STATFS: self._statfs,
            Op.FSYNC: self._fsync,
            Op.SYMLINK: self._symlink,
            Op.READLINK: self._readlink,
            Op.CHMOD: self._chmod,
            Op.CHOWN: self._chown,
            Op.UTIMENS: self._utimens,
            Op.LINK: self._link,
            Op.FALLOCATE: self._fallocate,
            Op.SEEK: self._seek,
        }

    def handle(self, opcode: int, first: memoryview, second: memoryview, out: memoryview) -> tuple[int, int]:
        """One request of the RPC service; writes the reply into `out` and returns the lengths of its two parts."""
        request = wire.decode(first)
        self.counts["requests"] += 1
        self.tally.add(storage_name(opcode))
        try:
            match opcode:
                case Op.READ:
                    return wire.VERSION_BYTES, self._read(request, out)
                case Op.READDIR:
                    return 0, self._readdir(request, out)
                case Op.LOOK:
                    return 0, self._look(request, bytes(second), out)
                case Op.WRITE:
                    reply = self._write(request, second)
                case _ if opcode in self._answers:
                    reply = self._answers[opcode](request)
                case _:
                    raise OSError(errno.ENOSYS, f"unknown request {opcode}")
        except (OverflowError, ValueError) as failure:  # a number that no system call takes
            raise OSError(errno.EINVAL, str(failure)) from failure
        out[: len(reply)] = reply
        return len(reply), 0

    def statfs(self) -> os.statvfs_result:
        """Of the file system that holds the root."""
        return os.statvfs(f"/proc/self/fd/{self._root}")

    # -- data --

    def _read(self, r: Request, out: memoryview) -> int:
        head = wire.VERSION_BYTES
        with self._kept.file(r.path, r.identity) as file:
            with file.lock:  # in the middle of a change it could be that of after, and the data of before
                out[:head] = wire.version_of(os.fstat(file.fd)).pack()
            # Should a write come in between, then nobody knows this version much longer.
            count = os.preadv(file.fd, [out[head : head + min(r.b, wire.MAX_REPLY, len(out) - head)]], r.a)
        self.counts["bytes_out"] += count
        return count

    def _write(self, r: Request, data: memoryview) -> bytes:
        with self._kept.file(r.path, r.identity) as file, file.changing() as change:
            status = change.before
            at = status.st_size if r.flags & os.O_APPEND else r.a
            done = 0
            while done < len(data):
                try:
                    done += os.pwrite(file.fd, data[done:], at + done)
                except OSError:
                    if not done:
                        raise
                    break  # what fitted was written; the next write says why no more
            dropped = bool(r.flags & wire.DROP_SUID) and _drop_suid(file.fd, status.st_mode)
        self.counts["bytes_in"] += done
        versions = wire.version_of(change.before).pack() + wire.version_of(change.after).pack()
        return wire.WRITTEN.pack(done, at, dropped) + versions

    def _open(self, r: Request) -> bytes:
        if r.flags & os.O_TRUNC:
            return self._change(r, lambda fd: os.ftruncate(fd, 0))
        with self._kept.file(r.path, r.identity) as file:
            return wire.pack_attributes(os.fstat(file.fd), file.identity)

    def _fallocate(self, r: Request) -> bytes:
        if r.flags & ~_FALLOCATE_MODES:
            raise OSError(errno.EOPNOTSUPP, "fallocate", r.path)
        offset, length = (ctypes.c_int64(wire.signed(value)) for value in (r.a, r.b))
        return self._change(r, lambda fd: check(_libc.fallocate(fd, r.flags, offset, length), r.path))

    def _change(self, r: Request, change: Callable[[int], object]) -> bytes:
        with self._kept.file(r.path, r.identity) as file:
            with file.changing():
                change(file.fd)
            return wire.pack_attributes(os.fstat(file.fd), file.identity)

    def _seek(self, r: Request) -> bytes:
        if r.flags not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(errno.EINVAL, "whence", r.path)
        with self._kept.file(r.path, r.identity) as file, file.lock:
            return wire.COUNT.pack(os.lseek(file.fd, wire.signed(r.a), r.flags))

    def _fsync(self, r: Request) -> bytes:
        with self._named(r) as look:
            directory = stat.S_ISDIR(os.fstat(look).st_mode)
            if directory:
                with opened(look, "", os.O_RDONLY | os.O_DIRECTORY) as fd:
                    os.fsync(fd)
        if not directory:
            with self._kept.file(r.path, r.identity) as file:
                (os.fdatasync if r.flags & 1 else os.fsync)(file.fd)
        return b""

    # -- directories --

    def _readdir(self, r: Request, out: memoryview) -> int:
        with self._named(r) as look, opened(look, "", os.O_RDONLY | os.O_DIRECTORY) as fd, os.scandir(fd) as entries:
            after = os.fsencode(r.second)
            listing = sorted((name, entry) for entry in entries if (name := os.fsencode(entry.name)) > after)
            used = 0
            for name, entry in listing:
                packed = wire.pack_entry(entry.inode(), _kind(entry), name)
                if used + len(packed) > min(len(out), wire.MAX_REPLY):
                    break
                out[used : used + len(packed)] = packed
                used += len(packed)
        return used

    def _look(self, r: Request, names: bytes, out: memoryview) -> int:
        used = 0
        with self._named(r) as directory:
            for name in names.split(b"\0")[:-1]:
                if used + wire.ATTRIBUTES_BYTES > min(len(out), wire.MAX_REPLY):
                    raise OSError(errno.EINVAL, "too many names", r.path)
                attributes = bytes(wire.ATTRIBUTES_BYTES)
                with suppress(FileNotFoundError), opened(directory, os.fsdecode(name)) as fd:
                    attributes = _attributes(fd)
                out[used : used + len(attributes)] = attributes
                used += len(attributes)
        return used

    # -- names --

    def _create(self, r: Request) -> bytes:
        kind, mode = stat.S_IFMT(r.a), stat.S_IMODE(r.a)
        if kind not in (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK):
            raise OSError(errno.EPERM, "no devices", r.path)
        with self._naming, parent(self._root, r.path) as (directory, name):
            os.mknod(name, kind | 0o600, dir_fd=directory)
            with _undo(lambda: os.unlink(name, dir_fd=directory)), opened(directory, name) as fd:
                _own(directory, fd, r.b, r.c)
                os.chmod(f"/proc/self/fd/{fd}", mode)
                return _attributes(fd)

    def _mkdir(self, r: Request) -> bytes:
        with self._naming, parent(self._root, r.path) as (directory, name):
            os.mkdir(name, 0o700, dir_fd=directory)
            with _undo(lambda: os.rmdir(name, dir_fd=directory)), opened(directory, name) as fd:
                inherited = os.fstat(fd).st_mode & stat.S_ISGID
                _own(directory, fd, r.b, r.c)
                os.chmod(f"/proc/self/fd/{fd}", stat.S_IMODE(r.a) | inherited)
                return _attributes(fd)

    def _symlink(self, r: Request) -> bytes:
        with self._naming, parent(self._root, r.path) as (directory, name):
            os.symlink(r.second, name, dir_fd=directory)
            with _undo(lambda: os.unlink(name, dir_fd=directory)), opened(directory, name) as fd:
                _own(directory, fd, r.b, r.c)
                return _attributes(fd)

    def _link(self, r: Request) -> bytes:
        with self._naming, self._named(r) as old, parent(self._root, r.second) as (directory, name):
            os.link(f"/proc/self/fd/{old}", name, dst_dir_fd=directory, follow_symlinks=True)
            return _attributes(old)

    def _rename(self, r: Request) -> bytes:
        if r.flags not in (0, wire.RENAME_NOREPLACE, wire.RENAME_EXCHANGE):
            raise OSError(errno.EINVAL, "flags of rename", r.path)
        with self._naming, parent(self._root, r.path) as (old, name), parent(self._root, r.second) as (new, new_name):
            self._kept.forget(r.path)
            self._kept.forget(r.second)
            check(_libc.renameat2(old, os.fsencode(name), new, os.fsencode(new_name), r.flags), r.path)
        return b""

    def _unlink(self, r: Request) -> bytes:
        with self._naming, parent(self._root, r.path) as (directory, name):
            self._kept.forget(r.path)
            os.unlink(name, dir_fd=directory)
        return b""

    def _rmdir(self, r: Request) -> bytes:
        with self._naming, parent(self._root, r.path) as (directory, name):
            os.rmdir(name, dir_fd=directory)
        return b""

    # -- attributes --

    @contextmanager
    def _named(self, r: Request) -> Iterator[int]:
        """An O_PATH descriptor of what a request is about; OSError(ESTALE) if its path means another file now."""
        with opened(self._root, r.path) as fd:
            if r.identity and identity_of(fd, os.fstat(fd).st_ino) != r.identity:
                raise OSError(errno.ESTALE, "another file has this name now", r.path)
            yield fd

    def _getattr(self, r: Request) -> bytes:
        with opened(self._root, r.path) as fd:
            status = os.fstat(fd)
            identity = identity_of(fd, status.st_ino)
        if r.identity not in (0, identity):
            raise OSError(errno.ESTALE, "another file has this name now", r.path)
        return wire.pack_attributes(status, identity)

    def _statfs(self, r: Request) -> bytes:
        del r
        s = self.statfs()
        return wire.STATFS.pack(s.f_frsize, s.f_blocks, s.f_bfree, s.f_bavail, s.f_files, s.f_ffree, s.f_namemax)

    def _readlink(self, r: Request) -> bytes:
        with self._named(r) as fd:
            return os.fsencode(os.readlink("", dir_fd=fd))

    def _chmod(self, r: Request) -> bytes:
        with self._named(r) as fd:
            if stat.S_ISLNK(os.fstat(fd).st_mode):
                raise OSError(errno.EOPNOTSUPP, "a symbolic link has no mode", r.path)
            os.chmod(f"/proc/self/fd/{fd}", stat.S_IMODE(r.a))
            return _attributes(fd)

    def _chown(self, r: Request) -> bytes:
        uid, gid = (-1 if value == _KEEP else value for value in (r.a, r.b))
        with self._named(r) as fd:
            os.chown(f"/proc/self/fd/{fd}", uid, gid)
            return _attributes(fd)

    def _utimens(self, r: Request) -> bytes:
        atime = _timespec(r.a, r.flags & wire.SET_ATIME, r.flags & wire.SET_ATIME_NOW)
        mtime = _timespec(r.b, r.flags & wire.SET_MTIME, r.flags & wire.SET_MTIME_NOW)
        with self._named(r) as fd:
            check(_libc.utimensat(fd, b"", atime + mtime, _AT_EMPTY_PATH), r.path)
            return _attributes(fd)


@contextmanager
def _undo(remove: Callable[[], None]) -> Iterator[None]:
    """Remove a file that could not be made whole: full disks and quotas leave nothing half-made."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            remove()
        raise


def _attributes(fd: int) -> bytes:
    status = os.fstat(fd)
    return wire.pack_attributes(status, identity_of(fd, status.st_ino))


def _own(directory: int, fd: int, uid: int, gid: int) -> None:
    """Give a new file its owner; its group is the directory's if that one is set-group-ID (inode(7))."""
    if os.geteuid() == 0:
        inherits = os.fstat(directory).st_mode & stat.S_ISGID
        os.chown(f"/proc/self/fd/{fd}", uid, -1 if inherits else gid)


def _drop_suid(fd: int, mode: int) -> bool:
    """As the kernel does on a write; true if there was something to drop."""
    drop = mode & stat.S_ISUID | (mode & stat.S_ISGID if mode & stat.S_IXGRP else 0)
    if drop:
        os.fchmod(fd, stat.S_IMODE(mode) & ~drop)
    return bool(drop)


def _timespec(nanoseconds: int, given: int, now: int) -> bytes:
    if now:
        return struct.pack("<qq", 0, _UTIME_NOW)
    if not given:
        return struct.pack("<qq", 0, _UTIME_OMIT)
    return struct.pack("<qq", *divmod(wire.signed(nanoseconds), _SECOND))


def _kind(entry: os.DirEntry[str]) -> int:
    """d_type: the type bits of the mode. Of the usual three the directory itself knows them."""
    if entry.is_symlink():
        return stat.S_IFLNK >> 12
    if entry.is_dir(follow_symlinks=False):
        return stat.S_IFDIR >> 12
    if entry.is_file(follow_symlinks=False):
        return stat.S_IFREG >> 12
    with suppress(OSError):
        return stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode) >> 12
    return 0
