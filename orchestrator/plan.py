"""What to do: the difference between the rack file and the blades that exist. Pure: it looks at nothing else.

`make_plan` computes the spec every blade should have, compares it with the one it has (kept in its domain's
libvirt metadata), and gives one Action with its reasons per blade. Once a plan is carried out, planning again
gives nothing to do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from orchestrator.errors import RacklessError
from orchestrator.model import Rack, blade_capacity
from orchestrator.spec import BladeSpec, Change, changes, make_spec
from orchestrator.units import format_size

State = Literal["running", "paused", "stopped", "broken", "absent"]
ActionKind = Literal["create", "recreate", "update", "remove", "keep"]

SYMBOLS: dict[ActionKind, str] = {"create": "+", "recreate": "!", "update": "~", "remove": "-", "keep": "="}


@dataclass(frozen=True)
class Observed:
    """A blade as libvirt shows it.

    running: up and once ready. paused: its CPUs are stopped. stopped: defined, but not running. broken: half
    made, or crashed. absent: nothing there. `spec` is None when its metadata is missing or cannot be read.
    """

    name: str
    state: State
    spec: BladeSpec | None = None
    memory_most: int | None = None
    """Bytes of memory that it can have without being made anew; None when its memory cannot change while it runs."""


@dataclass(frozen=True)
class Action:
    """What to do to one blade, and why."""

    kind: ActionKind
    blade: str
    spec: BladeSpec | None
    """The blade afterwards; None when it is removed."""
    old: BladeSpec | None
    """The blade before; None when there is none, or none that can be read."""
    reasons: tuple[str, ...]

    @property
    def loses(self) -> tuple[str, ...]:
        """What of the old blade does not outlive this action: its disk, its persistent memory.

        A blade made anew finds a disk or a pmem of the size it wants as it was left; any other is made anew.
        """
        if self.kind not in ("recreate", "remove") or self.old is None:
            return ()
        disk, pmem = self.old.disk, self.old.pmem
        stays = self.spec
        if stays and stays.host != self.old.host:
            stays = None  # files do not move with it
        kept_disk = disk and stays and stays.disk and stays.disk.size == disk.size
        kept_pmem = pmem and stays and stays.pmem == pmem
        lost = ("its disk" if disk and not kept_disk else "", "its persistent memory" if pmem and not kept_pmem else "")
        return tuple(filter(None, lost))

    def to_json(self) -> dict[str, Any]:
        return {
            "blade": self.blade,
            "action": self.kind,
            "reasons": list(self.reasons),
            "loses": list(self.loses),
            "spec": self.spec.to_json() if self.spec else None,
        }


@dataclass(frozen=True)
class Plan:
    """One action per blade of the rack file, after those for blades that leave.

    Removals come first, and must be carried out first: a new blade may get the address of one that leaves.
    """

    rack: str
    actions: tuple[Action, ...]

    @property
    def pending(self) -> bool:
        """Whether there is anything to do."""
        return any(action.kind != "keep" for action in self.actions)

    def of(self, *kinds: ActionKind) -> tuple[Action, ...]:
        """The actions of these kinds, in the plan's order."""
        return tuple(action for action in self.actions if action.kind in kinds)

    def only(self, names: Collection[str]) -> Plan:
        """The plan for some blades: all others that are there stay as they are, and those that are not, do not come."""
        kept = (action if action.blade in names else Action("keep", action.blade, action.old, action.old, ())
                for action in self.actions)  # fmt: skip
        return Plan(self.rack, tuple(action for action in kept if action.kind != "keep" or action.spec))

    def to_json(self) -> dict[str, Any]:
        return {
            "rack": self.rack,
            "pending": self.pending,
            "actions": [action.to_json() for action in self.actions],
        }

    def render(self) -> list[str]:
        """Lines for people: one per blade with its reasons, then a summary."""
        width = max((len(action.blade) for action in self.actions), default=0)
        lines = []
        for action in self.actions:
            blade = action.spec or action.old
            columns = (
                f"{SYMBOLS[action.kind]} {action.blade:<{width}}",
                f"{action.kind:<8}",
                f"{blade.kind if blade else '':<9}",
                "; ".join((*action.reasons, *(f"{what} is lost" for what in action.loses))),
            )
            lines.append("  ".join(columns).rstrip())
        counts = Counter(action.kind for action in self.actions)
        if not self.pending:
            return [*lines, "nothing to do: the rack is as its file says"]
        verbs = [f"{counts[kind]} to {kind}" for kind in SYMBOLS if counts[kind]]
        return [*lines, ", ".join(verbs)]


