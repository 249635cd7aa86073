"""How links are drawn: states by the rack file and by faults; the drawings are well-formed and say the same."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from orchestrator import wiring
from orchestrator.faults.model import Faults
from orchestrator.hypervisor.domain import Owned
from orchestrator.model import Link
from tests.unit.stand_in import blade_specs

SPECS = blade_specs("t1", ("gm0", "pb0", "mb0", "mb1", "pb1"))
SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize(
    ("link", "faults", "power", "state", "words"),
    [
        ({}, {}, "running", "up", ()),
        ({}, {"cpu": "10 %", "paused": True}, "paused", "up", ()),
        ({"latency": "50 us", "bandwidth": "1 Gbit/s"}, {}, "running", "shaped",
         ("latency 50 us", "bandwidth 1 Gbit/s")),
        ({"latency": "50 us"}, {"loss": "1 %"}, "running", "lossy", ("latency 50 us", "fault: loss 1 %")),
        ({}, {"latency": "20 ms"}, "running", "shaped", ("fault: latency 20 ms",)),
        ({}, {"deaf_to": ["mb1"]}, "running", "lossy", ("fault: deaf to mb1",)),
        ({}, {"down": True}, "running", "cut", ("fault: down",)),
        ({}, {"side": 1, "loss": "1 %"}, "running", "cut", ("fault: side 1", "fault: loss 1 %")),
        ({}, {"side": 0}, "running", "up", ("fault: side 0",)),
        ({}, {"killed": True}, "off", "cut", ()),
        ({}, {}, "crashed", "cut", ()),
    ],
)  # fmt: skip
def test_how_a_link_is(link: dict[str, Any], faults: dict[str, Any], power: str, state: str, words: tuple[str]) -> None:
    spec = replace(SPECS["mb0"], link=Link.model_validate(link))
    made = wiring.wire(spec, Faults.model_validate(faults), power)
    assert (made.state, made.words) == (state, words)


def owned(name: str, state: str = "running", **faults: Any) -> Owned:
    metadata = {"rack": "t1", "blade": name, "ready": True, "spec": SPECS[name].to_json(), "faults": faults}
    return Owned(SimpleNamespace(), state, metadata)


def drawn() -> list[wiring.Wire]:
    """All four states, on two sides; one blade of another version."""
    found = {"pb1": owned("pb1", "off"), "gm0": owned("gm0"), "pb0": owned("pb0", latency="1 ms"),
             "mb0": owned("mb0", loss="2 %"), "mb1": owned("mb1", side=1),
             "x": Owned(SimpleNamespace(), "running", {"rack": "t1", "blade": "x", "spec": {"kind": "<"}})}  # fmt: skip
    return wiring.of(found)


def test_wires_are_in_the_order_of_places() -> None:
    wires = drawn()
    assert [(wire.blade, wire.state, wire.side) for wire in wires] == [
        ("gm0", "up", 0), ("pb0", "shaped", 0), ("mb0", "lossy", 0), ("mb1", "cut", 1), ("pb1", "cut", 0)]  # fmt: skip


def test_svg_is_well_formed_and_shows_every_blade_with_its_link() -> None:
    tree = ElementTree.fromstring(wiring.svg("a<&>b", drawn()))
    groups = tree.findall(f"{SVG}g")
    shown = [("".join(g.findall(f"{SVG}text")[1].itertext()), g[0].get("class")) for g in groups]
    assert shown == [("gm0manager", "link up"), ("pb0processor", "link shaped"), ("mb0memory", "link lossy"),
                     ("mb1memory", "link cut"), ("pb1processor, off", "link cut")]  # fmt: skip
    assert "mb1 (memory) is running, its link cut" in str(tree.findtext(f"{SVG}title"))
    assert "a<&>b" in "".join(tree.itertext())
    assert len(tree.findall(f"{SVG}rect[@class='trunk']")) == 2
    starts = [str(g[0].get("d")).split()[0] for g in groups]
    assert starts[3] != starts[0], "it hangs on the other side's trunk"


def test_mermaid_has_a_line_and_a_colour_for_every_link() -> None:
    lines = [line.strip() for line in wiring.mermaid("t1", drawn()).splitlines()]
    assert lines[1] == "flowchart LR"
    assert 'fabric0 -.-|"fault: loss 2 %"| mb0' in lines
    assert 'fabric1 -.-x|"fault: side 1"| mb1' in lines
    assert "fabric0 --- gm0" in lines
    assert sum(line.startswith("linkStyle") for line in lines) == 5
    assert any(line.startswith("linkStyle 3 stroke:#c0342b") for line in lines)
