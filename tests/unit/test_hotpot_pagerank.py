"""PageRank on Hotpot, against plain numpy; and the Graph500 graph it ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest

from guest_agents.hotpot.apps.pagerank import EDGE_FACTOR, INITIATOR, kronecker
from tests.unit import lite_pair
from tests.unit.hotpot_rack import PROJECT, Blade, output, rack

Rack = dict[str, Blade]


@pytest.fixture(scope="module")
def blades(tmp_path_factory: pytest.TempPathFactory, lite_core: Path) -> Iterator[Rack]:
    with rack(tmp_path_factory.mktemp("ranks"), lite_core, "gm0", "mb0", "mb1", "mb2") as made:
        yield made


def plain(edges: Any, vertices: int, rounds: int) -> Any:
    """The power method with the whole matrix; vertices without edges give to all."""
    matrix = numpy.zeros((vertices, vertices))
    numpy.add.at(matrix, (edges[:, 1], edges[:, 0]), 1.0)
    degrees = matrix.sum(axis=0)
    matrix[:, degrees == 0] = 1 / vertices
    matrix /= numpy.where(degrees == 0, 1, degrees)
    ranks = numpy.full(vertices, 1 / vertices)
    for _ in range(rounds):
        ranks = 0.15 / vertices + 0.85 * matrix @ ranks
    return ranks


def test_a_kronecker_graph_is_what_graph500_says() -> None:
    scale = 12
    edges = kronecker(scale, seed=7)
    assert edges.shape == (EDGE_FACTOR << scale, 2)
    assert edges.max() < 1 << scale
    assert (edges == kronecker(scale, seed=7)).all()
    assert (edges != kronecker(scale, seed=8)).any()
    degrees = numpy.sort(numpy.bincount(edges[:, 0], minlength=1 << scale))
    # In a draw of `scale` bits the likeliest source has all of them 0, whatever its name is after the permutation.
    likeliest = (INITIATOR[0] + INITIATOR[1]) ** scale
    assert degrees[-1] == pytest.approx(len(edges) * likeliest, rel=0.15)
    assert (degrees == 0).any(), "some vertices have no edges"


def test_the_quadrants_of_one_bit_have_the_initiators_probabilities() -> None:
    edges = kronecker(1, seed=3, edge_factor=50_000)
    seen = numpy.sort(numpy.bincount(2 * edges[:, 0] + edges[:, 1], minlength=4)) / len(edges)
    assert seen == pytest.approx(sorted([*INITIATOR, 1 - sum(INITIATOR)]), abs=0.01)


@pytest.mark.long
@pytest.mark.skipif(lite_pair.missing() is not None, reason=str(lite_pair.missing()))
@pytest.mark.parametrize("mode", ["mrmw", "mrsw"])
def test_ranks_are_those_of_plain_numpy(blades: Rack, mode: str) -> None:
    """Three parts, two on one blade, whose ranges meet within pages."""
    scale, rounds = 9, 12
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "guest_agents.hotpot.apps.pagerank", mode, "--part", str(part), "--parts", "3",
             "--scale", str(scale), "--seed", "5", "--rounds", str(rounds), "--mode", mode],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=PROJECT,
            env={**os.environ, **sockets(where)},
        )
        for part, where in enumerate((blades["mb0"], blades["mb0"], blades["mb2"]))
    ]  # fmt: skip
    first, *others = (output(process) for process in running)
    assert others == ["", ""]
    got = [float(line.split()[1]) for line in first.splitlines()]
    assert got == pytest.approx(plain(kronecker(scale, 5), 1 << scale, rounds), rel=1e-12)
    assert sum(got) == pytest.approx(1)


def sockets(blade: Blade) -> dict[str, str]:
    return {"RACKLESS_HOTPOT": str(blade.socket), "RACKLESS_LITE": str(blade.socket.with_suffix(".sock"))}
