"""Snapshots of whole racks, as they lie on the host's disk: what is in one, which there are, how one goes.

    snapshots/RACK/NAME/snapshot.json           what it is of; every blade's metadata, and the images it runs from
    snapshots/RACK/NAME/secret, ssh/            what the blades know the host by
    snapshots/RACK/NAME/blades/mb0/memory.save  memory, devices and persistent memory: a save image of libvirt
    snapshots/RACK/NAME/blades/sb0/disk.raw     the disk of a blade that has one

They appear whole or not at all, and outlive `down`. freeze.py makes one, thaw.py makes a rack of it again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from pydantic import TypeAdapter, ValidationError

from orchestrator import lock, sparse
from orchestrator.errors import RacklessError
from orchestrator.fields import SnapshotName, did_you_mean
from orchestrator.hypervisor import save_image
from orchestrator.image import cache
from orchestrator.settings import RackPaths, Settings
from orchestrator.spec import BladeSpec

FORMAT = 1
"""Of snapshot.json, and of what the blades' agents must be able to do when they wake."""
_MANIFEST = "snapshot.json"
MEMORY = "memory.save"
DISK = "disk.raw"


@dataclass(frozen=True)
class Snapshot:
    """One snapshot. Times are seconds."""

    rack: str
    name: str
    created: float
    """Since the epoch: when the blades stood still."""
    rackless: str
    """Version that made it."""
    emulator: str
    """Version of QEMU."""
    accelerator: str
    blades: dict[str, dict[str, Any]]
    """The libvirt metadata of each."""
    images: dict[str, str]
    """Files that the blades run from, and their SHA-256."""
    folder: Path
    format: int = FORMAT

    @cached_property
    def specs(self) -> dict[str, BladeSpec]:
        """What the blades are. RacklessError when this version cannot read it."""
        try:
            return {name: BladeSpec.from_json(said.get("spec")) for name, said in self.blades.items()}
        except ValueError as error:
            raise _other_version(self.rack, self.name, self.folder, str(error)) from None

    @property
    def size(self) -> int:
        """Bytes it takes on the disk."""
        return sum(sparse.used(file) for file in self.folder.rglob("*"))

    def memory(self, blade: str) -> Path:
        """A blade's save image."""
        return self.folder / "blades" / blade / MEMORY

    def disk(self, blade: str) -> Path:
        """A copy of a blade's disk, if it has one."""
        return self.folder / "blades" / blade / DISK

    def to_json(self) -> dict[str, Any]:
        """As `rackless snapshot list --json` prints it."""
        return {"rack": self.rack, "name": self.name, "created": self.created, "blades": sorted(self.blades),
                "bytes": self.size, "accelerator": self.accelerator, "emulator": self.emulator,
                "rackless": self.rackless, "missing": self.missing()}  # fmt: skip

    def write(self) -> None:
        """Write down what it is, in its folder."""
        data = {key: value for key, value in self.__dict__.items() if key in _FIELDS}
        (self.folder / _MANIFEST).write_text(json.dumps(data, indent=1) + "\n")

    def missing(self) -> list[str]:
        """Files of images that it needs and that are not there any more, or others now."""
        return [path for path, digest in self.images.items() if not digest or _digest(Path(path)) != digest]


_FIELDS = {field.name for field in fields(Snapshot)} - {"folder"}


def find(settings: Settings, rack: str, name: str) -> Snapshot:
    """A snapshot. RacklessError when there is none of this name, or another version of Rackless made it."""
    found = _read(_folder(settings, rack, name))
    if found is None:
        names = sorted(snapshot.name for snapshot in of_rack(settings, rack))
        hint = did_you_mean(name, names) if names else "`rackless snapshot create` makes one"
        raise RacklessError(f"rack {rack} has no snapshot {name}", hint=hint)
    return found


def of_rack(settings: Settings, rack: str) -> list[Snapshot]:
    """The snapshots of a rack that this version can read, the oldest first."""
    found = []
    for folder in (settings.snapshots / rack).glob("[!.]*"):
        with suppress(RacklessError):
            snapshot = _read(folder)
            found += [snapshot] if snapshot else []
    return sorted(found, key=lambda snapshot: snapshot.created)


