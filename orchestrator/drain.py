"""Empty a blade before it is removed: what can move to other blades, and what would be lost all the same.

Memory moves while programs use it: that of LITE by its own means (guest_agents/lite/drain.py), that of programs of the
splitkernel by the machinery of copies (native/replica.h): each gets a second place elsewhere, and then does without the
blade. Memory of static programs does not move. Files move to another storage blade (departure.py), and Hotpot's chunks
get other owners (guest_agents/hotpot/migration.py), who then have copies made in place of this blade's.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from orchestrator import agents, departure, holdings, managers
from orchestrator.errors import RacklessError
from orchestrator.plan import Observed
from orchestrator.settings import RackPaths
from orchestrator.spec import BladeSpec

_SLOWEST = 1 << 20
"""Bytes per second that programs copy at least, without KVM and while they work."""
_POLL_SECONDS = 0.2
_HOTPOT = "hotpot."
"""How the names of its LMRs begin (guest_agents/hotpot/home.py): they go when their chunks do."""


def lost_with(paths: RackPaths, blades: Mapping[str, Observed], name: str) -> list[str]:
    """In words, what nobody has any more once blade `name` is drained and gone. RacklessError if nobody can tell."""
    lost = holdings.lost_with(paths, blades, name, drained=True)
    spec = blades[name].spec
    if spec is None or blades[name].state != "running":
        return lost
    used = _of_programs(paths, spec)
    room = sum(_room(paths, other) for other in _running(blades, "memory") if other != spec) if used else 0
    if used > room:
        lost.append(f"memory of programs ({max(used >> 20, 1)} MiB, and others have room for {room >> 20} MiB)")
    if not spec.pmem and (owned := holdings.chunks(paths, spec)) and not _heirs(paths, blades, spec):
        lost += [f"{what}: there is no other blade with Hotpot" for what in owned]
    if spec.kind == "storage":
        lost += departure.refusals(paths, _running(blades), spec)
    held = _ask(paths, blades, spec, dry=True)
    if held["own"]:
        lost.append(f"memory of LITE that only its own programs use ({held['own']} LMRs)")
    if held["locks"]:
        lost.append(f"locks of LITE ({', '.join(held['locks'])})")
    return lost


def drain(paths: RackPaths, blades: Mapping[str, Observed], name: str) -> int:
    """Move what can be moved; the bytes that were. Nothing new is put on the blade from now on, until it is gone.

    RacklessError when there is no room on other blades, when programs do not give it up, or when somebody took memory
    there meanwhile: then blade `name` is used as before, without what has moved.
    """
    spec = blades[name].spec
    if spec is None or blades[name].state != "running":
        return 0
    try:
        moved = _chunks(paths, blades, spec)  # before LITE, whose LMRs they are in
        moved += int(_ask(paths, blades, spec)["moved"]) + _programs(paths, blades, spec)
        if spec.kind == "storage":
            moved += departure.move(paths, _running(blades), spec)
        lost = lost_with(paths, blades, name)
        if lost or movable(paths, blades, name):
            raise RacklessError(f"{name} was drained, and is used again: {' and '.join(lost) or 'memory'}",
                                hint="try again, or --force")  # fmt: skip
    except BaseException:
        cancel(paths, blades, name)
        raise
    return moved


def cancel(paths: RackPaths, blades: Mapping[str, Observed], name: str) -> None:
    """Have blade `name` used again, which was to be drained. Who does not answer is left out, and so is not told."""
    spec = blades[name].spec if name in blades else None
    if spec is None or blades[name].state != "running":
        return
    with suppress(RacklessError):  # one that cannot be told must not keep the others from it
        _ask(paths, blades, spec, cancel=True)
    if spec.kind == "storage":
        departure.cancel(paths, _running(blades), spec)
    for other in _running(blades, "processor"):
        with suppress(RacklessError):
            _tell(paths, other, name, cancel=True)


def movable(paths: RackPaths, blades: Mapping[str, Observed], name: str) -> int:
    """Bytes that `drain` would move now."""
    spec = blades[name].spec
    if spec is None or blades[name].state != "running":
        return 0
    files = departure.used(paths, spec) if spec.kind == "storage" else 0
    held = int(sum(_depart(paths, spec)["datasets"].values()))
    return int(_ask(paths, blades, spec, dry=True)["moved"]) + _of_programs(paths, spec) + held + files


def _programs(paths: RackPaths, blades: Mapping[str, Observed], spec: BladeSpec) -> int:
    """Have programs take their memory elsewhere; bytes they had. RacklessError when they do not."""
    used = _of_programs(paths, spec)
    if spec.kind == "memory":
        for other in _running(blades, "processor"):
            _tell(paths, other, spec.name)
    deadline = time.monotonic() + paths.settings.control_seconds + used / _SLOWEST
    while left := _of_programs(paths, spec):
        if time.monotonic() > deadline:
            raise RacklessError(f"removing {spec.name} would lose memory of programs ({max(left >> 20, 1)} MiB): they "
                                "found no place for it on the blades they know",
                                hint="wait for them to end, or --force")  # fmt: skip
        time.sleep(_POLL_SECONDS)
    return used


def _chunks(paths: RackPaths, blades: Mapping[str, Observed], spec: BladeSpec) -> int:
    """Have chunks of Hotpot's datasets owned by others; their bytes. RacklessError when they do not go."""
    last = begun = _depart(paths, spec)
    heirs = _heirs(paths, blades, spec) if begun["datasets"] else []
    since = time.monotonic()
    while (now := _depart(paths, spec, heirs))["datasets"]:
        if now != last:
            last, since = now, time.monotonic()
        if time.monotonic() - since > paths.settings.control_seconds:
            raise RacklessError(f"chunks of Hotpot datasets ({', '.join(now['datasets'])}) do not leave {spec.name}",
                                hint=f"have others room? see `rackless logs {spec.name}`; or --force")  # fmt: skip
        time.sleep(_POLL_SECONDS)
    return int(sum(begun["datasets"].values()))


