"""How a rack is: what libvirt says of its blades, and what their agents say of themselves."""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import Any

from orchestrator import agents
from orchestrator.errors import RacklessError
from orchestrator.faults.model import of as faults_of
from orchestrator.hypervisor import domain, hosts
from orchestrator.hypervisor.domain import Owned
from orchestrator.parallel import together
from orchestrator.settings import RackPaths, Settings
from orchestrator.spec import BladeSpec

_FIELDS = ("name", "kind", "state", "cpus", "memory_bytes", "mgmt_address", "fabric_address", "agents", "faults")


def status(settings: Settings, rack: str) -> dict[str, Any]:
    """The rack as `rackless status --json` prints it.

    A blade is ``ready`` when it was made completely, its agent has joined and its RDMA link is active; ``starting``
    before that; ``silent`` when its agent does not answer; ``broken`` when another version of Rackless made it, so
    that nothing is known of it; else as libvirt says: ``paused``, ``crashed``, ``off``. ``faults`` are those that were
    made on purpose (see faults/model.py); `rackless heal` undoes them. In a rack on several hosts each blade has its
    ``host``, too.
    """
    paths = RackPaths(settings, rack)
    described: dict[str, dict[str, Any]] = {}
    spread = hosts.noted(paths)
    here = next((name for name, host in spread.items() if host.uri is None), None)
    with hosts.opened(paths) as machines:
        blades = {name: owned for name, owned in machines.owned().items() if not domain.is_template(owned)}

    def describe(owned: Owned) -> None:
        name = str(owned.metadata["blade"])
        try:
            spec = owned.spec()
        except ValueError as error:
            known = {"name": name, "state": "broken", "agents": {"error": str(error)}, "faults": []}
            described[name] = dict.fromkeys(_FIELDS) | known
            return
        state, health = _health(paths, spec, owned)
        described[name] = {
            "name": spec.name,
            "kind": spec.kind,
            "state": state,
            "cpus": spec.cpus,
            "memory_bytes": spec.memory,
            "mgmt_address": spec.mgmt_address,
            "fabric_address": spec.fabric_address,
            "agents": health,
            "faults": faults_of(owned.state, owned.metadata).shown(),
        }

    together(blades, describe)
    for name in blades if spread else ():
        described[name]["host"] = blades[name].host or here
    accelerators = {owned.metadata.get("accelerator") for owned in blades.values()}
    return {
        "rack": rack,
        "accelerator": next(iter(accelerators), None),
        "blades": sorted(described.values(), key=_place),
    }


def _place(blade: dict[str, Any]) -> tuple[IPv4Address, str]:
    """In the order of addresses, then those that have none."""
    return IPv4Address(blade["mgmt_address"] or "255.255.255.255"), blade["name"]


def _health(paths: RackPaths, spec: BladeSpec, owned: Owned) -> tuple[str, dict[str, Any]]:
    if owned.state != "running":
        return owned.state, {}
    complete = bool(owned.metadata.get("ready"))
    try:
        health = agents.call(
            paths, spec.name, spec.mgmt_address, "agent.status", paths.settings.status_seconds
        )
    except RacklessError as error:
        return "silent" if complete else "starting", {"error": error.message}
    ready = complete and health.get("joined") and health.get("rdma") == "ACTIVE"
    return "ready" if ready else "starting", health
