"""A snapshot of a rack in Prometheus's text format (version 0.0.4): https://prometheus.io/docs/instrumenting/

Only figures that count up or stand for now; rates are Prometheus's business. Every metric has the label `rack`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from orchestrator.observer import Host, Snapshot
from orchestrator.wiring import STATES

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

FAMILIES: dict[str, tuple[str, str]] = {
    # The host's view.
    "rackless_blade_running": ("gauge", "1 when the blade's virtual machine runs, 0 when it is off or paused."),
    "rackless_blade_answers": ("gauge", "1 when the blade's agent answers."),
    "rackless_blade_faults": ("gauge", "Faults that were made on purpose and not healed."),
    "rackless_link_state": ("gauge", "1 for the state in which the blade's link to the fabric is."),
    "rackless_qemu_cpu_seconds_total": ("counter", "Processor time of the blade's QEMU on the host."),
    "rackless_qemu_resident_bytes": ("gauge", "Host memory that the blade's QEMU has."),
    "rackless_tap_in_bytes_total": ("counter", "Bytes that the blade got through its tap on a network."),
    "rackless_tap_out_bytes_total": ("counter", "Bytes that the blade sent through its tap on a network."),
    # Every blade's own view.
    "rackless_blade_cpus": ("gauge", "Virtual CPUs of the blade."),
    "rackless_blade_cpu_seconds_total": ("counter", "Time its CPUs were busy, by the blade's own kernel."),
    "rackless_agent_cpu_seconds_total": ("counter", "Processor time of the blade's agent."),
    "rackless_blade_memory_bytes": ("gauge", "Memory of the blade, by its own kernel."),
    "rackless_blade_memory_available_bytes": ("gauge", "Memory that programs could still get there."),
    # Programs on processor blades.
    "rackless_programs": ("gauge", "Programs that run on the blade."),
    "rackless_excache_faults_total": ("counter", "Page faults that the program's pager answered."),
    "rackless_excache_hits_total": ("counter", "Those that no memory blade had to answer."),
    "rackless_excache_misses_total": ("counter", "Pages that were fetched from memory blades for the program."),
    "rackless_excache_flushes_total": ("counter", "Pages of the program that were written to memory blades."),
    "rackless_excache_evictions_total": ("counter", "Pages that the program's ExCache gave up."),
    "rackless_excache_in_bytes_total": ("counter", "Bytes fetched from memory blades for the program."),
    "rackless_excache_out_bytes_total": ("counter", "Bytes written to memory blades for the program."),
    "rackless_excache_limit_bytes": ("gauge", "Size of the program's ExCache."),
    "rackless_excache_used_bytes": ("gauge", "Memory of the program that is in its ExCache, pages as they are."),
    # Books of memory blades.
    "rackless_memory_total_bytes": ("gauge", "Memory that the blade can lend."),
    "rackless_memory_lent_bytes": ("gauge", "Memory lent to programs."),
    "rackless_memory_others_bytes": ("gauge", "Memory of the same account that others have, such as LITE."),
    "rackless_memory_regions": ("gauge", "Regions lent."),
    "rackless_memory_refused_total": ("counter", "Requests for a region for which there was no room."),
    "rackless_memory_buffers_bytes": ("gauge", "Pieces of files that are kept: they give way to programs."),
    "rackless_memory_buffers_hits_total": ("counter", "READs of files that were answered from what is kept."),
    "rackless_memory_buffers_misses_total": ("counter", "READs of files that a storage blade was asked for."),
    # Files.
    "rackless_storage_requests_total": ("counter", "Requests to the file service, by opcode."),
    "rackless_storage_in_bytes_total": ("counter", "Bytes written to the file service."),
    "rackless_storage_out_bytes_total": ("counter", "Bytes read from the file service."),
    "rackless_storage_free_bytes": ("gauge", "Room on the storage blade's disk."),
    "rackless_storage_total_bytes": ("gauge", "Size of that disk."),
    # LITE.
    "rackless_lite_operations_total": ("counter", "Operations of LITE that this blade began."),
    "rackless_lite_errors_total": ("counter", "Those of them that failed."),
    "rackless_lite_lmrs": ("gauge", "LMRs whose books this blade has."),
    "rackless_lite_handles": ("gauge", "Handles that its programs hold."),
    "rackless_lite_memory_bytes": ("gauge", "Memory that LITE has given out on this blade."),
    "rackless_lite_peer_in_bytes_total": ("counter", "Bytes that came from another blade, by LITE."),
    "rackless_lite_peer_out_bytes_total": ("counter", "Bytes that went to another blade, by LITE."),
    # Managers.
    "rackless_managers_requests_total": ("counter", "Requests among the splitkernel's managers, by opcode."),
}

_OPERATIONS = ("reads", "writes", "atomics", "calls", "sends", "receives", "replies")
_EXCACHE = {"faults": "faults", "misses": "misses", "flushes": "flushes", "evictions": "evictions",
            "bytes_in": "in_bytes", "bytes_out": "out_bytes"}  # fmt: skip
_PAGE = 4096

Add = Callable[..., None]
"""Takes a metric's name without "rackless_", its value (nothing is told when None), and labels."""


