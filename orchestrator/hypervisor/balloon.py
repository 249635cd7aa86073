"""The memory of a blade that runs: a balloon in it gives pages back to the host, and takes them again.

A blade can have at most what it was started with. The blade's own driver does the work, so it may be slow or refuse:
the size is what it should be only when libvirt says so.
"""

from __future__ import annotations

import time
from contextlib import suppress
from xml.etree import ElementTree

import libvirt

from orchestrator import agents
from orchestrator.errors import RacklessError
from orchestrator.hypervisor import domain
from orchestrator.settings import RackPaths
from orchestrator.spec import BladeSpec
from orchestrator.units import format_size

_POLL_SECONDS = 0.05


def most(running: libvirt.virDomain) -> int | None:
    """Bytes that a running domain can have at most; None when that cannot be changed while it runs.

    Persistent memory counts as memory for libvirt's balloon and not for QEMU's: such blades are left alone.
    """
    try:
        tree = ElementTree.fromstring(running.XMLDesc())
    except libvirt.libvirtError:
        return None  # it has gone in this moment
    cells = list(tree.iterfind("cpu/numa/cell"))
    if not cells or tree.find("devices/memory") is not None or tree.find("devices/memballoon") is None:
        return None
    return sum(int(cell.get("memory", "0")) for cell in cells) * 1024


def check(paths: RackPaths, spec: BladeSpec, before: int, after: int) -> None:
    """Raise RacklessError when a blade of `before` bytes uses too much to have `after`."""
    _tell(paths, spec, before, after, dry=True)


def resize(paths: RackPaths, running: libvirt.virDomain, spec: BladeSpec, before: int) -> None:
    """Give a running blade of `before` bytes the memory of `spec`.

    RacklessError if it cannot; then it has what it had, as far as its balloon still moves.
    """
    if spec.memory < before:
        _tell(paths, spec, before, spec.memory)
    try:
        _set(paths, running, spec.name, spec.memory)
    except RacklessError:
        with suppress(RacklessError):  # the first error is the one to be told, and the agent is told in any case
            _set(paths, running, spec.name, before)
        if spec.memory < before:
            with suppress(RacklessError):
                _tell(paths, spec, spec.memory, before)
        raise
    if spec.memory > before:
        _tell(paths, spec, before, spec.memory)


def _set(paths: RackPaths, running: libvirt.virDomain, name: str, size: int) -> None:
    domain.explain(f"change the memory of {name}", lambda: domain.set_memory(running, size))
    deadline = time.monotonic() + paths.settings.control_seconds
    while (now := domain.explain(f"look at {name}", lambda: domain.memory_of(running))) != size:
        if time.monotonic() > deadline:
            raise RacklessError(f"{name} has {format_size(now)} and not {format_size(size)}: it does not give up more",
                                hint="end some of its programs, or shrink it by less")  # fmt: skip
        time.sleep(_POLL_SECONDS)


def _tell(paths: RackPaths, spec: BladeSpec, before: int, after: int, dry: bool = False) -> None:
    seconds = paths.settings.control_seconds
    agents.call(paths, spec.name, spec.mgmt_address, "agent.resize", seconds, before=before, after=after, dry=dry)
