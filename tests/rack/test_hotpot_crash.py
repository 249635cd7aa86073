"""Real blades lose their power, or their network, at steps of Hotpot's protocols: what was acknowledged is there."""

from __future__ import annotations

import os

import pytest

from orchestrator.settings import Settings
from tests.rack.conftest import Bench, unique
from tests.rack.hotpot_cases import Case, chosen
from tests.rack.hotpot_crash import run_all

RUNS = int(os.environ.get("RACKLESS_BLADE_CRASHES", "0"))
"""Cases of the matrix; without it, one."""
FIRST = int(os.environ.get("RACKLESS_BLADE_CRASHES_FROM", "0"))
USUAL = [Case("mrmw", "reboot", "serve commit", 2, 1)]
pytestmark = [pytest.mark.rack, pytest.mark.timeout(300 + 90 * RUNS)]


def test_no_acknowledged_commit_is_lost_whichever_blade_dies_at_whichever_step(bench: Bench) -> None:
    settings = Settings.from_environment(bench.env())
    cases = chosen(RUNS, FIRST) if RUNS else USUAL
    verdicts = run_all(settings, cases, seconds=1e6, name=unique("h"), folder=bench.folder / "evidence")
    wrong = [str(verdict) for verdict in verdicts if verdict.wrong]
    assert not wrong, "each again by `python -m tests.rack.hotpot_crash` and its words:\n" + "\n".join(wrong)
    assert any(verdict.hit for verdict in verdicts), "no step came"
    assert sum(verdict.acknowledged for verdict in verdicts) > 5 * len(verdicts)