def make_plan(rack: Rack, image_key: str, observed: Mapping[str, Observed],
              hosts: Mapping[str, str | None] | None = None) -> Plan:  # fmt: skip
    """Compare the rack file with the blades that exist.

    `image_key` names the image that blades should run; `observed` has the blades of this rack by name. A
    blade that exists keeps its index and so its addresses; a new one takes the lowest free index. `hosts` says which
    other host each blade is on (see placement.py), none in a rack of one host.
    """
    hosts = hosts or {}
    there = {name: seen for name, seen in observed.items() if seen.state != "absent"}
    places = _places(rack, there)
    leaving = [
        Action("remove", name, None, seen.spec, ("not in the rack file",))
        for name, seen in there.items()
        if name not in rack.blades
    ]
    wanted = [
        _action(make_spec(rack, name, places[name], image_key, hosts.get(name)), there.get(name))
        for name in rack.blades
    ]
    return Plan(rack.name, (*leaving, *wanted))


def _action(spec: BladeSpec, seen: Observed | None) -> Action:
    if seen is None:
        where = f", goes to host {spec.host}" if spec.host else ""
        return Action("create", spec.name, spec, None, (f"not there yet{where}",))
    old = seen.spec
    if old is None:
        return Action("recreate", spec.name, spec, None, ("it has no description that can be read",))
    spec = replace(spec, mgmt_mac=old.mgmt_mac, fabric_mac=old.fabric_mac)  # a clone's are those of the original
    differences = changes(old, spec)
    reasons = [_why(change, spec, seen) for change in differences]
    if seen.state == "broken":
        return Action("recreate", spec.name, spec, old, ("it is half made or damaged", *reasons))
    if seen.state == "stopped":
        return Action("recreate", spec.name, spec, old, ("it is not running", *reasons))
    if seen.state == "paused":
        reasons.insert(0, "it is paused")
    if not all(change.live or (change.field == "memory" and _fits(spec, seen)) for change in differences):
        return Action("recreate", spec.name, spec, old, tuple(reasons))
    return Action("update" if reasons else "keep", spec.name, spec, old, tuple(reasons))


def _fits(spec: BladeSpec, seen: Observed) -> bool:
    """Can it have the memory it shall have while it runs?"""
    return seen.memory_most is not None and spec.memory <= seen.memory_most


def _why(change: Change, spec: BladeSpec, seen: Observed) -> str:
    if change.field != "memory" or seen.memory_most is None or _fits(spec, seen):
        return str(change)
    return f"{change}, and it was started with {format_size(seen.memory_most)}"


def _places(rack: Rack, there: Mapping[str, Observed]) -> dict[str, int]:
    """The index of every blade of the rack file."""
    room = min(blade_capacity(rack.fabric.subnet), blade_capacity(rack.management.subnet))
    places: dict[str, int] = {}
    for name in rack.blades:
        old = there[name].spec if name in there else None
        # A place that a smaller subnet no longer has, or that another blade holds, is given up.
        if old is not None and 0 <= old.index < room and old.index not in places.values():
            places[name] = old.index
    free = iter(sorted(set(range(len(rack.blades) + len(places))) - set(places.values())))
    return {name: places[name] if name in places else next(free) for name in rack.blades}


def check_capacity(rack: Rack, host_memory_bytes: int, host_cpus: int) -> None:
    """Refuse a rack that this host cannot hold. Raises RacklessError naming what is too large.

    Blades may have more CPUs together than the host, but none may have more than the host by itself.
    """
    memory = sum(blade.memory for blade in rack.blades.values())
    if memory > host_memory_bytes:
        largest = max(rack.blades, key=lambda name: rack.blades[name].memory)
        raise RacklessError(
            f"memory larger than the host: the blades of {rack.name} have {format_size(memory)} together, "
            f"the host has {host_memory_bytes // 1024**2} MiB",
            hint=f"write less memory or fewer blades; {largest} is the largest with "
            f"{format_size(rack.blades[largest].memory)}",
        )
    for name, blade in rack.blades.items():
        if blade.cpus > host_cpus:
            raise RacklessError(
                f"blades.{name}.cpus is {blade.cpus}, and the host has {host_cpus}",
                hint=f"write cpus: {host_cpus}, and cpu_quota to slow a blade down",
            )
