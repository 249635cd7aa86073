"""How a rack is: what libvirt says of its blades, and what their agents say of themselves."""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import Any

from orchestrator import agents
from orchestrator.errors import RacklessError
from orchestrator.hypervisor import daemon, domain
from orchestrator.hypervisor.domain import Owned
from orchestrator.parallel import together
from orchestrator.settings import RackPaths, Settings
from orchestrator.spec import BladeSpec


def status(settings: Settings, rack: str) -> dict[str, Any]:
    """The rack as `rackless status --json` prints it.

    A blade is ``ready`` when it was made completely, its agent has joined and its RDMA link is active; ``starting``
    before that; ``silent`` when its agent does not answer; else as libvirt says: ``paused``, ``crashed``.
    """
    paths = RackPaths(settings, rack)
    described: dict[str, dict[str, Any]] = {}
    with daemon.connection(paths) as conn:
        blades = {n: o for n, o in domain.owned(conn, rack).items() if "spec" in o.metadata} if conn else {}

    def describe(owned: Owned) -> None:
        spec = BladeSpec.from_json(owned.metadata["spec"])
        state, health = _health(paths, spec, owned)
        described[spec.name] = {
            "name": spec.name,
            "kind": spec.kind,
            "state": state,
            "cpus": spec.cpus,
            "memory_bytes": spec.memory,
            "mgmt_address": spec.mgmt_address,
            "fabric_address": spec.fabric_address,
            "agents": health,
        }

    together(blades, describe)
    accelerators = {owned.metadata.get("accelerator") for owned in blades.values()}
    return {
        "rack": rack,
        "accelerator": next(iter(accelerators), None),
        "blades": sorted(described.values(), key=lambda blade: IPv4Address(blade["mgmt_address"])),
    }


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
    ready = complete and health["joined"] and health["rdma"] == "ACTIVE"
    return "ready" if ready else "starting", health
