"""Persistent memory of a node, behind one seam: pieces of its pmem device, or files on a blade that has none.

Bytes are written and read at once, but survive a crash only when `persist` has returned for their range. Nothing above
this file may assume more. With a device that is so: a power failure takes all else (guest_agents/pmem.py). A file is
mapped, and persisting is msync: it can lose data only with the kernel below it, and a blade's files are in its memory,
so that a power failure takes them all. A crash test on files proves nothing.

Media are named by a path in both cases. Of each piece of a device there is an empty file there, for those who look what
media a folder has; all are made when the first of them is opened.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from guest_agents import pmem
from guest_agents.hotpot import steps
from guest_agents.hotpot.errors import Corrupt, NoSpace, VersionMismatch
from guest_agents.shelf import Damaged, Different, Foreign, Full, Piece, Shelf, begun

DEVICE = "pmem.json"
"""In a folder of media: on which device they are (pmem.Places). Without it, they are files."""
_OWN = {DEVICE, "pmem.lock"}


class Room(NamedTuple):
    """Of a device, bytes."""

    size: int
    free: int


class Folder:
    """Where the media of a node are, by name."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path = path

    def open(self, name: str, size: int, *, reserve: bool = True) -> Media:
        """Those of this name, made if there are none: then all zero. What Media raises."""
        return Media(self.path / name, size, reserve=reserve)

    def names(self) -> list[str]:
        """Those that are there, from whatever life. Corrupt, NoSpace: as Media."""
        with _using(self.path) as there:
            if there is not None:
                return sorted(there.names())
            return sorted(file.name for file in self.path.iterdir() if file.is_file() and file.name not in _OWN)

    def room(self) -> Room | None:
        """What the device has; None: there is none. Corrupt, NoSpace: as Media."""
        with _using(self.path) as there:
            return None if there is None else Room(there.size, there.size - there.used)

    def remove(self, name: str) -> None:
        """Delete media that are not open."""
        with _using(self.path) as there:
            if there is not None and (size := there.names().get(name)) is not None:
                there.open(name, size).remove()
            (self.path / name).unlink(missing_ok=True)


class Media:
    """`size` bytes under a path, zero when it is new."""

    def __init__(self, path: Path, size: int, *, reserve: bool = True) -> None:
        """Open or make it. `reserve`: take all of its space now. NoSpace; on a device also Corrupt, VersionMismatch."""
        self.path = path
        self.size = size
        there = _enter(path.parent)
        try:
            with _explained(path):
                new = there is None or path.name not in there.names()
                self._place: _File | Piece = _File(path, size) if there is None else there.open(path.name, size)
            try:
                if there is not None:
                    _show(path, size)
                if reserve:
                    self.reserve(0, size)
            except BaseException:
                if new:
                    self._place.remove()
                    path.unlink(missing_ok=True)
                raise
        except BaseException:
            _leave(path.parent)
            raise

    def reserve(self, offset: int, length: int) -> None:
        """Take the space of a range; without it, a store could find the device full, which is a SIGBUS. NoSpace."""
        with _explained(self.path):
            self._place.reserve(offset, length)

    def release(self, offset: int, length: int) -> None:
        """Give back the space of whole units (shelf.UNIT) of zeros; they can be reserved again."""
        self._place.release(offset, length)

    def read(self, offset: int, length: int) -> bytes:
        """What was last written."""
        return self._place.read(offset, length)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Store; it may or may not survive a crash until `persist`. Other threads read all of it or nothing."""
        with _explained(self.path):
            self._place.write(offset, data)

    def persist(self, offset: int, length: int) -> None:
        """Returns when a range survives a crash."""
        steps.at("persist", self.path.name)
        self._place.persist(offset, length)

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

    def close(self) -> None:
        """Unmap; what is there stays."""
        if isinstance(self._place, _File):
            self._place.close()
        _leave(self.path.parent)

    def remove(self) -> None:
        """Unmap and delete."""
        self._place.remove()
        self.path.unlink(missing_ok=True)
        _leave(self.path.parent)


def use_pmem(folder: Path) -> None:
    """Have media in a folder on this blade's device. Safe to repeat."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DEVICE).unlink(missing_ok=True)
    (folder / DEVICE).symlink_to(pmem.FILE)


