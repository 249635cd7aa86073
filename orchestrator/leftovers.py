"""What crashed runs leave behind: found by our marks, listed first, removed only when told to.

A rack with a blade that runs is in use: of it only scratch files and half-made templates are left over.
Disks, persistent memory and keys of a rack that is down are a user's data and are never listed here;
`rackless down` removes them.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from orchestrator import guests, lock
from orchestrator.errors import RacklessError
from orchestrator.hypervisor import daemon, ends, remains
from orchestrator.network import place
from orchestrator.settings import RackPaths, Settings

_BUILD = re.compile(r"^\..+\.tmp(\d+)$")
_STOP_SECONDS = 5.0


@dataclass(frozen=True)
class Leftover:
    """One thing nobody uses: ``process``, ``daemons``, ``namespace``, ``bridges``, ``folder``, ``file``, ``cgroup``."""

    kind: str
    name: str
    rack: str | None = None

    def __str__(self) -> str:
        return f"{self.kind} {self.name}" + (f" of rack {self.rack}" if self.rack else "")

    def to_json(self) -> dict[str, str | None]:
        return asdict(self)


def find(settings: Settings) -> list[Leftover]:
    """All leftovers on this host, in the order in which they can be removed. Changes nothing."""
    found: list[Leftover] = []
    for rack in _racks(settings):
        paths = RackPaths(settings, rack)
        if not lock.held(paths):  # somebody works on it: what looks left over may be in use in a moment
            found += _of_rack(paths)
    half_made = [*settings.cache_dir.glob("images/.*.tmp*"), *settings.cache_dir.glob("templates/.*.tmp*"),
                 *settings.snapshots.glob("*/.*.tmp*")]  # fmt: skip
    for folder in half_made:
        match = _BUILD.match(folder.name)
        if match and not Path(f"/proc/{match[1]}").exists():
            found.append(Leftover("folder", str(folder)))
    return found


def left_alone(settings: Settings) -> dict[str, str]:
    """Racks of which only a part is here, by name: their homes, which alone know whether they are in use."""
    homes = {path.name: guests.of(RackPaths(settings, path.name)) for path in (settings.state_dir / "racks").glob("*")}
    return {name: home for name, home in sorted(homes.items()) if home}


def remove(settings: Settings, items: list[Leftover]) -> None:
    """Remove what `find` listed. A rack that is being changed right now is refused by its lock."""
    for item in items:
        if item.rack is None:
            _remove(settings, item)
            continue
        paths = RackPaths(settings, item.rack)
        with lock.hold(paths):
            if item in _of_rack(paths):  # somebody may have brought the rack up since
                _remove(settings, item)


def _racks(settings: Settings) -> list[str]:
    """Names of racks that have left a trace in our folders. A namespace alone may be that of another RACKLESS_RUN."""
    folders = (settings.run_dir, settings.state_dir / "racks")
    names = {path.name for folder in folders for path in folder.glob("*") if path.is_dir()}
    # Another libvirtd has the blades of some, or another machine knows of them: what looks left over of those is not.
    racks = [RackPaths(settings, name) for name in sorted(names)]
    return [paths.name for paths in racks if daemon.is_here(paths) and guests.of(paths) is None]


def _of_rack(paths: RackPaths) -> Iterator[Leftover]:
    rack, where = paths.name, place.of(paths)
    known = remains.known_blades(paths)
    orphans = remains.orphans(paths, known.values())
    yield from (Leftover("process", str(pid), rack) for pid in orphans)
    # Of a restore that was killed, or of files that were being made.
    for scratch in ("clone.save", "disk.thawed", "disk.new", "pmem.new"):
        yield from (Leftover("file", str(file), rack) for file in paths.blades.glob(f"*/{scratch}"))
    for folder in paths.blades.glob("template-*"):
        if f"{rack}.{folder.name}" not in known:
            yield Leftover("folder", str(folder), rack)
    yield from (Leftover("cgroup", str(folder), rack) for folder in remains.empty_cgroups(paths))
    if known:
        return
    if remains.daemons(paths):
        yield Leftover("daemons", str(daemon.Daemon.of(paths).run), rack)
    own = remains.own_process(paths)
    if where.exists() and not where.strangers(lambda pid: pid in orphans or own(pid)):
        yield Leftover(where.kind, where.name, rack)
    if (paths.settings.run_dir / rack).exists():
        yield Leftover("folder", str(paths.settings.run_dir / rack), rack)


def _remove(settings: Settings, item: Leftover) -> None:
    if item.kind == "process":
        _kill(int(item.name))
    elif item.kind == "daemons" and item.rack:
        daemon.stop(RackPaths(settings, item.rack))
    elif item.kind in ("namespace", "bridges") and item.rack:
        place.of(RackPaths(settings, item.rack)).remove()
    elif item.kind == "folder":
        shutil.rmtree(item.name, ignore_errors=True)
    elif item.kind == "file":
        Path(item.name).unlink(missing_ok=True)
    elif item.kind == "cgroup":
        for folder in sorted(Path(item.name).rglob("*"), reverse=True):
            if folder.is_dir():
                folder.rmdir()
        Path(item.name).rmdir()


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    if not ends.wait(pid, _STOP_SECONDS):
        raise RacklessError(f"process {pid} does not end")
