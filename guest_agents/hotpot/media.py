"""Persistent memory of a node, behind the one seam where it will become a pmem device.

Bytes are written and read at once, but survive a crash only when `persist` has returned for their range. Nothing above
this file may assume more. This backend is an ordinary file that is mapped, and persisting is msync. So it can lose
data only with the kernel below it: a crash test on it proves nothing.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from guest_agents.hotpot.errors import NoSpace


class Folder:
    """Where the media of a node are, by name. All of Hotpot opens them here, so that tests can put others in place."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path = path

    def open(self, name: str, size: int, *, reserve: bool = True) -> Media:
        """Those of this name, made if there are none: then all zero. NoSpace."""
        return Media(self.path / name, size, reserve=reserve)

    def names(self) -> list[str]:
        """Those that are there, from whatever life."""
        return sorted(file.name for file in self.path.iterdir() if file.is_file())

    def remove(self, name: str) -> None:
        """Delete media that are not open."""
        (self.path / name).unlink(missing_ok=True)


class Media:
    """`size` bytes in a file, zero when it is new."""

    def __init__(self, path: Path, size: int, *, reserve: bool = True) -> None:
        """Open or make the file. `reserve`: take all of its space now. NoSpace."""
        self.path = path
        self.size = size
        old = path.exists()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            with self._room_for(size):
                os.ftruncate(self._file, size)
            if reserve:
                self.reserve(0, size)
            self._map = mmap.mmap(self._file, size)
        except BaseException:
            os.close(self._file)
            if not old:
                path.unlink()
            raise

    def reserve(self, offset: int, length: int) -> None:
        """Take the space of a range; without it, a store could find the device full, which is a SIGBUS. NoSpace."""
        with self._room_for(length):
            os.posix_fallocate(self._file, offset, length)

    def read(self, offset: int, length: int) -> bytes:
        """What was last written."""
        return self._map[offset : offset + length]

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Store; it may or may not survive a crash until `persist`. Other threads read all of it or nothing."""
        self._map[offset : offset + len(data)] = data

    def persist(self, offset: int, length: int) -> None:
        """Returns when a range survives a crash."""
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        self._map.flush(start, offset + length - start)

    def persist_all(self, ranges: Iterable[tuple[int, int]]) -> None:
        """The same for several (offset, length), in any order; neighbours are persisted together."""
        start = end = 0
        for offset, length in sorted(ranges):
            if offset > end:
                if end > start:
                    self.persist(start, end - start)
                start = offset
            end = offset + length
        if end > start:
            self.persist(start, end - start)

    @contextmanager
    def _room_for(self, length: int) -> Iterator[None]:
        try:
            yield
        except OSError as failure:
            if failure.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise NoSpace(f"{length} bytes for {self.path.name}: {failure.strerror}") from None

    def close(self) -> None:
        """Unmap; the file stays."""
        self._map.close()
        os.close(self._file)

    def remove(self) -> None:
        """Unmap and delete."""
        self.close()
        self.path.unlink(missing_ok=True)