def _heirs(paths: RackPaths, blades: Mapping[str, Observed], spec: BladeSpec) -> list[int]:
    """Nodes that can own Hotpot's chunks, memory blades alone if there are any."""
    nodes: dict[str, list[int]] = {}
    for other in _running(blades):
        if other != spec:
            told = agents.call(paths, other.name, other.mgmt_address, "hotpot.stat", paths.settings.control_seconds)
            nodes.setdefault(other.kind, []).extend([told["node_id"]] if "node_id" in told else [])
    return nodes.get("memory") or sorted(node for some in nodes.values() for node in some)


def _depart(paths: RackPaths, spec: BladeSpec, nodes: Sequence[int] = ()) -> dict[str, Any]:
    """Begin to move Hotpot's chunks to nodes; what is on the blade. Of one with persistent memory nothing moves."""
    if spec.pmem:
        return {"datasets": {}}
    return agents.call(paths, spec.name, spec.mgmt_address, "hotpot.depart", paths.settings.control_seconds,
                       nodes=list(nodes))  # fmt: skip


def _tell(paths: RackPaths, processor: BladeSpec, name: str, **fields: bool) -> None:
    agents.call(paths, processor.name, processor.mgmt_address, "process.drain", paths.settings.control_seconds,
                memory=name, **fields)  # fmt: skip


def _of_programs(paths: RackPaths, spec: BladeSpec) -> int:
    return int(holdings.memory_stats(paths, spec)["bytes_allocated"]) if spec.kind == "memory" else 0


def _room(paths: RackPaths, spec: BladeSpec) -> int:
    stats = holdings.memory_stats(paths, spec)
    return int(stats["bytes_total"]) - int(stats["bytes_of_others"]) - int(stats["bytes_allocated"])


def _running(blades: Mapping[str, Observed], kind: str | None = None) -> list[BladeSpec]:
    running = [seen.spec for seen in blades.values() if seen.state == "running" and seen.spec]
    return [spec for spec in running if kind in (None, spec.kind)]


def _ask(paths: RackPaths, blades: Mapping[str, Observed], spec: BladeSpec, **fields: bool) -> dict[str, Any]:
    """One request to LITE's directory, which is on the manager and answers for one life of it."""
    running = {name: seen.spec for name, seen in blades.items() if seen.state == "running" and seen.spec}
    members = managers.ask(paths, running, "member.list")["members"]
    first = min(_running(blades, "manager"), key=lambda other: other.index)
    life = next(([m["node_id"], m["incarnation"]] for m in members if m["name"] == first.name), None)
    if life is None:
        raise RacklessError(f"{first.name} is no member of its own rack", hint=f"see `rackless logs {first.name}`")
    if not any(m["name"] == spec.name and m["state"] == "alive" for m in members):
        return {"moved": 0, "own": 0, "locks": []}  # dead to all others: they have done without it for long
    but = "" if spec.pmem else _HOTPOT
    return managers.ask(paths, running, "lite.directory.drain", node=spec.name, meant_for=life, but=but, **fields)