def exposition(snapshot: Snapshot) -> str:
    """The text that Prometheus scrapes."""
    values: defaultdict[str, list[str]] = defaultdict(list)

    def add(name: str, value: float | None, **labels: str) -> None:
        if value is not None:
            told = ",".join(f'{key}="{_escaped(text)}"' for key, text in {"rack": snapshot.rack, **labels}.items())
            values[f"rackless_{name}"].append(f"rackless_{name}{{{told}}} {value:.16g}")

    for wire in snapshot.wires:
        of_blade = partial(add, blade=wire.blade, kind=wire.kind)
        told = snapshot.sample.get(wire.blade, {})
        of_blade("blade_running", int(wire.power == "running"))
        of_blade("blade_answers", int("load" in told))
        of_blade("blade_faults", len(wire.faults))
        for state in STATES:
            of_blade("link_state", int(state == wire.state), state=state)
        if wire.blade in snapshot.host:
            _host(of_blade, snapshot.host[wire.blade])
        if "load" in told:
            _load(of_blade, told["load"])
        if (stats := told.get("stats")) and wire.kind in _KINDS:
            _KINDS[wire.kind](partial(add, blade=wire.blade), stats)
        if lite := told.get("lite"):
            _lite(partial(add, blade=wire.blade), lite, snapshot.nodes)
    lines: list[str] = []
    for name, (kind, about) in FAMILIES.items():
        if values[name]:
            lines += [f"# HELP {name} {about}", f"# TYPE {name} {kind}", *values[name]]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _host(add: Add, host: Host) -> None:
    add("qemu_cpu_seconds_total", host.cpu_seconds)
    add("qemu_resident_bytes", host.resident_bytes)
    for network, traffic in host.traffic.items():
        add("tap_in_bytes_total", traffic.bytes_in, network=network)
        add("tap_out_bytes_total", traffic.bytes_out, network=network)


def _load(add: Add, load: Mapping[str, Any]) -> None:
    add("blade_cpus", load["cpus"])
    add("blade_cpu_seconds_total", load["cpu_seconds"]["busy"])
    add("agent_cpu_seconds_total", load["agent_cpu_seconds"])
    add("blade_memory_bytes", load["memory_total"])
    add("blade_memory_available_bytes", load["memory_free"])


def _processor(add: Add, stats: Mapping[str, Any]) -> None:
    add("programs", len(stats["running"]))
    for program in stats["running"]:
        counted = program["counters"]
        of_program = partial(add, program=program["id"])
        of_program("excache_limit_bytes", program["excache"])
        if not counted["managed"]:  # before it has outgrown its ExCache nobody counts
            continue
        for name, told in _EXCACHE.items():
            of_program(f"excache_{told}_total", counted[name])
        of_program("excache_hits_total", max(counted["faults"] - counted["misses"], 0))
        of_program("excache_used_bytes", counted["pages_mapped"] * _PAGE + counted["pool_bytes"])


def _memory(add: Add, stats: Mapping[str, Any]) -> None:
    names = {"bytes_total": "total_bytes", "bytes_allocated": "lent_bytes", "bytes_of_others": "others_bytes",
             "regions": "regions", "refused": "refused_total"}  # fmt: skip
    for name, told in names.items():
        add(f"memory_{told}", stats[name])
    for name, told in {"bytes": "bytes", "hits": "hits_total", "misses": "misses_total"}.items():
        add(f"memory_buffers_{told}", stats["buffers"][name])


def _storage(add: Add, stats: Mapping[str, Any]) -> None:
    for opcode, count in stats["by_opcode"].items():
        add("storage_requests_total", count, opcode=opcode)
    add("storage_in_bytes_total", stats["bytes_in"])
    add("storage_out_bytes_total", stats["bytes_out"])
    add("storage_free_bytes", stats["bytes_free"])
    add("storage_total_bytes", stats["bytes_total"])


def _manager(add: Add, stats: Mapping[str, Any]) -> None:
    for opcode, count in stats["requests"].items():
        add("managers_requests_total", count, opcode=opcode)


def _lite(add: Add, lite: Mapping[str, Any], nodes: Mapping[int, str]) -> None:
    core = lite["core"]
    for operation in _OPERATIONS:
        add("lite_operations_total", core[operation], operation=operation)
    add("lite_errors_total", core["errors"])
    add("lite_lmrs", lite["lmrs"])
    add("lite_handles", lite["handles"])
    add("lite_memory_bytes", lite["memory"]["bytes_allocated"])
    for node, peer in core["peers"].items():
        name = nodes.get(int(node), f"node {node}")
        add("lite_peer_in_bytes_total", peer["bytes_in"], peer=name)
        add("lite_peer_out_bytes_total", peer["bytes_out"], peer=name)


_KINDS: dict[str, Callable[[Add, Mapping[str, Any]], None]] = {
    "processor": _processor,
    "memory": _memory,
    "storage": _storage,
    "manager": _manager,
}
