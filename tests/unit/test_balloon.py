"""Memory of blades that run: when it can change, what is asked of whom in which order, and what is refused."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from guest_agents import balloon as inside
from guest_agents import control
from guest_agents.budget import Budget
from orchestrator import engine, topology
from orchestrator.errors import RacklessError
from orchestrator.hypervisor import balloon
from orchestrator.image import build as image_build
from orchestrator.plan import Observed, make_plan
from orchestrator.rackfile import parse
from orchestrator.settings import Settings
from tests.unit.broken_racks import BrokenRack, broken_rack
from tests.unit.netns_racks import needs_root
from tests.unit.test_topology import IDLE, TEXT

MIB = 1 << 20
XML = """<domain><cpu><numa><cell id='0' cpus='0' memory='262144' unit='KiB'/></numa></cpu>
<devices><memballoon model='virtio'/>{}</devices></domain>"""


class Running:
    """A running domain whose balloon gives up only so much."""

    def __init__(self, least: int = 0, more: str = "") -> None:
        self.actual, self.least, self.asked = 256 * MIB, least, list[int]()
        self.xml = XML.format(more)

    def XMLDesc(self) -> str:  # noqa: N802 - libvirt names it so
        return self.xml

    def setMemoryFlags(self, kib: int, _flags: int) -> None:  # noqa: N802
        self.asked.append(kib >> 10)
        self.actual = max(kib * 1024, self.least)

    def memoryStats(self) -> dict[str, int]:  # noqa: N802
        return {"actual": self.actual // 1024}


def test_a_blade_can_have_what_it_was_started_with() -> None:
    assert balloon.most(Running()) == 256 * MIB
    assert balloon.most(Running(more="<memory model='nvdimm'/>")) is None


@pytest.mark.parametrize(
    ("memory", "most", "kind", "reason"),
    [
        ("200 MiB", 256, "update", "memory 256 MiB -> 200 MiB"),
        ("512 MiB", 512, "update", "memory 256 MiB -> 512 MiB"),
        ("512 MiB", 256, "recreate", "memory 256 MiB -> 512 MiB, and it was started with 256 MiB"),
        ("200 MiB", None, "recreate", "memory 256 MiB -> 200 MiB"),
    ],
)
def test_the_plan_says_how_and_why(memory: str, most: int | None, kind: str, reason: str) -> None:
    rack = parse(TEXT.format(name="t"))
    old = {action.blade: Observed(action.blade, "running", action.spec, most and most * MIB)
           for action in make_plan(rack, "image", {}).actions}  # fmt: skip
    changed = parse(TEXT.format(name="t").replace("mb0: {kind: memory,    memory: 256 MiB",
                                                  f"mb0: {{kind: memory,    memory: {memory}"))  # fmt: skip
    (action,) = make_plan(changed, "image", old).of("update", "recreate")
    assert (action.blade, action.kind, action.reasons) == ("mb0", kind, (reason,))


# The blade's side


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    told: list[str] = []
    monkeypatch.setattr(subprocess, "run", lambda words, check: told.append(" ".join(words)))
    monkeypatch.setattr(inside, "free_memory", lambda: 100 * MIB)
    return told


def test_a_memory_blade_gives_less_to_others_first(loaded: list[str]) -> None:
    budget = Budget(64 * MIB)
    budget.take("programs", 40 * MIB)
    inside.resize(256 * MIB, 240 * MIB, budget, dry=True)
    assert (budget.total, loaded) == (64 * MIB, [])
    inside.resize(256 * MIB, 240 * MIB, budget)
    assert (budget.total, loaded) == (48 * MIB, ["modprobe virtio_balloon"])
    for dry in (True, False):
        with pytest.raises(control.ControlError, match="all but 8 MiB of its memory are in use"):
            inside.resize(240 * MIB, 231 * MIB, budget, dry)
    inside.resize(240 * MIB, 256 * MIB, budget)
    assert budget.total == 64 * MIB


def test_a_blade_keeps_what_its_system_needs(loaded: list[str]) -> None:
    inside.resize(512 * MIB, 440 * MIB, None)
    with pytest.raises(control.ControlError, match="all but 76 MiB"):
        inside.resize(512 * MIB, 400 * MIB, None)


# The host's side


@pytest.fixture
def rack(monkeypatch: pytest.MonkeyPatch) -> Iterator[BrokenRack]:
    monkeypatch.setattr(image_build, "image_key", lambda _recipe, _flavour: "0" * 64)
    with broken_rack(monkeypatch) as made:
        made.replies.update({f"{name} memory.stats": IDLE for name in ("mb0", "mb1")})
        yield made


@pytest.mark.netns
@needs_root
class TestOnBlades:
    def test_it_is_done_when_the_balloon_says_so(self, rack: BrokenRack) -> None:
        running, spec = Running(), replace(rack.specs["mb0"], memory=200 * MIB)
        balloon.resize(rack.paths, running, spec, 256 * MIB)
        assert running.asked == [200]
        balloon.resize(rack.paths, running, replace(spec, memory=256 * MIB), 200 * MIB)
        assert running.asked == [200, 256]

    def test_a_balloon_that_does_not_move_is_undone(self, rack: BrokenRack) -> None:
        running, spec = Running(least=220 * MIB), replace(rack.specs["mb0"], memory=200 * MIB)
        paths = replace(rack.paths, settings=replace(rack.paths.settings, control_seconds=0.3))
        with pytest.raises(RacklessError, match="mb0 has 220 MiB and not 200 MiB"):
            balloon.resize(paths, running, spec, 256 * MIB)
        assert running.asked == [200, 256]
        assert running.actual == 256 * MIB

    def test_a_balloon_that_cannot_be_undone_is_told_to_the_agent(
        self, rack: BrokenRack, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        told: list[tuple[int, int]] = []
        monkeypatch.setattr(balloon, "_tell", lambda _paths, _spec, before, after: told.append((before, after)))
        running, spec = Running(least=220 * MIB), replace(rack.specs["mb0"], memory=200 * MIB)
        monkeypatch.setattr(running, "memoryStats", lambda: {"actual": 220 * 1024})
        paths = replace(rack.paths, settings=replace(rack.paths.settings, control_seconds=0.2))
        with pytest.raises(RacklessError, match="mb0 has 220 MiB and not 200 MiB"):
            balloon.resize(paths, running, spec, 256 * MIB)
        assert running.asked == [200, 256]
        assert told == [(256 * MIB, 200 * MIB), (200 * MIB, 256 * MIB)]

    def test_below_what_is_in_use_it_is_refused_before_anything_is_touched(
        self, rack: BrokenRack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(balloon, "most", lambda _domain: 256 * MIB)
        file = tmp_path / "rack.yml"
        file.write_text(TEXT.format(name=rack.name))
        settings: Settings = rack.paths.settings
        done = topology.resize(settings, file, "mb1", {"memory": "200 MiB"})
        assert done.lines() == ["mb1: changed while it runs (memory 256 MiB -> 200 MiB)"]
        refused: Any = control.ControlError("all but 3 MiB of its memory are in use", "shrink it by less")
        rack.replies["mb0 agent.resize"] = refused
        before = file.read_text()
        with pytest.raises(RacklessError, match="mb0: all but 3 MiB of its memory are in use"):
            topology.resize(settings, file, "mb0", {"memory": "200 MiB"})
        assert file.read_text() == before
        assert [only for _, only in rack.ups] == [{"mb1"}]
        assert engine.plan(settings, parse(before)).of("update")[0].blade == "mb1"