def delete(settings: Settings, rack: str, name: str) -> int:
    """Remove a snapshot, also one of another version; bytes that are free now. RacklessError: no such, rack busy."""
    folder = _folder(settings, rack, name)
    with lock.hold(RackPaths(settings, rack)):
        if not folder.is_dir():
            find(settings, rack, name)  # says which there are
        size = sum(sparse.used(file) for file in folder.rglob("*"))
        leaving = _beside(folder)
        folder.rename(leaving)  # it goes whole: what is killed from here on, `gc` removes
        shutil.rmtree(leaving)
        _tidy(folder.parent)
    return size


@contextmanager
def making(settings: Settings, rack: str, name: str) -> Iterator[Path]:
    """A folder to fill, which becomes the snapshot's at the end of the block, or goes if that fails.

    RacklessError when the name cannot be, or is taken.
    """
    final = _folder(settings, rack, name)
    work = _beside(final)
    shutil.rmtree(work, ignore_errors=True)  # of a process that had our number
    work.mkdir(mode=0o700, parents=True)
    try:
        yield work
        work.rename(final)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        _tidy(final.parent)
        raise


def must_be_free(settings: Settings, rack: str, name: str) -> None:
    """Raise RacklessError when a name cannot be that of a new snapshot."""
    if _folder(settings, rack, name).exists():
        raise RacklessError(f"rack {rack} has a snapshot {name} already",
                            hint=f"take another name, or `rackless snapshot delete {name}` first")  # fmt: skip


def images_of(state: Path) -> dict[str, str]:
    """What a saved blade runs from: kernel, initramfs, and disks that are only read, with their SHA-256."""
    root = ElementTree.fromstring(save_image.read_xml(state))
    paths = [root.findtext("os/kernel"), root.findtext("os/initrd")]
    for disk in root.findall("devices/disk"):
        source = disk.find("source")
        if disk.find("readonly") is not None and source is not None:
            paths.append(source.get("file"))
    return {path: _digest(Path(path)) for path in paths if path}


def used_images(settings: Settings) -> set[Path]:
    """Entries of the cache that snapshots need."""
    snapshots = [snapshot for folder in settings.snapshots.glob("*") for snapshot in of_rack(settings, folder.name)]
    return {Path(path).parent for snapshot in snapshots for path in snapshot.images}


def _folder(settings: Settings, rack: str, name: str) -> Path:
    try:
        return settings.snapshots / rack / str(TypeAdapter(SnapshotName).validate_python(name))
    except ValidationError as error:
        raise RacklessError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None


def _beside(folder: Path) -> Path:
    """Where it is while it is half made; `gc` knows it by the number of the process."""
    return folder.with_name(f".{folder.name}.tmp{os.getpid()}")


def _tidy(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _read(folder: Path) -> Snapshot | None:
    try:
        data = json.loads((folder / _MANIFEST).read_text())
    except OSError:
        return None
    except ValueError as error:
        raise _other_version(folder.parent.name, folder.name, folder, str(error)) from None
    if not isinstance(data, dict) or data.get("format") != FORMAT or data.keys() != _FIELDS:
        raise _other_version(folder.parent.name, folder.name, folder, f"its {_MANIFEST} has another format")
    return Snapshot(folder=folder, **data)


def _other_version(rack: str, name: str, folder: Path, why: str) -> RacklessError:
    hint = f"use that version, or `rackless snapshot delete {name}`"
    return RacklessError(f"another version of Rackless made the snapshot {name} of rack {rack}: {why}", hint=hint,
                         log=folder / _MANIFEST)  # fmt: skip


def _digest(path: Path) -> str:
    """What the cache wrote down when it made the file; empty when it is not there as it was made."""
    if not path.exists() or not cache.verify(path.parent):
        return ""
    files = json.loads((path.parent / cache.MANIFEST).read_text())["files"]
    return str(files.get(path.name, {}).get("sha256", ""))
