"""The crash matrix: every step of every protocol is where some machine loses its power (hotpot_crash.py)."""

from __future__ import annotations

import itertools
import os
import random

import pytest

from tests.unit.hotpot_crash import Case, assert_clean

BOTH = [
    *(f"{when} {op}" for op in ("commit_now", "release", "replica", "seed", "synced", "update", "beat", "caching")
      for when in ("send", "serve", "served", "sent")),
    *(f"persist {media}" for media in ("log", "log-copies", "intents", "home", "copies", "datasets", "node")),
]  # fmt: skip
OWN = {
    "mrmw": [f"{when} {op}" for op in ("prepare", "commit") for when in ("send", "serve", "served", "sent")],
    "mrsw": [f"{when} {op}" for op in ("acquire", "let_go") for when in ("send", "serve", "served", "sent")],
}
FATES = ("reboot", "lost", "gone", "partition")
KNOWN = [
    Case("mrsw", "lost", "serve caching", 4, 1481),
    Case("mrsw", "partition", "persist mirror", 3, 30174, scarce=True, standby=True),
    Case("mrsw", "partition", "served make_room", 5, 50886, scarce=True),
    Case("mrmw", "partition", "served seed", 6, 50623, moves=True),
    Case("mrsw", "lost", "serve commit_now", 6, 50042),
    Case("mrsw", "reboot", "served leave", 6, 61200, moves=True),
    Case("mrmw", "partition", "served seed", 5, 60036, scarce=True),
    Case("mrmw", "reboot", "serve seed", 7, 70050, scarce=True),
]
"""Runs that once went wrong."""
RUNS = int(os.environ.get("RACKLESS_CRASH_RUNS", "0"))
"""More runs than those of the matrix, for a night."""


def matrix() -> list[Case]:
    """Every step with every fate, once; those of both modes in each mode by turns."""
    modes = ("mrmw", "mrsw")
    both = [(modes[sum(divmod(number, len(FATES))) % 2], step, fate)
            for number, (step, fate) in enumerate(itertools.product(BOTH, FATES))]  # fmt: skip
    own = [(mode, step, fate) for mode in modes for step, fate in itertools.product(OWN[mode], FATES)]
    return [Case(mode, fate, step, 1 + number % 5, number) for number, (mode, step, fate) in enumerate(both + own)]


def more(count: int) -> list[Case]:
    """Others, by lot."""
    rand = random.Random(0)
    return [Case(mode := rand.choice(["mrmw", "mrsw"]), rand.choice(FATES), rand.choice([*BOTH, *OWN[mode]]),
                 rand.randint(1, 12), 1000 + number) for number in range(count)]  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("part", range(8))
def test_no_acknowledged_commit_is_lost_whoever_dies_at_whichever_step(part: int) -> None:
    assert_clean((matrix() + KNOWN + more(RUNS))[part::8])
