"""A peer that is killed, and one that is paused, in the middle of every operation of LITE, on real blades.

All operations run at once against mb1, in a program on pb0 with a thread for each (programs/lite_faults.py); mb1 loses
its power once and is paused once for the whole module. A test looks at what one of them has gone through.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.rack.conftest import Bench, Rack
from tests.rack.program import Program, end_all
from tests.rack.programs.lite_faults import OPERATIONS
from tests.rack.test_lite import BLADES, DEAD_AFTER, assert_books_are_empty, books, copy_programs, power, power_on

pytestmark = [pytest.mark.rack, pytest.mark.timeout(1800)]

LONGEST = 30 + DEAD_AFTER + 10
"""Seconds an operation may take: its timeout, and what is on the fabric ends by itself (docs/lite.md)."""
EXPECTED = {"NODE_DEAD", "NODE_UNREACHABLE", "TIMED_OUT", "PORT_CLOSED", "BARRIER_BROKEN", "RING_FULL"}
SOURCE = "import runpy, sys; sys.argv = ['lite_faults.py', *WORDS]; node.close(); runpy.run_path(" \
         "'/root/lite_faults.py', run_name='__main__')"  # fmt: skip
Report = dict[str, dict[str, Any]]


def start(rack: Rack, blade: str, *words: str) -> Program:
    program = Program(rack, blade, SOURCE.replace("*WORDS", ", ".join(map(repr, words))))
    assert program.hear() in ("looping", "serving")
    return program


def ask(program: Program) -> Report:
    program.tell("report")
    return dict(json.loads(program.hear()))


def until_all(program: Program, seconds: float) -> Report:
    """A report in which every operation has succeeded, or the one there is when the time is over."""
    found: Report = {}
    deadline = time.monotonic() + seconds
    while True:
        for name, one in ask(program).items():
            before = found.setdefault(name, {"outcomes": {}, "longest": 0.0})
            outcomes = {key: before["outcomes"].get(key, 0) + one["outcomes"].get(key, 0)
                        for key in before["outcomes"] | one["outcomes"]}  # fmt: skip
            found[name] = {**one, "outcomes": outcomes, "longest": max(before["longest"], one["longest"])}
        if all(one["outcomes"].get("ok") or one["wrong"] for one in found.values()) or time.monotonic() > deadline:
            return found
        time.sleep(1)


@pytest.fixture(scope="module")
def phases(bench: Bench) -> Iterator[dict[str, Report]]:
    """What each operation went through, by phase; and whatever the books still held at the end."""
    timing = {"heartbeat": "0.5 s", "dead_after": f"{DEAD_AFTER:g} s"}
    with bench.up("f", "pair", blades=BLADES, membership=timing) as rack:
        for blade in BLADES:
            copy_programs(rack, blade)
        server = start(rack, "mb1", "serve")
        program = start(rack, "pb0", "mb1", "mb0", "pb0")
        found = {"before": until_all(program, 90)}
        power(rack, "mb1", "destroy")
        server.process.kill()
        time.sleep(DEAD_AFTER + 10)
        found["killed"] = ask(program)
        power_on(rack, "mb1")
        server = start(rack, "mb1", "serve")
        ask(program)
        found["back"] = until_all(program, 90)
        power(rack, "mb1", "suspend")
        time.sleep(DEAD_AFTER + 10)
        found["paused"] = ask(program)
        power(rack, "mb1", "resume")
        time.sleep(5)
        ask(program)
        found["resumed"] = until_all(program, 90)
        program.tell("stop")
        found["end"] = dict(json.loads(program.hear()))
        outcomes = {phase: {op: one["outcomes"] for op, one in report.items()} for phase, report in found.items()}
        print(json.dumps(outcomes))
        program.end()
        server.process.stdin.close()  # type: ignore[union-attr]
        server.process.stdin = None
        server.end()
        assert_books_are_empty(rack)
        print(books(rack))
        yield found
        end_all()


@pytest.mark.parametrize("operation", list(OPERATIONS))
def test_it_ends_with_a_name_and_goes_on(phases: dict[str, Report], operation: str) -> None:
    history = {phase: report[operation] for phase, report in phases.items()}
    for phase, one in history.items():
        assert one["wrong"] is None, f"{phase}: {one['wrong']}"
        assert set(one["outcomes"]) <= {"ok", *EXPECTED}, phase
        assert max(one["longest"], one["now"]) < LONGEST, f"{phase}: {one}"
    for phase in ("before", "back", "resumed"):
        assert history[phase]["outcomes"].get("ok"), f"{phase}: {history[phase]}"
    for phase in ("killed", "paused"):
        assert set(history[phase]["outcomes"]) & EXPECTED, f"it never noticed that mb1 was {phase}: {history[phase]}"
