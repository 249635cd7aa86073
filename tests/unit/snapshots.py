"""Looks at a rack as an Observer makes them, of figures chosen here: all kinds of blades, all states of links."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from guest_agents.lite.abi import COUNTERS
from guest_agents.splitkernel.memory.buffers import COUNTED
from guest_agents.splitkernel.process import counters, figures
from orchestrator.faults.model import Faults
from orchestrator.hypervisor.usage import Traffic
from orchestrator.model import Link
from orchestrator.network.place import FABRIC, MANAGEMENT
from orchestrator.observer import Host, Snapshot
from orchestrator.wiring import Wire, wire
from tests.unit.stand_in import blade_specs

MIB = 1 << 20
SPECS = {**blade_specs("demo", ("gm0", "pb0", "mb0", "mb1", "mb2", "pb1"))}
SPECS["sb0"] = replace(SPECS["pb1"], name="sb0", kind="storage")
del SPECS["pb1"]
BROKEN: dict[str, dict[str, Any]] = {"mb0": {"loss": "1 %", "cpu": "25 %"}, "mb2": {"killed": True}}

EVENTS: list[dict[str, Any]] = [
    {"time": 1763866000.0, "event": "step", "rack": "demo", "phase": "up", "state": "done", "blade": None,
     "fraction": 1.0, "message": None, "seconds": 11.9},
    {"time": 1763866100.0, "event": "faults", "rack": "demo", "blade": "mb0", "faults": ["loss 1 %", "cpu 25 %"]},
    {"time": 1763866200.0, "event": "ended", "rack": "demo", "blade": "mb2", "reason": "destroyed"},
    {"time": 1763866210.0, "event": "member", "rack": "demo", "blade": "mb2", "state": "dead",
     "why": "silent for 10.2 s", "node": 5, "incarnation": 7},
    {"time": 1763866220.0, "event": "note", "message": "<img src=x onerror=alert(1)>"},
]  # fmt: skip


def wires() -> tuple[Wire, ...]:
    """gm0 as it should be, pb0 with a slow link, mb0 lossy, mb2 without power, sb0 as it should be."""
    made = []
    for name, spec in SPECS.items():
        spec = replace(spec, link=Link.model_validate({"latency": "50 us"})) if name == "pb0" else spec
        faults = Faults.model_validate(BROKEN.get(name, {}))
        made.append(wire(spec, faults, "off" if faults.killed else "running"))
    return tuple(made)


def program(number: int) -> dict[str, Any]:
    """One that has missed 5 of 100 faults since the last look, and 300 of 1000 before the first."""
    counted: dict[str, Any] = dict.fromkeys(counters.FIELDS, 0)
    misses = 300 + 5 * number
    counted.update(managed=1, faults=1000 + 100 * number, misses=misses, reads=misses, bytes_in=misses * 4096,
                   flushes=40 * number, pages_mapped=900, pages_held=4000, excache_bytes=4 * MIB,
                   blades={"mb0": dict.fromkeys(counters.BLADE_FIELDS, number)})  # fmt: skip
    return {"id": "pb0.812", "vnode": None, "command": 'sort -S 40M "big".txt', "started": 5.0, "excache": 4 * MIB,
            "counters": figures._with_figures(counted)}  # fmt: skip


def _stats(kind: str, number: int) -> dict[str, Any]:
    if kind == "processor":
        return {"programs": 1, "storage": {}, "running": [program(number)]}
    if kind == "memory":
        return {"regions": 3, "bytes_allocated": 48 * MIB, "bytes_registered": 64 * MIB, "bytes_total": 160 * MIB,
                "bytes_of_others": 8 * MIB, "connections": 1, "refused": 2, "requests": {"P2M_MMAP": 3},
                "buffers": {**dict.fromkeys(COUNTED, number), "hits": 7 * number, "bytes": 2 * MIB}}  # fmt: skip
    if kind == "storage":
        return {"requests": 10 * number, "by_opcode": {"P2S_OPEN": 4 * number, "P2S_READ": 6 * number},
                "bytes_in": 100, "bytes_out": 5000, "bytes_total": 256 * MIB, "bytes_free": 200 * MIB}  # fmt: skip
    return {"ready": True, "process": {"pb0": {"programs": 1}}, "memory": {}, "storage": {},
            "requests": {"P2PM_REQUEST_VNODE": 1}}  # fmt: skip


def _lite(number: int) -> dict[str, Any]:
    peer = {"incarnation": 1, "state": "connected", "queue_pairs": 2, "in_flight": 0, "waiting": 0,
            "bytes_out": 10 * number, "bytes_in": 20 * number}  # fmt: skip
    return {"lmrs": 2, "handles": 3, "memory": {"bytes_allocated": 4 * MIB},
            "core": {**dict.fromkeys(COUNTERS, number), "peers": {"1": peer, "99": peer}}}  # fmt: skip


def snapshot(number: int) -> Snapshot:
    """The rack at the look of this number; looks are 2 s apart."""
    sample: dict[str, dict[str, Any]] = {}
    host = {}
    for name, spec in SPECS.items():
        if name == "mb2":
            continue
        host[name] = Host(10 + 1.5 * number, 300 * MIB, {FABRIC: Traffic(3 * MIB * number, 2000 * number),
                                                         MANAGEMENT: Traffic(10 * number, 20 * number)})  # fmt: skip
        if name == "mb1":
            sample[name] = {"kind": spec.kind, "error": "no agent answers at 10.78.0.13:7070"}
            continue
        busy = 30 + 20 * (spec.index % 3)
        load = {"life": "1", "monotonic": 2.0 * number, "cpus": 1, "agent_cpu_seconds": 0.1 * number,
                "cpu_seconds": {"busy": busy * number / 100, "all": float(number)},
                "memory_total": 240 * MIB, "memory_free": 120 * MIB}  # fmt: skip
        sample[name] = {"kind": spec.kind, "load": load, "stats": _stats(spec.kind, number), "lite": _lite(number)}
    nodes = {spec.index + 1: name for name, spec in SPECS.items()}
    return Snapshot("demo", 1763866230.0 + 2 * number, 2.0 * number, "tcg", wires(), host, sample, nodes)
