"""Files kept open between requests, so that a request is not an open and a close of its file."""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from guest_agents.splitkernel.storage.confine import identity_of, opened

KEPT_OPEN = 64
"""Most files kept open that nobody is using."""
_SECOND = 10**9


@dataclass
class Change:
    """A file's status before and after a change: nobody else has changed it in between."""

    before: os.stat_result
    after: os.stat_result


@dataclass
class Kept:
    """One open file. Whoever changes it or its position holds `lock`."""

    fd: int
    inode: tuple[int, int]
    identity: int
    users: int = 0
    dropped: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def changing(self) -> Iterator[Change]:
        """Change the contents: afterwards it has another mtime, and a later one.

        Clients keep what they have read while size and mtime stay the same, but the kernel's clock for mtime stands
        still for milliseconds: two writes could not be told apart.
        """
        with self.lock:
            status = os.fstat(self.fd)
            before = status.st_mtime_ns
            change = Change(status, status)
            yield change
            change.after = now = os.fstat(self.fd)
            if now.st_mtime_ns <= before < now.st_mtime_ns + _SECOND:  # later than that: somebody has set it
                os.utime(self.fd, ns=(now.st_atime_ns, max(time.time_ns(), before + 1)))
                change.after = os.fstat(self.fd)


class KeptFiles:
    """Regular files below a directory, by path; safe to use from several threads."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._files: OrderedDict[str, Kept] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def file(self, path: str, identity: int = 0) -> Iterator[Kept]:
        """The regular file that has this path now. OSError: EISDIR, EINVAL for other kinds, ESTALE if it is not the
        one with that identity."""
        kept = self._take(path)
        try:
            if identity not in (0, kept.identity):
                raise OSError(errno.ESTALE, "another file has this name now", path)
            yield kept
        finally:
            with self._lock:
                kept.users -= 1
                self._close_if_unused(kept)

    def forget(self, path: str) -> None:
        """Close what is kept open of `path` and below it: it is about to go, or to be another file."""
        with self._lock:
            for name in [n for n in self._files if n == path or n.startswith(path + "/")]:
                self._drop(name)

    def _take(self, path: str) -> Kept:
        with opened(self._root, path) as look:
            status = os.fstat(look)
            if not stat.S_ISREG(status.st_mode):
                number = errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL
                raise OSError(number, "not a regular file", path)
            inode = status.st_dev, status.st_ino
            with self._lock:
                kept = self._files.get(path)
                if kept is None or kept.inode != inode:
                    self._drop(path)
                    fd = os.open(f"/proc/self/fd/{look}", os.O_RDWR | os.O_CLOEXEC)  # the very file looked at
                    kept = self._files[path] = Kept(fd, inode, identity_of(fd, status.st_ino))
                kept.users += 1
                self._files.move_to_end(path)
                while len(self._files) > KEPT_OPEN:
                    self._drop(next(iter(self._files)))
        return kept

    def _drop(self, path: str) -> None:
        kept = self._files.pop(path, None)
        if kept is not None:
            kept.dropped = True
            self._close_if_unused(kept)

    def _close_if_unused(self, kept: Kept) -> None:
        if kept.dropped and not kept.users:
            os.close(kept.fd)
