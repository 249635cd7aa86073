"""The files of another storage blade come here, while programs use them there.

They are copied into a folder that programs do not see: once, and what has changed meanwhile again, until a look brings
little that is new (`fetch`). Then the other blade keeps still (hold.py), what is left is copied, and all files get
their names (`publish`). Whether they are the ones that count from then on, the manager says: if not, they go again.

What a file is known by (identity) comes with it, so programs that have it open go on. Owners, modes, times, holes, and
hard links are as they were; inode numbers are this disk's.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import stat
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from guest_agents.splitkernel.storage import wire
from guest_agents.splitkernel.storage.confine import check, keep_identity
from guest_agents.splitkernel.storage.hold import write
from guest_agents.splitkernel.storage.wire import Attributes, Op
from guest_agents.verbs.lost import Caller

QUIET_SECONDS = 5.0
"""A look that takes no longer may be the last but one: as long, or so, programs will wait for the last."""
LOOKS = 5
"""Then the last one comes, however much changes: it has a deadline."""
OWN = ("lost+found",)
"""Names in the root that are the file system's."""
_ARRIVING, _PUBLISHED = ".from.", "published"
_LOOK_NAMES = 1000
_GONE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE, errno.ENXIO, errno.EISDIR, errno.EINVAL}
_AT_FDCWD, _NOREPLACE = -100, 1
_libc = ctypes.CDLL(None, use_errno=True)


class LateError(OSError):
    """The last look would have taken too long."""


