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
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from orchestrator import lock
from orchestrator.errors import RacklessError
from orchestrator.hypervisor import daemon
from orchestrator.network import bridge, namespace
from orchestrator.settings import RackPaths, Settings

_CGROUPS = Path("/sys/fs/cgroup")
_BUILD = re.compile(r"^\..+\.tmp(\d+)$")
_STOP_SECONDS = 5.0


@dataclass(frozen=True)
class Leftover:
    """One thing nobody uses: ``process``, ``daemons``, ``namespace``, ``folder``, ``file``, ``cgroup``."""

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
    for kind in ("images", "templates"):
        for folder in (settings.cache_dir / kind).glob(".*.tmp*"):
            match = _BUILD.match(folder.name)
            if match and not Path(f"/proc/{match[1]}").exists():
                found.append(Leftover("folder", str(folder)))
    return found


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
    if settings.libvirt_uri != daemon.PRIVATE:
        return []  # another libvirtd has the blades: what looks orphaned here is not
    folders = (settings.run_dir, settings.state_dir / "racks")
    return sorted({path.name for folder in folders for path in folder.glob("*") if path.is_dir()})


def _of_rack(paths: RackPaths) -> Iterator[Leftover]:
    rack = paths.name
    known = _known_processes(paths)
    orphans = [pid for pid in _blade_processes(paths) if pid not in known.values()]
    yield from (Leftover("process", str(pid), rack) for pid in orphans)
    yield from (Leftover("file", str(file), rack) for file in paths.blades.glob("*/clone.save"))
    for folder in paths.blades.glob("template-*"):
        if f"{rack}.{folder.name}" not in known:
            yield Leftover("folder", str(folder), rack)
    yield from (Leftover("cgroup", str(folder), rack) for folder in _empty_cgroups(rack))
    if known:
        return
    if any(daemon.running(pid) for pid in daemon.Daemon.of(paths).pids.values()):
        yield Leftover("daemons", str(daemon.Daemon.of(paths).run), rack)
    if namespace.exists(rack) and not _strangers(paths, orphans):
        yield Leftover("namespace", namespace.name_of(rack), rack)
    if (paths.settings.run_dir / rack).exists():
        yield Leftover("folder", str(paths.settings.run_dir / rack), rack)


def _known_processes(paths: RackPaths) -> dict[str, int]:
    """Blades that run and that the rack's libvirtd knows, or will know when it is started: name and pid."""
    known = {}
    for file in daemon.Daemon.of(paths).run.glob("qemu/*.pid"):
        with suppress(OSError, ValueError):
            pid = int(file.read_text())
            if file.with_suffix(".xml").exists() and f"guest={file.stem}," in _command(pid):
                known[file.stem] = pid
    return known


def _blade_processes(paths: RackPaths) -> list[int]:
    """QEMU processes whose blade is of this rack and whose files are in this rack's folders."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        command = _command(int(entry.name))
        if f"-name\0guest={paths.name}." in command and str(paths.settings.run_dir / paths.name) + "/" in command:
            found.append(int(entry.name))
    return found


def _strangers(paths: RackPaths, orphans: list[int]) -> bool:
    """Are others than its daemons and ``orphans`` in the rack's namespace, such as a rack of another RACKLESS_RUN?"""
    daemons = filter(None, map(daemon.running, daemon.Daemon.of(paths).pids.values()))
    own = {os.readlink(f"/proc/{pid}/ns/mnt") for pid in daemons}  # what a daemon starts shares its mounts
    mark = (namespace.NAMED / namespace.name_of(paths.name)).stat().st_ino
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            inside = (entry / "ns/net").stat().st_ino == mark and int(entry.name) not in orphans
            if inside and os.readlink(entry / "ns/mnt") not in own:
                return True
    return False


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return ""


def _empty_cgroups(rack: str) -> list[Path]:
    found = []
    for pattern in ("machine*", "*/machine*"):
        for folder in _CGROUPS.glob(f"{pattern}/qemu-*-{rack}.*.libvirt-qemu"):
            # A rack may be called as another one ends: t and my-t.
            if re.match(rf"qemu-\d+-{re.escape(rack)}\.", folder.name) and not _populated(folder):
                found.append(folder)
    return found


def _populated(cgroup: Path) -> bool:
    events = cgroup / "cgroup.events"
    if events.exists():  # version 2; there cgroup.procs of a threaded group cannot be read
        return "populated 1" in events.read_text()
    return any(file.read_text().strip() for file in cgroup.rglob("cgroup.procs"))


def _remove(settings: Settings, item: Leftover) -> None:
    if item.kind == "process":
        _kill(int(item.name))
    elif item.kind == "daemons" and item.rack:
        daemon.stop(RackPaths(settings, item.rack))
    elif item.kind == "namespace" and item.rack:
        bridge.remove(item.rack)
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
        deadline = time.monotonic() + _STOP_SECONDS
        while Path(f"/proc/{pid}").exists() and _command(pid):
            if time.monotonic() > deadline:
                raise RacklessError(f"process {pid} does not end")
            time.sleep(0.01)
