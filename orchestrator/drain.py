"""Empty a blade before it is removed: what can move to other blades, and what would be lost all the same.

LITE moves its memory itself (guest_agents/lite/drain.py), while programs use it. Memory of programs of the splitkernel,
files and Hotpot's chunks do not move: a blade that has the last copy of any is not removed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator import agents, holdings, managers
from orchestrator.errors import RacklessError
from orchestrator.plan import Observed
from orchestrator.settings import RackPaths
from orchestrator.spec import BladeSpec


def lost_with(paths: RackPaths, blades: Mapping[str, Observed], name: str) -> list[str]:
    """In words, what nobody has any more once blade `name` is drained and gone. RacklessError if nobody can tell."""
    lost = holdings.lost_with(paths, blades, name, drained=True)
    spec = blades[name].spec
    if spec is None or blades[name].state != "running":
        return lost
    held = _ask(paths, blades, spec, dry=True)
    if held["own"]:
        lost.append(f"memory of LITE that only its own programs use ({held['own']} LMRs)")
    if held["locks"]:
        lost.append(f"locks of LITE ({', '.join(held['locks'])})")
    told = agents.call(paths, name, spec.mgmt_address, "hotpot.stat", paths.settings.control_seconds)
    owned = [dataset for dataset, has in told.get("datasets", {}).items() if has["owned_chunks"]]
    if owned:
        lost.append(f"chunks of Hotpot datasets that it owns ({', '.join(owned)})")
    return lost


def drain(paths: RackPaths, blades: Mapping[str, Observed], name: str) -> int:
    """Move what can be moved; the bytes that were. Nothing new is put on the blade from now on, until it is gone.

    RacklessError when there is no room on other blades, or somebody took memory there meanwhile: then blade `name`
    is used as before.
    """
    spec = blades[name].spec
    if spec is None or blades[name].state != "running":
        return 0
    moved = int(_ask(paths, blades, spec)["moved"])
    lost = lost_with(paths, blades, name)
    if lost or movable(paths, blades, name):
        _ask(paths, blades, spec, cancel=True)
        raise RacklessError(f"{name} was drained, and is used again: {' and '.join(lost) or 'memory of LITE'}",
                            hint="try again, or --force")  # fmt: skip
    return moved


def movable(paths: RackPaths, blades: Mapping[str, Observed], name: str) -> int:
    """Bytes that `drain` would move now."""
    spec = blades[name].spec
    running = spec is not None and blades[name].state == "running"
    return int(_ask(paths, blades, spec, dry=True)["moved"]) if spec is not None and running else 0


def _ask(paths: RackPaths, blades: Mapping[str, Observed], spec: BladeSpec, **fields: bool) -> dict[str, Any]:
    """One request to LITE's directory, which is on the manager and answers for one life of it."""
    running = {name: seen.spec for name, seen in blades.items() if seen.state == "running" and seen.spec}
    members = managers.ask(paths, running, "member.list")["members"]
    first = min((other for other in running.values() if other.kind == "manager"), key=lambda other: other.index)
    life = next(([m["node_id"], m["incarnation"]] for m in members if m["name"] == first.name), None)
    if life is None:
        raise RacklessError(f"{first.name} is no member of its own rack", hint=f"see `rackless logs {first.name}`")
    if not any(m["name"] == spec.name and m["state"] == "alive" for m in members):
        return {"moved": 0, "own": 0, "locks": []}  # dead to all others: they have done without it for long
    return managers.ask(paths, running, "lite.directory.drain", node=spec.name, meant_for=life, **fields)
