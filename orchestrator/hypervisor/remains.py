"""What a rack has left of its hypervisor: blades that run, and what nobody looks after any more.

A libvirtd that is not ours looks after its processes and cgroups by itself: of those nothing is ever left to us.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from orchestrator.errors import RacklessError
from orchestrator.hypervisor import daemon
from orchestrator.settings import PRIVATE_LIBVIRT, RackPaths

_CGROUPS = Path("/sys/fs/cgroup")


def known_blades(paths: RackPaths) -> dict[str, int]:
    """Blades that run and that the rack's libvirtd knows, or will know when it is started: domain name and pid.

    The pid is 0 where another libvirtd, or another host, keeps it to itself. A host that cannot be reached is said to
    have one: what is here may be in use.
    """
    if not _private(paths):
        from orchestrator.hypervisor import domain

        with daemon.connection(paths) as conn:
            found = domain.owned(conn, paths.name) if conn else {}
            return {domain.domain_name(paths.name, blade): 0 for blade in found} | _elsewhere(paths)
    known = _elsewhere(paths)
    for file in daemon.Daemon.of(paths).run.glob("qemu/*.pid"):
        with suppress(OSError, ValueError):
            pid = int(file.read_text())
            if file.with_suffix(".xml").exists() and f"guest={file.stem}," in command_of(pid):
                known[file.stem] = pid
    return known


def _elsewhere(paths: RackPaths) -> dict[str, int]:
    from orchestrator.hypervisor import domain, hosts

    noted = hosts.noted(paths)
    try:
        with hosts.reach(paths, noted) as far:
            blades = hosts.Hosts(paths, None, far).owned()
    except RacklessError:
        return {domain.domain_name(paths.name, f"blades of {', '.join(noted)}"): 0}
    return {domain.domain_name(paths.name, blade): 0 for blade in blades}


def orphans(paths: RackPaths, known: Collection[int]) -> list[int]:
    """QEMU processes whose blade is of this rack, which its libvirtd started, and which are not ``known``.

    None of a rack on several hosts: one of them may be a namespace of this machine, and its blades look the same.
    """
    from orchestrator.hypervisor import hosts

    if not _private(paths) or hosts.noted(paths):
        return []
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        pid = int(entry.name)
        if f"-name\0guest={paths.name}." in command_of(pid) and pid not in known and _sees_folders(paths, pid):
            found.append(pid)
    return found


def _sees_folders(paths: RackPaths, pid: int) -> bool:
    """Are the rack's folders mounted where libvirt has its own? They may have been removed since.

    A rack of the same name may be in another RACKLESS_RUN; and of what is the rack's nothing is on the command line:
    libvirt opens sockets and disks, and QEMU gets them opened.
    """
    own = daemon.Daemon.of(paths)
    with suppress(OSError):  # it ended; or there are no racks
        lines = [line.split() for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
        mounted = {words[4]: (words[2], words[3].removesuffix("//deleted")) for words in lines}  # proc(5)
        return all(_is_of(mounted.get(place), folder, base) for place, folder, base in (
            ("/run/libvirt", own.run, paths.settings.run_dir), ("/var/lib/libvirt", own.lib, paths.settings.state_dir)))
    return False


def _is_of(mounted: tuple[str, str] | None, folder: Path, base: Path) -> bool:
    """Is it this folder (below one that is there) by its device, and its path there?"""
    device = base.stat().st_dev
    return mounted is not None and mounted[0] == f"{os.major(device)}:{os.minor(device)}" and (
        str(folder.resolve()).endswith(mounted[1]))  # fmt: skip


def daemons(paths: RackPaths) -> list[int]:
    """The rack's own libvirtd and virtlogd, as far as they run."""
    return [pid for file in daemon.Daemon.of(paths).pids.values() if (pid := daemon.running(file))]


def own_process(paths: RackPaths) -> Callable[[int], bool]:
    """A test for processes: is it one of the rack's daemons, or started by one?"""
    mounts = set()
    for pid in daemons(paths):  # what a daemon starts shares its mounts
        with suppress(OSError):
            mounts.add(os.readlink(f"/proc/{pid}/ns/mnt"))
    run = str(daemon.Daemon.of(paths).run)

    def own(pid: int) -> bool:
        # A libvirtd that starts tries out mount namespaces with forks of itself: its command line, other mounts.
        return os.readlink(f"/proc/{pid}/ns/mnt") in mounts or f"--pid-file\0{run}/" in command_of(pid)

    return own


def empty_cgroups(paths: RackPaths) -> list[Path]:
    """Cgroups of the rack's blades in which nothing runs."""
    if not _private(paths):
        return []
    found = []
    for pattern in ("machine*", "*/machine*"):
        for folder in _CGROUPS.glob(f"{pattern}/qemu-*-{paths.name}.*.libvirt-qemu"):
            # A rack may be called as another one ends: t and my-t.
            if re.match(rf"qemu-\d+-{re.escape(paths.name)}\.", folder.name) and not _populated(folder):
                found.append(folder)
    return found


def command_of(pid: int) -> str:
    """The command line of a process, its words ended by NULs; empty when there is no such process."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return ""


def _populated(cgroup: Path) -> bool:
    events = cgroup / "cgroup.events"
    if events.exists():  # version 2; there cgroup.procs of a threaded group cannot be read
        return "populated 1" in events.read_text()
    return any(file.read_text().strip() for file in cgroup.rglob("cgroup.procs"))


def _private(paths: RackPaths) -> bool:
    return paths.settings.libvirt_uri == PRIVATE_LIBVIRT
