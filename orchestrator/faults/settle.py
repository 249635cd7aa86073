"""Make a running blade as its spec and its faults say. Each may be repeated; with fewer faults it is an undo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from orchestrator import agents
from orchestrator.faults import model
from orchestrator.faults.model import Faults
from orchestrator.hypervisor import domain
from orchestrator.network import place, shaping, sides
from orchestrator.settings import RackPaths
from orchestrator.spec import BladeSpec

if TYPE_CHECKING:
    import libvirt


def cpus(running: libvirt.virDomain, spec: BladeSpec, faults: Faults) -> None:
    """The share of the host's CPUs that the blade gets."""
    domain.explain(f"limit {spec.name}", lambda: domain.limit_cpu(running, model.quota(spec, faults)))


def cable(running: libvirt.virDomain, spec: BladeSpec, faults: Faults) -> None:
    """Whether its cable to the fabric is plugged in."""
    domain.explain(f"change the link of {spec.name}",
                   lambda: domain.set_carrier(running, spec.fabric_mac, not faults.down))  # fmt: skip


def side(paths: RackPaths, wanted: Mapping[int, int]) -> None:
    """Which side of a partition blades are on, by index."""
    sides.part(place.of(paths), wanted)


def inside(paths: RackPaths, spec: BladeSpec, faults: Faults, addresses: Mapping[str, str]) -> None:
    """What its link, disk and clock are like, and how much memory it has left. `addresses` are those on the fabric."""
    shaping.limit(place.of(paths), spec.index, model.bandwidth(spec, faults))
    fields: dict[str, Any] = {
        "link": model.link_fields(spec, faults, addresses),
        "excache": spec.excache,
        "heartbeat": spec.membership.heartbeat,
        "dead_after": spec.membership.dead_after,
        "pressure": faults.memory or 0,
        "disk_faults": model.disk_fields(faults),
        "clock": faults.clock or 0.0,
    }
    seconds = paths.settings.control_seconds
    agents.call(paths, spec.name, spec.mgmt_address, "agent.update", seconds, **fields)


def whole(paths: RackPaths, running: libvirt.virDomain, spec: BladeSpec, faults: Faults,
          addresses: Mapping[str, str]) -> None:  # fmt: skip
    """All of it, for a blade that has just been made."""
    cpus(running, spec, faults)
    if any(name in faults.names for name in model.INSIDE):
        inside(paths, spec, faults, addresses)
    if faults.down:
        cable(running, spec, faults)
    if faults.side is not None:
        side(paths, {spec.index: faults.side})
