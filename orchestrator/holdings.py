"""What a blade holds that would be lost with it: asked of the blade and of the managers, before anything is touched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator import agents, managers
from orchestrator.plan import Observed
from orchestrator.settings import RackPaths
from orchestrator.spec import BladeSpec

DEFAULT_VNODE = "default"


def lost_with(paths: RackPaths, blades: Mapping[str, Observed], name: str, keeps_files: bool = False,
              drained: bool = False) -> list[str]:  # fmt: skip
    """In words, what nobody has any more once blade `name` is gone, each such as "memory of programs (12 MiB)".

    With `keeps_files` it is made anew with its disk and its persistent memory, as by a power cycle; with `drained`
    its memory, files and chunks do not count, which move before (see drain.py). Of a blade that does not run, memory
    and programs are gone already. RacklessError when a blade that runs cannot be asked.
    """
    seen = blades[name]
    spec = seen.spec
    if spec is None:
        return []
    moves = drained and spec.kind == "storage" and seen.state == "running" and not spec.pmem
    lost = [] if keeps_files or moves else _files(paths, blades, spec)
    if seen.state == "running" and spec.kind == "memory" and not drained:
        lost += _memory(paths, spec)
    elif seen.state == "running":
        lost += _programs(paths, spec)
    if seen.state == "running" and not spec.pmem and not drained:  # else they are in what is kept, or named above
        lost += chunks(paths, spec)
    if not keeps_files:
        lost += _places(paths, blades, spec)
    return lost


def used_memory(paths: RackPaths, spec: BladeSpec) -> int:
    """Bytes of a running memory blade that others have. RacklessError when it does not answer."""
    stats = memory_stats(paths, spec)
    return int(stats["bytes_allocated"]) + int(stats["bytes_of_others"])


def _memory(paths: RackPaths, spec: BladeSpec) -> list[str]:
    stats = memory_stats(paths, spec)
    found = {"memory of programs": int(stats["bytes_allocated"]), "memory of LITE": int(stats["bytes_of_others"])}
    return [f"{what} ({max(used >> 20, 1)} MiB)" for what, used in found.items() if used]


def memory_stats(paths: RackPaths, spec: BladeSpec) -> dict[str, Any]:
    """What a running memory blade says of its memory. RacklessError when it does not answer."""
    return agents.call(paths, spec.name, spec.mgmt_address, "memory.stats", paths.settings.control_seconds)


def _programs(paths: RackPaths, spec: BladeSpec) -> list[str]:
    if spec.kind != "processor":
        return []
    stats = agents.call(paths, spec.name, spec.mgmt_address, "process.stats", paths.settings.control_seconds)
    return [f"programs that run on it ({stats['programs']})"] if stats["programs"] else []


def chunks(paths: RackPaths, spec: BladeSpec) -> list[str]:
    """In words, what a running blade owns of Hotpot's datasets. RacklessError when it does not answer."""
    told = agents.call(paths, spec.name, spec.mgmt_address, "hotpot.stat", paths.settings.control_seconds)
    owned = [dataset for dataset, has in told.get("datasets", {}).items() if has["owned_chunks"]]
    return [f"chunks of Hotpot datasets that it owns ({', '.join(owned)})"] if owned else []


def _files(paths: RackPaths, blades: Mapping[str, Observed], spec: BladeSpec) -> list[str]:
    if spec.pmem:
        return ["its persistent memory"]
    if spec.kind != "storage":
        return []
    if blades[spec.name].state != "running":  # nobody can tell what is on it
        return ["its disk"]
    for vnode in _vnodes(paths, blades):
        if vnode["storage"] == spec.name:
            return [f"the files of vNode {vnode['name']}"]
    return []  # a disk that no vNode ever had files on


def _places(paths: RackPaths, blades: Mapping[str, Observed], spec: BladeSpec) -> list[str]:
    """vNodes that were made of this blade: nothing would be in its place. The default one is of all there are."""
    field = {"processor": "processors", "memory": "memory"}.get(spec.kind)
    if field is None:
        return []
    users = [v["name"] for v in _vnodes(paths, blades) if v["name"] != DEFAULT_VNODE and spec.name in v[field]]
    return [f"its place in vNode {', '.join(users)}"] if users else []


def _vnodes(paths: RackPaths, blades: Mapping[str, Observed]) -> list[dict[str, Any]]:
    running = {name: seen.spec for name, seen in blades.items() if seen.state == "running" and seen.spec}
    found: list[dict[str, Any]] = managers.ask(paths, running, "vnode.list")["vnodes"]
    return found
