"""Make a running blade as its spec and its faults say. Each may be repeated; with fewer faults it is an undo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from orchestrator import agents
from orchestrator.faults import model
from orchestrator.faults.model import Faults
from orchestrator.hypervisor import domain
from orchestrator.spec import BladeSpec

if TYPE_CHECKING:
    import libvirt

    from orchestrator.hypervisor.hosts import Hosts


def cpus(running: libvirt.virDomain, spec: BladeSpec, faults: Faults) -> None:
    """The share of the host's CPUs that the blade gets."""
    domain.explain(f"limit {spec.name}", lambda: domain.limit_cpu(running, model.quota(spec, faults)))


def cable(running: libvirt.virDomain, spec: BladeSpec, faults: Faults) -> None:
    """Whether its cable to the fabric is plugged in."""
    domain.explain(f"change the link of {spec.name}",
                   lambda: domain.set_carrier(running, spec.fabric_mac, not faults.down))  # fmt: skip


def side(hosts: Hosts, wanted: Mapping[int, int]) -> None:
    """Which side of a partition blades are on, by index."""
    hosts.everywhere("part", sides_by_index={str(index): side for index, side in wanted.items()})


def inside(hosts: Hosts, spec: BladeSpec, faults: Faults, addresses: Mapping[str, str]) -> None:
    """What its link, disk and clock are like, and how much memory it has left. `addresses` are those on the fabric."""
    hosts.do(spec.host, "limit", index=spec.index, bandwidth=model.bandwidth(spec, faults))
    fields: dict[str, Any] = {
        "link": model.link_fields(spec, faults, addresses),
        "excache": spec.excache,
        "heartbeat": spec.membership.heartbeat,
        "dead_after": spec.membership.dead_after,
        "pressure": faults.memory or 0,
        "disk_faults": model.disk_fields(faults),
        "clock": faults.clock or 0.0,
    }
    seconds = hosts.paths.settings.control_seconds
    agents.call(hosts.paths, spec.name, spec.mgmt_address, "agent.update", seconds, **fields)


def whole(hosts: Hosts, running: libvirt.virDomain, spec: BladeSpec, faults: Faults,
          addresses: Mapping[str, str]) -> None:  # fmt: skip
    """All of it, for a blade that has just been made."""
    cpus(running, spec, faults)
    if any(name in faults.names for name in model.INSIDE):
        inside(hosts, spec, faults, addresses)
    if faults.down:
        cable(running, spec, faults)
    if faults.side is not None:
        side(hosts, {spec.index: faults.side})
