"""The client of experiment `hotpot`, on stand-in blades: what it measures is there, and PageRank is the same twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments import hotpot_client
from tests.unit import lite_pair
from tests.unit.hotpot_rack import PROJECT, Blade, output, rack

pytestmark = [pytest.mark.long, pytest.mark.skipif(lite_pair.missing() is not None, reason=str(lite_pair.missing()))]
Rack = dict[str, Blade]
NAMES = ("gm0", "mb0", "mb1", "mb2")


@pytest.fixture(scope="module")
def blades(tmp_path_factory: pytest.TempPathFactory, lite_core: Path) -> Iterator[Rack]:
    with rack(tmp_path_factory.mktemp("client"), lite_core, *NAMES) as made:
        yield made


def client(blade: Blade, words: str) -> subprocess.Popen[str]:
    sockets = {"RACKLESS_HOTPOT": str(blade.socket), "RACKLESS_LITE": str(blade.socket.with_suffix(".sock"))}
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.hotpot_client", *words.split()], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, cwd=PROJECT, env={**os.environ, **sockets},
    )  # fmt: skip


def at_once(blades: Rack, words: str, *names: str) -> list[Any]:
    running = [client(blades[name], f"{words} --client {i} --clients {len(names)}") for i, name in enumerate(names)]
    return [json.loads(output(process)) for process in running]


@pytest.mark.parametrize("mode", ["mrmw", "mrsw"])
def test_commits_are_timed_by_what_they_are(blades: Rack, mode: str) -> None:
    times = json.loads(output(client(blades["mb0"], f"commits {mode} --owners 3,4,1 --count 2")))
    assert {point: len(found) for point, found in times.items()} == dict.fromkeys(hotpot_client.points(3), 2)
    assert {"size_65536", "ranges_8", "owners_3", "copies_4"} <= times.keys()


def test_fetches_are_timed_beside_reads(blades: Rack) -> None:
    times = json.loads(output(client(blades["mb0"], "fetch --owners 3 --name mb1 --count 4")))
    assert {what: len(found) for what, found in times.items()} == {"fetch": 4, "lite_read": 4}


def test_rates_of_several_blades(blades: Rack) -> None:
    assert all(found["per_s"] > 0 for found in at_once(blades, "rate mrmw --owners 1,2,3,4 --count 5", *NAMES))


def test_pagerank_on_both_is_the_same(blades: Rack) -> None:
    on_hotpot = at_once(blades, "pagerank", "mb0", "mb1")
    on_sockets = at_once(blades, "pagerank --peers 127.0.0.1,127.0.0.1", "mb0", "mb1")
    assert [found["most"] for found in on_hotpot] == pytest.approx([found["most"] for found in on_sockets], rel=1e-12)
