"""PageRank of a Graph500 graph that lies in a Hotpot dataset, computed by programs on many blades.

    python3 -m guest_agents.hotpot.apps.pagerank g --part 0 --parts 2 --scale 12   # on one blade; makes the graph
    python3 -m guest_agents.hotpot.apps.pagerank g --part 1 --parts 2              # on another

The graph is a Kronecker graph as the Graph500 benchmark defines it. Each part owns a range of vertices with about as
many edges as the others. In every round it loads what all vertices give to each of their successors, sums that up along
its edges, stores what its own vertices give now, and commits those bytes, whoever else commits to the same pages; a
barrier of LITE ends the round. Part 0 prints the ranks.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy

from guest_agents import hotpot, lite

DAMPING = 0.85
EDGE_FACTOR = 16
"""Edges for each vertex, as Graph500 has it."""
INITIATOR = (0.57, 0.19, 0.19)
"""Graph500's probabilities that an edge goes into the first, second, third quadrant of the matrix."""
HEADER = 4096  # bytes before the edges: JSON, padded with blanks
PIECE = 256 << 10  # bytes that are committed at once; a commit has its limits
ATTENDANCE_SECONDS = 300.0  # to wait for the other parts
_PAUSE_SECONDS = 0.01

Array = Any  # numpy's arrays have types only where numpy has


def kronecker(scale: int, seed: int, edge_factor: int = EDGE_FACTOR) -> Array:
    """The edges (source, target) of a graph with 2 ** scale vertices (Graph500 specification, section 3)."""
    rand = numpy.random.default_rng(seed)
    a, b, c = INITIATOR
    count = edge_factor << scale
    edges: Array = numpy.zeros((count, 2), "<u4")
    for bit in range(scale):
        lower = rand.random(count) > a + b
        right = rand.random(count) > numpy.where(lower, c / (1 - a - b), a / (a + b))
        edges[:, 0] |= lower.astype("<u4") << numpy.uint32(bit)
        edges[:, 1] |= right.astype("<u4") << numpy.uint32(bit)
    names = rand.permutation(1 << scale).astype("<u4")  # so that the popular are not neighbours
    return names[edges][rand.permutation(count)]


def store(dataset: hotpot.Dataset, at: int, data: Array, replicas: int = 1) -> None:
    """Store an array, and commit its bytes."""
    raw = numpy.ascontiguousarray(data).data.cast("B")
    for start in range(0, len(raw), PIECE):
        length = len(raw[start : start + PIECE])
        dataset.memory[at + start : at + start + length] = raw[start : start + length]
        while True:
            try:
                dataset.commit((at + start, length), replicas=replicas)
                break
            except hotpot.Retry:  # a neighbour is committing to our first or last page
                time.sleep(random.uniform(0, _PAUSE_SECONDS))