class Arrival:
    """The files of the blade `source` on their way here.

    root -- where they shall be; `caller` asks the other blade's file service, held or not
    """

    def __init__(self, root: Path, source: str, caller: Caller) -> None:
        self._root = root
        self._caller = caller
        self.stage = root / wire.ATTIC / f"{_ARRIVING}{source}"
        self._objects = self.stage / "objects"
        self._have: dict[int, Attributes] = {}
        self._found: list[tuple[str, Attributes]] = []
        self.copied = 0
        """Bytes, holes not counted."""
        self.looks = 0
        self.seconds = 0.0
        """Of the last look that is over."""
        self._steps = self._fetching()
        self.stage.parent.mkdir(mode=0o700, exist_ok=True)
        self._objects.mkdir(parents=True)

    def fetch(self, seconds: float) -> bool:
        """Copy for about so long; True when it is time to publish. OSError when this disk is full, or it fails."""
        deadline = time.monotonic() + seconds
        while not self._ready() and time.monotonic() < deadline:
            next(self._steps)
        return self._ready()

    def publish(self, token: str, seconds: float) -> None:
        """Bring what is left, and give all files their names; all is on the disk then. The source must be held.

        LateError when it takes longer than `seconds`; OSError, FileExistsError when a name is taken here. `withdraw`
        must follow these.
        """
        deadline = time.monotonic() + seconds
        for _ in self._look():
            if time.monotonic() > deadline:
                raise LateError(errno.ETIME, "too much has changed since it was copied")
        self._build()
        _sync(self.stage)
        tree = self.stage / "tree"
        names = [name for name in os.listdir(tree) if name != wire.ATTIC]
        names += [str(path.relative_to(tree)) for path in tree.glob(f"{wire.ATTIC}/*/*")]
        for name in names:
            if os.path.lexists(self._root / name):
                raise FileExistsError(errno.EEXIST, "there is one here already", name)
        if time.monotonic() > deadline:
            raise LateError(errno.ETIME, "too many files")
        write(self.stage / _PUBLISHED, json.dumps({"token": token, "names": names}))
        for folder in (tree / wire.ATTIC).glob("*"):  # of processor blades: who has made one believes that it is there
            (self._root / wire.ATTIC / folder.name).mkdir(mode=0o700, exist_ok=True)
        for name in names:
            _rename(tree / name, self._root / name)
        _sync(self.stage)

    def _ready(self) -> bool:
        return self.looks >= LOOKS or (self.looks > 0 and self.seconds < QUIET_SECONDS)

    def _fetching(self) -> Iterator[None]:
        while True:
            begun = time.monotonic()
            yield from self._look()
            self.looks, self.seconds = self.looks + 1, time.monotonic() - begun
            yield  # there may have been nothing to look at

    def _look(self) -> Iterator[None]:
        """Look at all files, and copy those that are new or have changed; in steps of a request or a few."""
        found: list[tuple[str, Attributes]] = []
        for path, attributes in self._walk():
            found.append((path, attributes))
            known = self._have.get(attributes.identity)
            if not stat.S_ISDIR(attributes.mode) and (known is None or _state(known) != _state(attributes)):
                self._have.pop(attributes.identity, None)
                try:
                    yield from self._copy(path, attributes)
                except OSError as failure:
                    if failure.errno not in _GONE:
                        raise  # else it has changed while it was copied: the next look will tell
            yield
        self._found = found
        for identity in self._have.keys() - {attributes.identity for _, attributes in found}:
            del self._have[identity]
            self._object(identity).unlink()

    def _walk(self) -> Iterator[tuple[str, Attributes]]:
        """Everything there, each folder before what is in it."""
        folders = [""]
        while folders:
            folder = folders.pop()
            try:
                names = self._names(folder)
                for start in range(0, len(names), _LOOK_NAMES):
                    some = names[start : start + _LOOK_NAMES]
                    found = self._ask(Op.LOOK, folder, data=b"".join(name + b"\0" for name in some))
                    for place, name in enumerate(some):
                        attributes = wire.unpack_attributes(found, place * wire.ATTRIBUTES_BYTES)
                        path = f"{folder}/{os.fsdecode(name)}".lstrip("/")
                        if not attributes.mode or path in OWN or path.startswith(f"{wire.ATTIC}/."):
                            continue
                        if stat.S_ISDIR(attributes.mode):
                            folders.append(path)
                        yield path, attributes
            except OSError as failure:
                if failure.errno not in _GONE:
                    raise

    def _names(self, folder: str) -> list[bytes]:
        names: list[bytes] = []
        while more := wire.unpack_entries(self._ask(Op.READDIR, folder, os.fsdecode(names[-1]) if names else "")):
            names += [name for _, _, name in more]
        return names

    def _copy(self, path: str, attributes: Attributes) -> Iterator[None]:
        """Make it here, under its identity. OSError(ESTALE) if it changes meanwhile."""
        here = self._object(attributes.identity)
        here.unlink(missing_ok=True)
        kind = stat.S_IFMT(attributes.mode)
        if kind == stat.S_IFLNK:
            os.symlink(self._ask(Op.READLINK, path, identity=attributes.identity), os.fsencode(here))
        else:
            os.mknod(here, kind | 0o600)
        if kind == stat.S_IFREG:
            yield from self._copy_data(path, attributes, here)
        _dress(here, attributes)
        self._have[attributes.identity] = attributes

    def _copy_data(self, path: str, attributes: Attributes, here: Path) -> Iterator[None]:
        version = wire.version_of(attributes)
        with here.open("r+b", buffering=0) as out:

            def take(head: memoryview, data: memoryview) -> int:
                if wire.unpack_version(head) != version:
                    raise OSError(errno.ESTALE, "it changes", path)
                self.copied += len(data)
                return os.pwrite(out.fileno(), data, at)

            at = 0
            while at < attributes.size:
                try:
                    at = self._seek(path, attributes, at, os.SEEK_DATA)
                except OSError as failure:
                    if failure.errno != errno.ENXIO:
                        raise
                    break  # a hole up to the end
                end = self._seek(path, attributes, at, os.SEEK_HOLE)
                while at < end:
                    request = wire.encode(path, a=at, b=min(end - at, wire.MAX_REPLY), identity=attributes.identity)
                    done = int(self._caller.call(Op.READ, request, b"", take))
                    if not done:
                        raise OSError(errno.ESTALE, "it has become shorter", path)
                    at += done
                    yield
            out.truncate(attributes.size)

    def _seek(self, path: str, attributes: Attributes, at: int, whence: int) -> int:
        reply = self._ask(Op.SEEK, path, a=at, flags=whence, identity=attributes.identity)
        return int(wire.COUNT.unpack(reply)[0])

    def _build(self) -> None:
        """Make the tree, as it was last found, out of what was copied."""
        tree = self.stage / "tree"
        tree.mkdir()
        left = Counter(attributes.identity for _, attributes in self._found)
        for path, attributes in self._found:
            if stat.S_ISDIR(attributes.mode):
                (tree / path).mkdir(mode=0o700)
                continue
            if attributes.identity not in self._have:
                raise OSError(errno.ESTALE, "it changes though its blade is held", path)
            left[attributes.identity] -= 1
            if left[attributes.identity]:
                os.link(self._object(attributes.identity), tree / path, follow_symlinks=False)
            else:
                self._object(attributes.identity).rename(tree / path)
        for path, attributes in reversed(self._found):
            if stat.S_ISDIR(attributes.mode):
                _dress(tree / path, attributes)

    def _object(self, identity: int) -> Path:
        return self._objects / f"{identity:016x}"

    def _ask(
        self, op: Op, path: str, second: str = "", a: int = 0, flags: int = 0, identity: int = 0, data: bytes = b""
    ) -> bytes:
        request = wire.encode(path, second, a, flags=flags, identity=identity)
        return bytes(self._caller.call(op, request, data, lambda head, more: bytes(head) + bytes(more)) or b"")


