"""Scenarios: what their files may say, that chance is drawn from the seed, and that all is rehearsed first."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import journal
from orchestrator.errors import RacklessError
from orchestrator.events import ignore
from orchestrator.faults import inject, scenario
from orchestrator.faults.scenario import Scenario
from tests.unit.broken_racks import BrokenRack, broken_rack
from tests.unit.netns_racks import needs_root

KINDS = {"gm0": "manager", "pb0": "processor", "mb0": "memory", "mb1": "memory"}
STORY = """\
# two deaths and a slow link
seed: 7
steps:
  - at 10 s kill mb0
  - at 0.1 s link mb1 latency 20 ms loss 1 %
  - at 5 s to 8 s pause any processor
  - at 9 s resume pb0
  - at 20 s heal
"""


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def written(text: str) -> Path:
        file = tmp_path / "story.yml"
        file.write_text(text)
        return file

    return written


def test_a_story_in_order(write: Any) -> None:
    script = scenario.load(write(STORY))
    acts = script.acts(KINDS)
    assert [act.text for act in acts] == [
        "link mb1 latency 20 ms loss 1 %", "pause pb0", "resume pb0", "kill mb0", "heal",
    ]  # fmt: skip
    assert [act.at for act in acts if act.text != "pause pb0"] == [0.1, 9, 10, 20]
    assert 5 <= acts[1].at <= 8


def test_on_one_line(write: Any) -> None:
    assert [act.text for act in scenario.load(write("steps: at 10 s kill mb0; at 20 s heal\n")).acts(KINDS)] == [
        "kill mb0", "heal",
    ]  # fmt: skip


def test_disks_and_clocks(write: Any) -> None:
    story = "steps: at 1 s disk mb0 latency 20 ms full; at 2 s disk mb1 errors all; at 3 s clock gm0 -1 h"
    acts = scenario.load(write(story)).acts(KINDS)
    assert [act.text for act in acts] == ["disk mb0 latency 20 ms full", "disk mb1 errors all", "clock gm0 -1 h"]
    for words in ("disk mb0", "disk mb0 errors", "clock mb0", "disk mb0 slow"):
        with pytest.raises(RacklessError, match="too few or too many words"):
            scenario.load(write(f"steps: at 1 s {words}")).acts(KINDS)


@given(st.integers())
def test_chance_comes_from_the_seed(seed: int) -> None:
    steps = tuple(scenario._step(f"at 0 s to {n} s kill any memory", "x:1") for n in range(1, 9))

    def drawn(kinds: dict[str, str]) -> list[tuple[float, str]]:
        return [(act.at, act.text) for act in Scenario(seed, steps).acts(kinds)]

    assert drawn(KINDS) == drawn(dict(reversed(KINDS.items())))
    assert {text for _, text in drawn(KINDS)} <= {"kill mb0", "kill mb1"}


def test_what_survives_in_persistent_memory_comes_from_the_seed_too(write: Any) -> None:
    steps = "steps: at 1 s kill mb0 mb1 survive 50 % seed 3; at 2 s reset mb0 survive 5 %; at 3 s kill any memory"
    told = [[act.text for act in scenario.load(write(steps), seed).acts(KINDS)] for seed in (1, 1, 2)]
    assert told[0] == told[1] != told[2]
    assert told[0][0] == "kill mb0 mb1 survive 50 % seed 3"
    assert re.fullmatch(r"reset mb0 survive 5 % seed \d+", told[0][1])
    assert re.fullmatch(r"kill mb[01]", told[0][2])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "story.yml:1: there are no steps"),
        ("steps: []", "story.yml:1: the steps are not a list"),
        ("steps:\n- at 1 s kill mb0\n- kill mb0", 'story.yml:3: "kill mb0" does not begin with a time'),
        ("steps:\n- at 10 kill mb0", "story.yml:2: .*unit"),
        ("steps:\n- at 5 s to 2 s kill mb0", "story.yml:2: 5 s is after 2 s"),
        ("steps:\n- at 5 s explode mb0", 'story.yml:2: nothing is called "explode"'),
        ("steps:\n- at 5 s kill", 'story.yml:2: "kill" has too few'),
        ("steps:\n- at 5 s kill survive 5 %", 'story.yml:2: "kill survive 5 %.*" has too few'),
        ("steps:\n- at 5 s reset mb0 mb1 survive 5 %", "story.yml:2: .* too many words"),
        ("steps:\n- at 5 s slow mb0", 'story.yml:2: "slow mb0" has too few'),
        ("steps:\n- at 5 s link mb0 speed 3", 'story.yml:2: "link mb0 speed 3" has too few'),
        ("steps:\n- at 5 s kill any storage", "story.yml:2: the rack has no storage blade"),
        ("seed: x\nsteps:\n- at 5 s heal", "story.yml:1: the seed"),
        ("sed: 1\nsteps:\n- at 5 s heal", 'story.yml:1: unknown key "sed"'),
        ("steps:\n- at 5 s heal\n- {a: 1}", "story.yml:1: the steps are not a list of lines"),
    ],
)
def test_a_file_that_says_nothing_sensible(write: Any, text: str, message: str) -> None:
    with pytest.raises(RacklessError, match=message):
        scenario.load(write(text)).acts(KINDS)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RacklessError, match=r"none\.yml: No such file"):
        scenario.load(tmp_path / "none.yml")


@pytest.fixture
def rack(monkeypatch: pytest.MonkeyPatch) -> Iterator[BrokenRack]:
    with broken_rack(monkeypatch) as made:
        yield made


@pytest.mark.netns
@needs_root
class TestOnARack:
    @pytest.mark.long
    def test_it_is_played(self, rack: BrokenRack, write: Any) -> None:
        text = """
            steps:
            - at 0 s one-way mb0 pb0
            - at 0 s one-way mb1 pb0
            - at 10 ms pause mb0
            - at 20 ms partition mb0 mb1
            - at 30 ms resume mb0
            - at 40 ms slow gm0 50 %
            """
        settings, name = rack.paths.settings, rack.name
        acts = scenario.rehearse(settings, name, scenario.load(write(text)))
        assert not any(inject.faults(settings, name).values()), "a rehearsal touches nothing"
        done = scenario.play(settings, name, acts, ignore)
        assert [step["step"] for step in done][2:] == ["pause mb0", "partition mb0 mb1", "resume mb0", "slow gm0 50 %"]
        told = [event["message"] for event in journal.Tail(rack.paths.events).new() if event["event"] == "note"]
        assert [line for line in told if line.startswith(f"{name}: ")] == [f"{name}: {step['step']}" for step in done]
        assert all(step["begun"] >= step["at"] for step in done)
        shown = {blade: faults.shown() for blade, faults in inject.faults(settings, name).items()}
        assert shown == {"gm0": ["side 0", "cpu 50 %"], "pb0": ["side 0", "deaf to mb0,mb1"],
                         "mb0": ["side 1"], "mb1": ["side 2"]}  # fmt: skip
        assert rack.parts() == [{"gm0", "pb0"}, {"mb0"}, {"mb1"}]

    @pytest.mark.parametrize(
        ("step", "message"),
        [
            ("at 2 s kill mb9", r"at 2\.0 s kill mb9: no blade mb9"),
            ("at 2 s pause mb0", r"mb0 is killed"),
            ("at 2 s link mb1 jitter 1 ms", "jitter of mb1"),
            ("at 2 s partition mb1 mb8", r"at 2\.0 s partition mb1 mb8: no blade mb8"),
            ("at 2 s link mb1 loss 1", "fault loss"),
        ],
    )
    def test_what_would_be_refused_at_the_end_touches_nothing(
        self, rack: BrokenRack, write: Any, step: str, message: str
    ) -> None:
        script = scenario.load(write(f"steps:\n- at 1 s kill mb0\n- {step}\n"))
        with pytest.raises(RacklessError, match=message):
            scenario.rehearse(rack.paths.settings, rack.name, script)
        assert rack.state("mb0") == "running"
