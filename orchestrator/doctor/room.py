"""Is there room for a rack: memory, disk, addresses, paths?"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from ipaddress import IPv4Network, ip_network
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.doctor.check import Check
from orchestrator.doctor.host import in_scratch_network, refused
from orchestrator.errors import RacklessError
from orchestrator.settings import PRIVATE_LIBVIRT, Settings

if TYPE_CHECKING:
    from orchestrator.model import Rack

GIB = 1 << 30
MIB = 1 << 20
IMAGE_BYTES = 4 * GIB
"""Free disk to build an image: an unpacked root, its packages and the squashed result."""
STATE_BYTES = GIB
"""Free disk for a rack: saved memory, logs, and what its (sparse) disks really hold at the start."""
QEMU_OVERHEAD_BYTES = 128 * MIB
"""What a QEMU process needs beside its blade's memory (translated code, devices)."""
SMALLER = "make the blades smaller in the rack file"
SOCKET_PATH_BYTES = 107
"""sockaddr_un.sun_path without its final zero: unix(7)."""


def checks(settings: Settings) -> Iterator[Check]:
    rack = default_rack()
    if isinstance(rack, Check):
        yield rack
    else:
        yield memory(rack)
        yield subnets(rack, host_routes(), settings)
    yield disk("disk for images", settings.cache_dir, IMAGE_BYTES, "RACKLESS_CACHE")
    yield disk("disk for racks", settings.state_dir, STATE_BYTES, "RACKLESS_STATE")
    yield sockets(settings)
    yield ports(settings)


def default_rack() -> Rack | Check:
    """The rack that is meant when no file is named; a Check when its file is no good."""
    from orchestrator import rackfile

    package = Path(__file__).parents[1]
    installed = package / "data" / "racks"
    folder = installed if installed.is_dir() else package.parent / "racks"
    try:
        return rackfile.load(folder / "default.yml")
    except RacklessError as error:
        return Check("default rack", "fail", error.message, error.hint)


def memory(rack: Rack, meminfo: Path = Path("/proc/meminfo")) -> Check:
    """Free memory against what the rack's blades may use at most."""
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines()}
    need = sum(blade.memory + QEMU_OVERHEAD_BYTES for blade in rack.blades.values())
    available, total = sizes["MemAvailable"], sizes["MemTotal"]
    detail = f"{_gib(available)} of {_gib(total)} free; rack {rack.name} may use {_gib(need)}"
    if total < need:
        return Check("memory", "fail", detail, SMALLER)
    if available < need:
        return Check("memory", "warn", detail, f"end other programs, or {SMALLER}")
    return Check("memory", "ok", detail)


def disk(name: str, folder: Path, need: int, variable: str) -> Check:
    """Is the folder (or the nearest one above it that exists) writable and roomy?"""
    # os.path: it takes what a folder above forbids to see for missing, where pathlib raises.
    place = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"\0")
    except OSError as error:
        fix = f"run as root, or set {variable} to a folder you can write to"
        return Check(name, "fail", f"{place} cannot be written: {error.strerror}", fix)
    free = shutil.disk_usage(place).free
    detail = f"{_gib(free)} free in {folder}"
    if free < need:
        fix = f"free some disk, or set {variable} to another folder"
        return Check(name, "fail", f"{detail}; {_gib(need)} are needed", fix)
    return Check(name, "ok", detail)


def subnets(rack: Rack, routes: list[IPv4Network], settings: Settings) -> Check:
    """Does the host use the rack's addresses? That matters only when the rack shares the host's network."""
    both = (rack.management.subnet, rack.fabric.subnet)
    clashes = [f"{ours} and {theirs}" for ours in both for theirs in routes if ours.overlaps(theirs)]
    if clashes:
        clash = f"the host uses addresses of the rack too ({', '.join(clashes)})"
        if settings.libvirt_uri != PRIVATE_LIBVIRT:
            # Not a failure: it may be this very rack that is up.
            return Check("subnets", "warn", clash, "unless it is up already, write other subnets in the rack file")
        return Check("subnets", "info", f"{clash}; harmless, the rack has its own namespace")
    return Check("subnets", "ok", f"{both[0]} and {both[1]} are not used by the host")


def host_routes() -> list[IPv4Network]:
    """The host's IPv4 routes but the default one; empty when `ip` is missing (another check says so)."""
    try:
        command = ["ip", "-json", "-4", "route"]
        shown = subprocess.run(command, capture_output=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    destinations = [route["dst"] for route in json.loads(shown or "[]") if route["dst"] != "default"]
    return [network for text in destinations if isinstance(network := ip_network(text), IPv4Network)]


def sockets(settings: Settings) -> Check:
    """Socket paths have a hard limit, which a long run folder breaks with errors that do not say so."""
    longest_name = "a" * 15  # orchestrator/fields.py: RackName
    path = settings.run_dir / longest_name / "libvirt" / "libvirt-sock-ro"
    spare = SOCKET_PATH_BYTES - len(os.fsencode(path))
    if spare < 0:
        why = f"{settings.run_dir} is {-spare} bytes too long"
        return Check("socket paths", "fail", why, "set RACKLESS_RUN to a shorter path")
    return Check("socket paths", "ok", f"{settings.run_dir} is short enough")


def ports(settings: Settings) -> Check:
    """The agents' port is used in the rack's own namespace, where nobody else listens: tried by listening."""
    port = settings.control_port
    why = in_scratch_network(
        f"ip link set lo up; timeout 5 nc -l 127.0.0.1 {port} </dev/null & "
        f"for i in 1 2 3 4 5 6 7 8 9; do nc -z 127.0.0.1 {port} && exit 0; sleep 0.1; done; exit 1"
    )
    if why:
        return Check("ports", *refused(f"port {port} cannot be used in a namespace: {why}"))
    return Check("ports", "ok", f"{port} is free in a rack's namespace; no port of the host is used")


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
