"""A content-addressed store of built things: whole entries appear at once, or not at all.

An entry is a folder ``NAME`` (it ends in a content hash) that holds files and a manifest ``entry.json`` with
the size, SHA-256 and modification time of each. It is filled under a temporary name while a lock on its key
is held, and renamed when it is complete, so two builders do not collide and an interrupted one leaves nothing
that looks built. A file of another size than the manifest says means the entry is corrupt and is built again;
one with another time is read in full, and the same holds if its digest is wrong.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

MANIFEST = "entry.json"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path`` (made if missing) for the time of the block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if _names(path, handle.fileno()):
                yield
                return
        # Its file was removed while we waited (see `remove`): others will lock the one that is there now.


def remove(cache: Path, name: str) -> bool:
    """Remove the entry ``name``, what interrupted builders left of it, and its lock; False when a builder is at it."""
    lock = cache / f".{name}.lock"
    try:
        handle = lock.open("w")
    except FileNotFoundError:
        return True  # no such cache
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if not _names(lock, handle.fileno()):
            return False  # somebody else removed it just now, or builds it again
        for folder in (cache / name, *cache.glob(f".{name}.tmp*")):
            shutil.rmtree(folder, ignore_errors=True)
        lock.unlink()
    return True


def entries(cache: Path) -> list[str]:
    """Names of all entries, also of those that are only being built."""
    found = {path.name for path in cache.glob("[!.]*-*") if path.is_dir()}
    found |= {path.name[1:].removesuffix(".lock") for path in cache.glob(".*-*.lock")}
    return sorted(found)


def obtain(cache: Path, name: str, build: Callable[[Path], None]) -> Path:
    """The entry ``name`` under ``cache``; ``build(folder)`` fills it when it is missing or corrupt."""
    entry = cache / name
    if verify(entry):
        return entry
    with locked(cache / f".{name}.lock"):
        if verify(entry):  # somebody else built it while we waited
            return entry
        for leftover in cache.glob(f".{name}.tmp*"):  # only an interrupted builder leaves one: we hold the lock
            shutil.rmtree(leftover)
        shutil.rmtree(entry, ignore_errors=True)
        work = cache / f".{name}.tmp{os.getpid()}"
        work.mkdir(parents=True)
        try:
            build(work)
            _write_manifest(work)
            work.rename(entry)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
    return entry


def verify(entry: Path, thorough: bool = False) -> bool:
    """Is the entry complete and unchanged? ``thorough`` reads every byte, not only what looks touched."""
    try:
        manifest = json.loads((entry / MANIFEST).read_text())
        for name, want in manifest["files"].items():
            stat = (entry / name).stat()
            if stat.st_size != want["size"]:
                return False
            touched = stat.st_mtime_ns != want["mtime_ns"]
            if (thorough or touched) and _sha256(entry / name) != want["sha256"]:
                return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return True


def _names(path: Path, descriptor: int) -> bool:
    """Is ``path`` the name of that open file?"""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _write_manifest(folder: Path) -> None:
    files = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        stat = file.stat()
        files[str(file.relative_to(folder))] = {
            "size": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
            "sha256": _sha256(file),
        }
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n")
    for file in folder.rglob("*"):  # a power cut after the rename must not leave an entry with holes
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
