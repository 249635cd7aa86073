"""Random file operations, done to /vnode and to a local directory: whatever a program can see must be the same.

In the manner of fsx and fsstress. After each step the results or errnos of both sides are compared, and what `stat`
and reading tell of the files it was about; now and then, the whole trees. Some steps are done as an ordinary user, so
that permissions count. A seed makes the same steps again:

    RACKLESS_FSX_SEED=7 RACKLESS_FSX_STEPS=200000 pytest tests/unit/test_vnode_random.py
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import stat
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = [f"n{number}" for number in range(6)]
MOST_BYTES = 96 << 10
SLOTS = 6
USERS = [0, 0, 0, 1234, 4321]
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)


class Side:
    """One of the two directories. Every operation is a method; paths are relative to its root."""

    def __init__(self, root: Path) -> None:
        self.root = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        self.open_files: dict[int, int] = {}

    def close(self) -> None:
        for fd in [self.root, *self.open_files.values()]:
            os.close(fd)
        self.open_files.clear()

    @contextmanager
    def _file(self, path: str, flags: int, mode: int = 0o666) -> Iterator[int]:
        fd = os.open(path, flags | os.O_NONBLOCK, mode, dir_fd=self.root)
        try:
            yield fd
        finally:
            os.close(fd)

    def open(self, slot: int, path: str, flags: int, mode: int) -> int:
        fd = os.open(path, flags | os.O_NONBLOCK, mode, dir_fd=self.root)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)  # FUSE is not told who has a FIFO open: removed, it can only be looked at
            return 1
        if slot in self.open_files:
            os.close(self.open_files[slot])
        self.open_files[slot] = fd
        return 0

    def close_file(self, slot: int) -> None:
        os.close(self._slot(slot))
        del self.open_files[slot]

    def _slot(self, slot: int) -> int:
        if slot not in self.open_files:
            raise OSError(errno.EBADF, "")
        return self.open_files[slot]

    def write(self, path: str, flags: int, mode: int, offset: int, data: bytes) -> int:
        with self._file(path, flags, mode) as fd:
            return os.pwrite(fd, data, offset)

    def append(self, path: str, data: bytes) -> int:
        with self._file(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT) as fd:
            return os.write(fd, data)

    def replace(self, path: str, data: bytes) -> None:
        """As editors save."""
        with self._file(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as fd:
            os.write(fd, data)
        os.rename(f"{path}.new", path, src_dir_fd=self.root, dst_dir_fd=self.root)

    def read(self, path: str, offset: int, size: int) -> bytes:
        with self._file(path, os.O_RDONLY) as fd:
            return os.pread(fd, size, offset)

    def truncate(self, path: str, size: int) -> None:
        with self._file(path, os.O_WRONLY) as fd:
            os.ftruncate(fd, size)

    def slot_write(self, slot: int, offset: int, data: bytes) -> int:
        return os.pwrite(self._slot(slot), data, offset)

    def slot_read(self, slot: int, offset: int, size: int) -> bytes:
        return os.pread(self._slot(slot), size, offset)

    def slot_stat(self, slot: int) -> tuple[int, ...]:
        return _told(os.fstat(self._slot(slot)))

    def slot_truncate(self, slot: int, size: int) -> None:
        os.ftruncate(self._slot(slot), size)

    def slot_sync(self, slot: int, data_only: bool) -> None:
        (os.fdatasync if data_only else os.fsync)(self._slot(slot))

    def slot_chmod(self, slot: int, mode: int) -> None:
        os.fchmod(self._slot(slot), mode)

    def slot_map(self, slot: int, offset: int, data: bytes, sync: bool) -> bytes:
        fd = self._slot(slot)
        size = os.fstat(fd).st_size
        if not size:
            return b""
        with mmap.mmap(fd, size) as mapped:
            there = mapped[:]
            mapped[offset % size : offset % size + len(data)] = data[: size - offset % size]
            if sync:
                mapped.flush()
        return there

    def allocate(self, path: str, mode: int, offset: int, length: int) -> None:
        with self._file(path, os.O_RDWR) as fd:
            if _libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)) != 0:
                raise OSError(ctypes.get_errno(), "")

    def mkdir(self, path: str, mode: int) -> None:
        os.mkdir(path, mode, dir_fd=self.root)

    def mkfifo(self, path: str, mode: int) -> None:
        os.mkfifo(path, mode, dir_fd=self.root)

    def rmdir(self, path: str) -> None:
        os.rmdir(path, dir_fd=self.root)

    def unlink(self, path: str) -> None:
        os.unlink(path, dir_fd=self.root)

    def rename(self, old: str, new: str, flags: int) -> None:
        if _libc.renameat2(self.root, old.encode(), self.root, new.encode(), flags) != 0:
            raise OSError(ctypes.get_errno(), "")

    def link(self, old: str, new: str) -> None:
        os.link(old, new, src_dir_fd=self.root, dst_dir_fd=self.root, follow_symlinks=False)

    def symlink(self, path: str, target: str) -> None:
        os.symlink(target, path, dir_fd=self.root)

    def readlink(self, path: str) -> str:
        return os.readlink(path, dir_fd=self.root)

    def chmod(self, path: str, mode: int) -> None:
        os.chmod(path, mode, dir_fd=self.root)

    def chown(self, path: str, uid: int, gid: int) -> None:
        os.chown(path, uid, gid, dir_fd=self.root, follow_symlinks=False)

    def utime(self, path: str, atime: int, mtime: int) -> int:
        os.utime(path, ns=(atime, mtime), dir_fd=self.root, follow_symlinks=False)
        return os.stat(path, dir_fd=self.root, follow_symlinks=False).st_mtime_ns

    def access(self, path: str, mode: int) -> bool:
        return os.access(path, mode, dir_fd=self.root, effective_ids=True)

    def listdir(self, path: str) -> list[str]:
        with self._file(path or ".", os.O_RDONLY | os.O_DIRECTORY) as fd:
            return sorted(os.listdir(fd))

    def stat(self, path: str) -> tuple[int, ...]:
        return _told(os.stat(path, dir_fd=self.root, follow_symlinks=False))

    def all(self) -> dict[str, Any]:
        """Every file with its stat and contents."""
        found: dict[str, Any] = {}
        for folder, folders, files, fd in os.fwalk(".", dir_fd=self.root):
            for name in folders + files:
                status = os.stat(name, dir_fd=fd, follow_symlinks=False)
                content = b""
                if stat.S_ISREG(status.st_mode):
                    with open(os.open(name, os.O_RDONLY, dir_fd=fd), "rb") as file:
                        content = file.read()
                found[f"{folder}/{name}"] = *_told(status), content
        return found


def _told(status: os.stat_result) -> tuple[int, ...]:
    size = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
    return status.st_mode, status.st_nlink, status.st_uid, status.st_gid, size


@contextmanager
def _as_user(uid: int) -> Iterator[None]:
    """This thread's file operations are that user's."""
    if uid:
        _libc.setfsgid(uid)
        _libc.setfsuid(uid)
    try:
        yield
    finally:
        _libc.setfsuid(0)
        _libc.setfsgid(0)


Step = tuple[str, tuple[Any, ...]]


class Steps:
    """Makes up operations.

    files_only -- what other blades see at once: they may take a second to notice that a name is gone
    """

    def __init__(self, seed: int, files_only: bool = False) -> None:
        self.chance = random.Random(seed)
        self.files_only = files_only

    def _path(self) -> str:
        depth = 1 if self.files_only else self.chance.choice([1, 1, 2, 2, 3])
        return "/".join(self.chance.choice(NAMES) for _ in range(depth))

    def _data(self) -> bytes:
        return self.chance.randbytes(self.chance.choice([1, 100, 4096, 5000, 20000]))

    def _offset(self) -> int:
        return self.chance.randrange(MOST_BYTES)

    def _mode(self) -> int:
        return self.chance.choice([0o777, 0o666, 0o644, 0o600, 0o4755, 0o1777, 0o000])

    def _any_mode(self) -> int:
        # Not set-group-ID without execution by the group, which means nothing: FUSE lets a writer keep it.
        return self.chance.choice([0o777, 0o644, 0o640, 0o600, 0o4755, 0o2775, 0o6710, 0o1777, 0o000])

    def _flags(self) -> int:
        pick = self.chance.random
        flags = self.chance.choice([os.O_RDWR, os.O_RDWR, os.O_WRONLY])
        flags |= os.O_CREAT if pick() < 0.7 else 0
        flags |= os.O_EXCL if pick() < 0.15 and not self.files_only else 0
        flags |= os.O_TRUNC if pick() < 0.15 else 0
        return flags | (os.O_APPEND if pick() < 0.15 else 0)

    def next(self) -> Step:
        """An operation and its arguments."""
        c = self.chance
        many: list[tuple[int, str, Callable[[], tuple[Any, ...]]]] = [
            (9, "write", lambda: (self._path(), self._flags(), self._mode(), self._offset(), self._data())),
            (4, "append", lambda: (self._path(), self._data())),
            (6, "read", lambda: (self._path(), self._offset(), c.randrange(1, 30000))),
            (3, "truncate", lambda: (self._path(), self._offset())),
        ]
        if self.files_only:
            many += [(3, "replace", lambda: (self._path(), self._data()))]
        else:
            many += [
                (7, "open", lambda: (c.randrange(SLOTS), self._path(), self._flags(), self._mode())),
                (1, "close_file", lambda: (c.randrange(SLOTS),)),
                (5, "slot_write", lambda: (c.randrange(SLOTS), self._offset(), self._data())),
                (5, "slot_read", lambda: (c.randrange(SLOTS), self._offset(), c.randrange(1, 30000))),
                (4, "slot_stat", lambda: (c.randrange(SLOTS),)),
                (2, "slot_truncate", lambda: (c.randrange(SLOTS), self._offset())),
                (1, "slot_sync", lambda: (c.randrange(SLOTS), c.random() < 0.5)),
                (1, "slot_chmod", lambda: (c.randrange(SLOTS), self._any_mode())),
                (3, "slot_map", lambda: (c.randrange(SLOTS), self._offset(), self._data(), c.random() < 0.3)),
                (3, "allocate", lambda: (self._path(), c.choice([0, 1, 3, 0x10, 0x11]), self._offset(),
                                         c.randrange(0, 20000))),
                (5, "mkdir", lambda: (self._path(), c.choice([0o777, 0o777, 0o755, 0o2775, 0o1777, 0o700]))),
                (1, "mkfifo", lambda: (self._path(), self._mode())),
                (2, "rmdir", lambda: (self._path(),)),
                (5, "unlink", lambda: (self._path(),)),
                (6, "rename", lambda: (self._path(), self._path(),
                                       c.choice([0, 0, 0, RENAME_NOREPLACE, RENAME_EXCHANGE]))),
                (4, "link", lambda: (self._path(), self._path())),
                (2, "symlink", lambda: (self._path(), c.choice([self._path(), "n1", ".", "x" * 300, "n0/n1"]))),
                (1, "readlink", lambda: (self._path(),)),
                (3, "chmod", lambda: (self._path(), self._any_mode())),
                (3, "chown", lambda: (self._path(), c.choice([-1, 0, 1234, 4321]), c.choice([-1, 0, 1234, 4321]))),
                (2, "utime", lambda: (self._path(), c.randrange(-(10**18), 4 * 10**18),
                                      c.randrange(-(10**18), 4 * 10**18))),
                (2, "access", lambda: (self._path(), c.choice([os.R_OK, os.W_OK, os.X_OK]))),
                (3, "listdir", lambda: (self._path() if c.random() < 0.8 else "",)),
            ]  # fmt: skip
        _, name, arguments = c.choices(many, [weight for weight, _, _ in many])[0]
        return name, arguments()

    def user(self) -> int:
        """Whose operation it is."""
        return 0 if self.files_only else self.chance.choice(USERS)


def _outcome(side: Side, step: Step) -> Any:
    name, arguments = step
    try:
        return getattr(side, name)(*arguments)
    except OSError as failure:
        return f"errno {errno.errorcode[failure.errno or 0]}"


def compare(mounted: list[Path], local: Path, seed: int, steps: int) -> None:
    """Do `steps` random operations on both sides; AssertionError that tells how to see a difference again.

    mounted -- the mount, or several of one subtree: each step is then done on one of them
    """
    chance = Steps(seed, files_only=len(mounted) > 1)
    sides, oracle = [Side(path) for path in mounted], Side(local)
    recent: deque[tuple[int, Step]] = deque(maxlen=25)
    old_mask = os.umask(0o022)
    try:
        for number in range(steps):
            side, step, user = chance.chance.choice(sides), chance.next(), chance.user()
            os.umask(chance.chance.choice([0, 0o022, 0o077]))
            recent.append((user, step))
            with _as_user(user):
                got, wanted = _outcome(side, step), _outcome(oracle, step)
            _same(got, wanted, seed, number, recent)
            for path in step[1]:
                if not isinstance(path, str) or path in ("", "."):
                    continue  # the root of /vnode has a folder more, the attic: its link count tells
                if len(mounted) == 1:
                    looked = "stat", (path,)
                    _same(_outcome(side, looked), _outcome(oracle, looked), seed, number, recent, path)
                content = "read", (path, 0, 2 * MOST_BYTES)
                _same(_outcome(side, content), _outcome(oracle, content), seed, number, recent, path)
            if number % 1000 == 999 and len(mounted) == 1:
                _same(side.all(), oracle.all(), seed, number, recent, "everything")
    finally:
        os.umask(old_mask)
        for one in (*sides, oracle):
            one.close()


def _same(got: Any, wanted: Any, seed: int, number: int, recent: Any, what: str = "") -> None:
    if got == wanted:
        return
    lines = [f"  uid {user}: {name}{_short(arguments)}" for user, (name, arguments) in recent]
    if isinstance(got, dict) and isinstance(wanted, dict):
        different = [key for key in {*got, *wanted} if got.get(key) != wanted.get(key)]
        got, wanted = ({key: side.get(key) for key in different} for side in (got, wanted))
    raise AssertionError(
        f"seed {seed}, step {number}: {what} is {_short(got)}, and locally {_short(wanted)}, after\n" + "\n".join(lines)
    )


def _short(value: Any) -> str:
    if isinstance(value, bytes):
        return f"<{len(value)} bytes, {hash(value):x}>"
    if isinstance(value, tuple):
        return "(" + ", ".join(_short(one) for one in value) + ")"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_short(one)}" for key, one in sorted(value.items())) + "}"
    return repr(value)