class Graph:
    """Edges in one dataset, ordered by their target; in a second one the ranks, and what vertices give by turns."""

    def __init__(self, edges: hotpot.Dataset, values: hotpot.Dataset) -> None:
        """Of datasets that `make` has filled."""
        self.edges, self.values = edges, values
        about = json.loads(bytes(edges.memory[:HEADER]))
        self.vertices: int = about["vertices"]
        self.first_vertex: list[int] = about["first_vertex"]
        """Of each part, and at the end the number of vertices."""
        self.first_edge: list[int] = about["first_edge"]
        self.half = 8 * (self.vertices + len(self.first_vertex) - 1)
        self.ranks_at = 2 * self.half

    @staticmethod
    def make(session: hotpot.Session, name: str, edges: Array, vertices: int, parts: int, mode: str = "mrmw") -> None:
        """Store a graph for so many parts."""
        edges = edges[numpy.argsort(edges[:, 1], kind="stable")].astype("<u4")
        cuts = [int(edges[len(edges) * part // parts, 1]) for part in range(1, parts)]
        first_vertex = [0, *cuts, vertices]
        first_edge = [int(cut) for cut in numpy.searchsorted(edges[:, 1], first_vertex)]
        about = {"vertices": vertices, "first_vertex": first_vertex, "first_edge": first_edge}
        degrees: Array = numpy.bincount(edges[:, 0], minlength=vertices).astype("<u4")
        with session.create(name, HEADER + edges.nbytes + degrees.nbytes, mode=mode, chunk=PIECE) as dataset:
            store(dataset, HEADER, edges)
            store(dataset, HEADER + edges.nbytes, degrees)
            store(dataset, 0, numpy.frombuffer(json.dumps(about).ljust(HEADER).encode(), "u1"))
        session.create(f"{name}.values", 8 * (3 * vertices + 2 * parts), mode=mode, chunk=PIECE // 4).close()

    def rank(self, node: lite.Node, part: int, rounds: int) -> None:
        """Compute this part's ranks after so many rounds, into the dataset; all parts must do this at the same time."""
        parts = len(self.first_vertex) - 1
        low, high = self.first_vertex[part : part + 2]
        first, last = self.first_edge[part : part + 2]
        edges = self._load(self.edges, HEADER + 8 * first, 2 * (last - first), "<u4").reshape(-1, 2)
        degrees = self._load(self.edges, HEADER + 8 * self.first_edge[-1] + 4 * low, high - low, "<u4")
        sources, targets, ends = edges[:, 0], edges[:, 1] - numpy.uint32(low), degrees == 0
        ranks: Array = numpy.full(high - low, 1 / self.vertices)
        for turn in range(rounds + 1):
            if turn:
                given = self._load(self.values, (turn + 1) % 2 * self.half, self.vertices + parts, "<f8")
                sums = numpy.bincount(targets, weights=given[sources], minlength=high - low)
                lost = given[self.vertices :].sum() / self.vertices  # by vertices that refer to nobody
                ranks = (1 - DAMPING) / self.vertices + DAMPING * (sums + lost)
            place = turn % 2 * self.half
            store(self.values, place + 8 * low, ranks / numpy.maximum(degrees, 1))
            store(self.values, place + 8 * (self.vertices + part), ranks[ends].sum().reshape(1))
            node.barrier(f"{self.edges.name}.round", parts, ATTENDANCE_SECONDS)
        store(self.values, self.ranks_at + 8 * low, ranks)

    def ranks(self) -> Array:
        """The ranks of all vertices, when all parts have computed them."""
        return self._load(self.values, self.ranks_at, self.vertices, "<f8")

    @staticmethod
    def _load(dataset: hotpot.Dataset, at: int, count: int, kind: str) -> Array:
        """A copy: no array keeps the dataset from being closed."""
        return numpy.frombuffer(dataset.memory, kind, count, at).copy()


def main(words: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="pagerank", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", help="of the graph's dataset")
    parser.add_argument("--part", type=int, default=0, help="which of the programs this is, from 0")
    parser.add_argument("--parts", type=int, default=1, help="how many there are (1)")
    parser.add_argument("--scale", type=int, default=10, help="part 0: binary logarithm of the vertices (10)")
    parser.add_argument("--seed", type=int, default=1, help="part 0: of the graph (1)")
    parser.add_argument("--mode", default="mrmw", help="part 0: mrmw or mrsw")
    parser.add_argument("--rounds", type=int, default=20, help="how many (20)")
    asked = parser.parse_args(words)
    with hotpot.connect() as session, lite.connect() as node:

        def wait(until: str) -> None:
            node.barrier(f"{asked.name}.{until}", asked.parts, ATTENDANCE_SECONDS)

        if asked.part == 0:
            edges = kronecker(asked.scale, asked.seed)
            Graph.make(session, asked.name, edges, 1 << asked.scale, asked.parts, asked.mode)
        wait("made")
        with ExitStack() as opened:
            graph = Graph(*(opened.enter_context(session.open(name)) for name in (asked.name, f"{asked.name}.values")))
            graph.rank(node, asked.part, asked.rounds)
            wait("ranked")
            if asked.part == 0:
                sys.stdout.write("".join(f"{i} {float(rank)!r}\n" for i, rank in enumerate(graph.ranks())))
        wait("closed")
        if asked.part == 0:
            for name in (asked.name, f"{asked.name}.values"):
                session.delete(name)


if __name__ == "__main__":
    main()