def stages(root: Path) -> list[Path]:
    """Where files of other blades were on their way here."""
    return sorted((root / wire.ATTIC).glob(f"{_ARRIVING}*"))


def published(stage: Path) -> str | None:
    """The token of the move whose files have got their names, or were about to; None if none were."""
    return str(told["token"]) if (told := _told(stage)) else None


def withdraw(stage: Path) -> None:
    """Let go of what has come, and of the names that it has got: they do not count."""
    told = _told(stage)
    root, tree = stage.parents[1], stage / "tree"
    for name in told["names"] if told else []:
        if os.path.lexists(root / name) and not os.path.lexists(tree / name):
            _rename(root / name, tree / name)
    forget(stage)


def forget(stage: Path) -> None:
    """Let go of what is left of an arrival whose files have their names."""
    (stage / _PUBLISHED).unlink(missing_ok=True)  # last in `publish`, first here: a withdrawal that comes later is none
    shutil.rmtree(stage, ignore_errors=True)


def _told(stage: Path) -> Any:
    with suppress(FileNotFoundError):
        return json.loads((stage / _PUBLISHED).read_text())
    return None


def _state(of: Attributes) -> tuple[object, ...]:
    """What tells whether a file must be copied again; atime changes without ctime nowhere, as it is only ever set."""
    return (wire.version_of(of), of.mode, of.uid, of.gid)


def _dress(here: Path, attributes: Attributes) -> None:
    """Owner, mode, times and identity."""
    keep_identity(here, attributes.identity)
    os.chown(here, attributes.uid, attributes.gid, follow_symlinks=False)
    if not stat.S_ISLNK(attributes.mode):
        os.chmod(here, stat.S_IMODE(attributes.mode))
    os.utime(here, ns=(attributes.atime, attributes.mtime), follow_symlinks=False)


def _rename(old: Path, new: Path) -> None:
    """OSError(EEXIST) if there is a new one already."""
    check(_libc.renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), _NOREPLACE), str(new))


def _sync(where: Path) -> None:
    fd = os.open(where, os.O_RDONLY)
    try:
        check(_libc.syncfs(fd))
    finally:
        os.close(fd)
