"""The second tier's books: groups and the device behind them, with plain folders for groups and scripts for `swapd`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from guest_agents.control import ControlError
from guest_agents.splitkernel.process import swap as module
from guest_agents.splitkernel.process.swap import Swap
from tests.unit.split_blades import eventually

READY = "echo ready /dev/nbd-none; echo $$ >{pid}; cat >/dev/null; rm {pid}"


class Stage:
    """A Swap over plain folders; `pid` is there while the stand-in for swapd runs."""

    def __init__(self, folder: Path) -> None:
        self.mount, self.pid = folder / "cgroup", folder / "pid"
        self.mount.mkdir()
        (self.mount / "cgroup.controllers").write_text("memory")
        self.program = folder / "swapd"
        self.swap = Swap(self.mount, self.program)
        self.does(READY)

    def does(self, script: str) -> None:
        self.program.write_text(f"#!/bin/sh\n{script.format(pid=self.pid, all=self.mount / 'rackless')}\n")
        self.program.chmod(0o755)


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    monkeypatch.setattr(module, "_settle", lambda: None)
    monkeypatch.setattr(Path, "rmdir", shutil.rmtree)  # a control group's files are no obstacle
    stage = Stage(tmp_path)
    yield stage
    for job in ("one", "two"):
        stage.swap.leave(f"/jobs/{job}")
    eventually(lambda: not stage.pid.exists())


def test_the_device_is_there_while_there_are_groups(stage: Stage) -> None:
    one = stage.swap.enter("/jobs/one", 9 << 20)
    two = stage.swap.enter("/jobs/two", 1)
    assert (stage.swap.enter("/jobs/one", 5), one.parent) == (one, stage.mount / "rackless")
    assert [int((group / "memory.max").read_text()) for group in (one, two)] == [9 << 20, 4 << 20]
    eventually(stage.pid.exists)
    stage.swap.leave("/jobs/one")
    eventually(lambda: not one.exists())
    assert stage.pid.exists()
    stage.swap.leave("/jobs/two")
    eventually(lambda: not stage.pid.exists())
    assert not two.exists()
    stage.swap.enter("/jobs/one", 1)
    eventually(stage.pid.exists)


def test_a_group_stays_while_something_runs_in_it(stage: Stage) -> None:
    group = stage.swap.enter("/jobs/one", 1)
    (group / "cgroup.events").write_text("populated 1\nfrozen 0\n")
    stage.swap.leave("/jobs/one")
    stage.swap.leave("/jobs/other")  # has none
    stage.swap.enter("/jobs/two", 1)
    assert group.exists()
    (group / "cgroup.events").write_text("populated 0\nfrozen 0\n")
    eventually(lambda: not group.exists())


def test_figures_and_a_verdict_of_the_kernel(stage: Stage) -> None:
    assert stage.swap.figures("/jobs/one") == {}
    group = stage.swap.enter("/jobs/one", 9 << 20)
    (group / "memory.peak").write_text("9437184\n")
    (group / "memory.swap.peak").write_text("123\n")
    (group / "memory.stat").write_text("anon 1\npgmajfault 17\nworkingset_refault_anon 5\n")
    figures = stage.swap.figures("/jobs/one")
    assert figures["limit_bytes"] == figures["memory_peak_bytes"] == 9 << 20
    assert (figures["swap_peak_bytes"], figures["major_faults"], figures["refaults"]) == (123, 17, 5)
    assert stage.swap.verdict("/jobs/one") == ""
    (group / "memory.events").write_text("low 0\noom 3\noom_kill 1\n")
    assert stage.swap.verdict("/jobs/one").startswith("out of memory")
    assert stage.swap.verdict("/jobs/none") == ""


def test_who_was_there_when_a_memory_blade_died_is_told(stage: Stage) -> None:
    stage.does(READY.replace("cat", "read -r line <{all}/news; echo $line; cat"))
    (stage.mount / "rackless").mkdir()
    news = stage.mount / "rackless/news"
    os.mkfifo(news)
    stage.swap.enter("/jobs/one", 1)
    news.write_text("lost mb1 17\n")
    eventually(lambda: "memory blade mb1 died" in stage.swap.verdict("/jobs/one"))
    stage.swap.enter("/jobs/two", 1)
    assert stage.swap.verdict("/jobs/two") == ""


def test_without_swapd_its_programs_end_and_the_next_gets_another(stage: Stage) -> None:
    stage.does("echo ready /dev/nbd-none; exit 1")
    group = stage.swap.enter("/jobs/one", 1)
    eventually(lambda: "swapd has ended" in stage.swap.verdict("/jobs/one"))
    assert (group.parent / "cgroup.kill").read_text() == "1"
    stage.does(READY)
    stage.swap.enter("/jobs/two", 1)
    eventually(stage.pid.exists)


@pytest.mark.parametrize(
    ("script", "said"),
    [("echo error swapon: Invalid argument; exit 1", "swapon: Invalid argument"), ("exit 1", "swapd said nothing")],
)
def test_no_device_is_an_error_that_says_why(stage: Stage, script: str, said: str) -> None:
    stage.does(script)
    with pytest.raises(ControlError) as caught:
        stage.swap.enter("/jobs/one", 1)
    assert said in caught.value.error
    assert stage.swap.figures("/jobs/one") == {}


def test_a_memory_blade_is_not_drained_while_there_are_groups(stage: Stage) -> None:
    from guest_agents.splitkernel.process import monitor  # now: split_blades has put something in place of pyverbs

    class Books:
        told: ClassVar[list[tuple[str, bool]]] = []

        def drain(self, blade: str, leaving: bool) -> None:
            self.told.append((blade, leaving))

    lender: Any = Books()
    group = stage.swap.enter("/jobs/one", 1)
    with pytest.raises(ControlError, match="static programs run on it"):
        monitor.drain(lender, stage.swap, {"memory": "mb0"})
    monitor.drain(lender, stage.swap, {"memory": "mb0", "cancel": True})
    assert lender.told == [("mb0", False)]
    stage.swap.leave("/jobs/one")
    eventually(lambda: not group.exists() and not stage.swap.used)
    monitor.drain(lender, stage.swap, {"memory": "mb0"})
    assert lender.told[1:] == [("mb0", True)]