def holds(folder: Path, name: str) -> bool:
    """Whether an earlier life has left media of this name. What it looks at stays as it is, also a new device.

    After a power failure only the device can tell: the files that stand for its pieces are gone. Corrupt, NoSpace: as
    Media.
    """
    if (folder / name).exists():
        return True
    if _unfit(folder) is not None:
        return False
    with _explained(folder), pmem.Device((folder / DEVICE).resolve(), exclusive=False) as device:
        if not begun(device):
            return False
    return name in Folder(folder).names()


def backing(folder: Path) -> str:
    """What media in a folder are on: "pmem", or "files", and why if there is a device that is not used.

    As long as none is open, they would be on the device if its mode lets them; nobody looks what is on it.
    """
    with _lock:
        found = _folders.get(folder)
    if found is not None:
        return "pmem" if found.shelf is not None else " ".join(("files", found.why)).rstrip()
    why = _unfit(folder)
    return "pmem" if why is None else " ".join(("files", why)).rstrip()


class _File:
    """A mapped file."""

    def __init__(self, path: Path, size: int) -> None:
        new = not path.exists()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(self._file, size)
            self._map = mmap.mmap(self._file, size)
        except BaseException:
            os.close(self._file)
            if new:
                path.unlink()
            raise

    def reserve(self, offset: int, length: int) -> None:
        os.posix_fallocate(self._file, offset, length)

    def release(self, offset: int, length: int) -> None:
        pass  # it is as long as the dataset

    def read(self, offset: int, length: int) -> bytes:
        return self._map[offset : offset + length]

    def write(self, offset: int, data: bytes | memoryview) -> None:
        self._map[offset : offset + len(data)] = data

    def persist(self, offset: int, length: int) -> None:
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        self._map.flush(start, offset + length - start)

    def close(self) -> None:
        self._map.close()
        os.close(self._file)

    remove = close


@dataclass
class _Folder:
    """What the media of a folder are on, while any of them is open."""

    shelf: Shelf | None
    why: str = ""
    users: int = 0


_folders: dict[Path, _Folder] = {}
_lock = threading.Lock()


def _enter(folder: Path) -> Shelf | None:
    """The shelf that a folder's media are on, for one of them more. Corrupt; NoSpace: others use it now."""
    with _lock:
        found = _folders.get(folder)
        if found is None:
            found = _folders[folder] = _opened(folder)
        found.users += 1
        return found.shelf


@contextmanager
def _using(folder: Path) -> Iterator[Shelf | None]:
    """The shelf of a folder's media, during the block."""
    there = _enter(folder)
    try:
        yield there
    finally:
        _leave(folder)


def _leave(folder: Path) -> None:
    with _lock:
        found = _folders[folder]
        found.users -= 1
        if not found.users:
            del _folders[folder]
            if found.shelf is not None:
                found.shelf.close()


def _opened(folder: Path) -> _Folder:
    if (why := _unfit(folder)) is not None:
        return _Folder(None, why)
    file = (folder / DEVICE).resolve()
    with _explained(folder):
        device = pmem.open_device(file)
        try:
            shelf = Shelf(device)
        except Foreign as failure:
            device.close()
            return _Folder(None, f"({failure.message})")
        except BaseException:
            device.close()
            raise
    for name, size in shelf.names().items():
        _show(folder / name, size)
    return _Folder(shelf)


def _unfit(folder: Path) -> str | None:
    """Why media in a folder are files; None if they are on a device."""
    file = (folder / DEVICE).resolve()
    if not file.exists():
        return ""
    mode = pmem.Places.load(file).mode
    return None if mode == "devdax" else f"(its pmem is in mode {mode})"  # it was given to other programs


def _show(path: Path, size: int) -> None:
    """The empty file of a piece."""
    with path.open("ab") as file, suppress(OSError):  # larger than files can be: it need not have the size
        file.truncate(size)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Errors of files and devices in Hotpot's words."""
    try:
        yield
    except OSError as failure:
        if failure.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise NoSpace(f"{path.name}: {failure.strerror}") from None
    except Full as failure:
        raise NoSpace(f"{path.name}: {failure.message}") from None
    except Damaged as failure:
        raise Corrupt(failure.message, hint="the device is left as it is; nothing of it was used") from None
    except Different as failure:
        raise VersionMismatch(failure.message) from None
    except pmem.PmemError as failure:
        raise NoSpace(failure.message, hint=failure.hint) from None
