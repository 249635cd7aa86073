"""The crash matrix on blades (tests/rack/hotpot_crash.py) as far as it needs none: steps, cases, writers, the judge."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from guest_agents.hotpot import steps
from guest_agents.hotpot.audit import audit
from tests.rack import hotpot_cases as cases
from tests.rack.hotpot_crash import compare
from tests.rack.hotpot_writer import CELLS, SIZE
from tests.unit import lite_pair
from tests.unit.hotpot_history import CELL, STRIDE, Cell, attempts_of, check
from tests.unit.hotpot_rack import PROJECT, Blade, rack
from tests.unit.lite_blades import eventually

needs_lite = pytest.mark.skipif(lite_pair.missing() is not None, reason=str(lite_pair.missing()))


def test_a_step_is_hit_when_it_has_come_so_often() -> None:
    trap = steps.Trap("serve commit", 2)
    assert [trap.hit(step) for step in ("serve commit", "served commit", "serve commit", "serve commit")] == [
        False, False, True, False]  # fmt: skip


def test_who_is_at_the_step_stands_still_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console = tmp_path / "console"
    monkeypatch.setattr(steps, "_CONSOLE", console)
    if (child := os.fork()) == 0:
        steps.arm(steps.Trap("persist home"))
        steps.at("persist", "log")
        steps.at("persist", "home-3-17")
        os._exit(7)
    assert os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1])
    assert console.read_text() == "hotpot stands still at persist home\n"
    os.kill(child, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_the_matrix_has_every_step_with_every_fate() -> None:
    every = cases.matrix()
    assert len(every) == len({(case.mode, case.fate, case.step) for case in every}) >= 200
    assert set(Counter(case.step for case in every).values()) <= {len(cases.FATES), 2 * len(cases.FATES)}
    assert {case.victim for case in every} == set(cases.BLADES)
    assert cases.parse(every[5].words.split()) == every[5] == cases.chosen(1, 5)[0]
    for case in every:
        assert min(case.degrees) > 1 or (case.victim != cases.MANAGER and case.fate in ("reboot", "partition"))
    assert len(cases.chosen(300)) == 300


@needs_lite
@pytest.mark.long
@pytest.mark.parametrize("mode", ["mrmw", "mrsw"])
def test_writers_that_nobody_disturbs_are_judged_well(
    tmp_path: Path, lite_core: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """And the steps of the matrix come there."""
    came: set[str] = set()
    monkeypatch.setattr(steps, "_trap", SimpleNamespace(hit=came.add))
    def writer(blade: Blade) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.rack.hotpot_writer"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, cwd=PROJECT, env={**os.environ, "RACKLESS_HOTPOT": str(blade.socket)})  # fmt: skip

    def tell(program: subprocess.Popen[str], *lines: str) -> list[str]:
        """What it says until it has done the last of them."""
        assert program.stdin is not None
        assert program.stdout is not None
        program.stdin.write("".join(f"{line}\n" for line in lines))
        program.stdin.flush()
        said: list[str] = []
        while not said or not said[-1].startswith((f"ok {lines[-1].split()[0]}", "failed")):
            said.append(program.stdout.readline().strip())
        return said

    with rack(tmp_path, lite_core, "gm0", "mb0", "mb1") as blades:
        programs = {name: writer(blade) for name, blade in blades.items()}
        try:
            assert tell(programs["gm0"], f"create set {SIZE} {mode} 2 3") == ["ok begin", "ok create"]
            said: list[str] = []
            for name, program in programs.items():
                said += tell(program, f"run set {name} {2 if name == 'mb1' else 1}")
            eventually(lambda: sum(blade.service.counts["commits"] for blade in blades.values()) > 20)
            for program in programs.values():
                said += tell(program, "stop")
            attempts = attempts_of(line for line in said if line.startswith(("try", "done", "not")))
            assert sum(attempt.acknowledged for attempt in attempts) > 20
            read = {next(line for line in tell(program, "read") if line.startswith("data")) for program in
                    programs.values()}  # fmt: skip
            assert len(read) == 1
            data = bytes.fromhex(read.pop().split()[1])
            final = {cell: Cell.unpack(data[cell * STRIDE : cell * STRIDE + CELL]) for cell in range(CELLS)}
            assert check(attempts, final) == []
            eventually(lambda: not any(audit(blade.service, "set")["busy"] for blade in blades.values()))
            told = [audit(blade.service, "set") for blade in blades.values()]
            assert compare(told, data) == []
            assert "page 0 is not what is read" in compare(told, b"?" + data[1:])
            holder = next(blade for blade in told if blade["copies"])
            page, version, crc = holder["copies"][0]
            holder["copies"][0] = [page, version - 1, crc]
            [found] = compare(told, data)
            assert found.startswith(f"the copy of page {page} on node {holder['node']}")
            for program in programs.values():
                tell(program, "close")
            assert tell(programs["gm0"], "delete set") == ["ok delete"]
            assert {case.step for case in cases.matrix() if case.mode == mode} - came == set()
        finally:
            for program in programs.values():
                program.kill()
                program.communicate()
