"""The rack as a drawing needs it: blades, the sides of the fabric, and how each link is.

`rackless graph` draws it as SVG or Mermaid, the dashboard in a browser.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.errors import RacklessError
from orchestrator.faults.model import LINK, Faults
from orchestrator.faults.model import of as faults_of
from orchestrator.hypervisor import hosts
from orchestrator.settings import RackPaths, Settings
from orchestrator.spec import BladeSpec
from orchestrator.templates import render
from orchestrator.units import format_size

if TYPE_CHECKING:
    from orchestrator.hypervisor.domain import Owned

State = Literal["up", "shaped", "lossy", "cut"]
STATES: dict[State, str] = {
    "up": "as fast as it can be",
    "shaped": "slowed down or limited",
    "lossy": "loses, spoils or repeats packets",
    "cut": "nothing passes",
}
"""How a link can be, from the best to the worst."""


@dataclass(frozen=True)
class Wire:
    """A blade and its link to the fabric."""

    blade: str
    kind: str
    address: str
    power: str
    """running, paused, crashed or off."""
    size: str
    """CPUs and memory, for people."""
    state: State
    words: tuple[str, ...]
    """What is special about the link: by the rack file, and faults."""
    side: int = 0
    """Which part of a parted fabric it is in; 0 is the manager's."""
    faults: tuple[str, ...] = ()
    """All that was broken of the blade on purpose, in words."""

    def to_json(self) -> dict[str, Any]:
        """For the dashboard."""
        return asdict(self)


def look(settings: Settings, rack: str) -> list[Wire]:
    """The blades of a rack in the order of their places. RacklessError when it is not up."""
    with hosts.opened(RackPaths(settings, rack)) as machines:
        wires = of(machines.owned())
    if not wires:
        raise RacklessError(f"rack {rack} is not up", hint="bring it up with `rackless up`")
    return wires


def of(found: Mapping[str, Owned]) -> list[Wire]:
    """The wires of blades as libvirt knows them; of one that another version made nothing is known."""
    known: list[tuple[BladeSpec, Owned]] = []
    for owned in found.values():
        try:
            known.append((owned.spec(), owned))
        except ValueError:
            continue
    return [wire(spec, faults_of(owned.state, owned.metadata), owned.state)
            for spec, owned in sorted(known, key=lambda pair: pair[0].index)]  # fmt: skip


def wire(spec: BladeSpec, faults: Faults, power: str) -> Wire:
    """How the link of one blade is."""
    special = type(spec.link)().model_dump(mode="json")
    said = [f"{name} {value}" for name, value in spec.link.model_dump(mode="json").items() if value != special[name]]
    others = set(faults.names) - {"down", "side", *LINK}
    broken = faults.without(*others) if others else faults
    words = (*said, *(f"fault: {word}" for word in broken.shown()))
    size = f"{spec.cpus} CPU{'s' if spec.cpus > 1 else ''}, {format_size(spec.memory)}"
    return Wire(spec.name, spec.kind, spec.fabric_address, power, size, _state(spec, faults, power), words,
                faults.side or 0, tuple(faults.shown()))  # fmt: skip


def _state(spec: BladeSpec, faults: Faults, power: str) -> State:
    link = spec.link
    if faults.down or faults.side or power not in ("running", "paused"):
        return "cut"
    if link.loss or faults.loss or faults.corruption or faults.duplication or faults.deaf_to:
        return "lossy"
    if link.latency or link.jitter or link.bandwidth or faults.latency or faults.jitter or faults.bandwidth:
        return "shaped"
    return "up"


def mermaid(rack: str, wires: list[Wire]) -> str:
    """The rack as a Mermaid flowchart, for Markdown."""
    sides = sorted({wire.side for wire in wires})
    return render("graph.mmd.j2", rack=rack, wires=wires, sides=sides)


def svg(rack: str, wires: list[Wire]) -> str:
    """The rack as a drawing of its own, readable in dark and light."""
    return render("graph.svg.j2", rack=rack, wires=wires, sides=sorted({0, *(wire.side for wire in wires)}),
                  states=STATES)  # fmt: skip
