"""LITE-Graph: PageRank of a graph in the rack's memory, computed by many blades in the gather-apply-scatter way.

    python3 -m guest_agents.lite.apps.graph edges dictionary.txt > words.edges  # which word refers to which
    python3 -m guest_agents.lite.apps.graph rank g --part 0 --parts 2 --edges words.edges --on mb0,mb1   # on one blade
    python3 -m guest_agents.lite.apps.graph rank g --part 1 --parts 2                                    # on another

Part 0 puts the graph into LMRs, the others map them. Each part owns a range of vertices with about as many edges as
the others. In every round it gathers: reads what all vertices give to each of their successors; applies: sums that up
along its edges; scatters: writes what its own vertices give now. A barrier ends the round. Part 0 prints the ranks.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy

from guest_agents import lite

DAMPING = 0.85
HEADER = 4096  # bytes before the edges: JSON, padded with blanks
ATTENDANCE_SECONDS = 300.0  # to wait for the other parts

Array = Any  # numpy's arrays have types only where numpy has


class Graph:
    """Edges in memory of the rack, ordered by their target, and two halves of what vertices give, by round."""

    def __init__(self, node: lite.Node, name: str) -> None:
        self.edges = node.map(name, lite.Permission.READ)
        self.given = node.map(f"{name}.given")
        about = json.loads(self.edges.read(HEADER))
        self.vertices: int = about["vertices"]
        self.first_vertex: list[int] = about["first_vertex"]
        """Of each part, and at the end the number of vertices."""
        self.first_edge: list[int] = about["first_edge"]
        self.half = 8 * (self.vertices + len(self.first_vertex) - 1)

    @classmethod
    def store(cls, node: lite.Node, name: str, edges: Array, parts: int, on: Sequence[str]) -> list[lite.Lmr]:
        """Put a graph there: `edges` is an array of (source, target). It lives as long as the LMRs returned."""
        vertices = int(edges.max()) + 1
        edges = edges[numpy.argsort(edges[:, 1], kind="stable")].astype("<u4")
        cuts = [len(edges) * part // parts for part in range(1, parts)]
        first_vertex = [0, *(int(edges[cut, 1]) for cut in cuts), vertices]
        first_edge = [int(cut) for cut in numpy.searchsorted(edges[:, 1], first_vertex)]
        about = {"vertices": vertices, "first_vertex": first_vertex, "first_edge": first_edge}
        degrees: Array = numpy.bincount(edges[:, 0], minlength=vertices).astype("<u4")
        where: dict[str, Any] = {"on": list(on) or None, "spread": len(on) > 1}
        stored = node.malloc(HEADER + edges.nbytes + degrees.nbytes, name=name, **where)
        stored.write(json.dumps(about).ljust(HEADER).encode())
        stored.write(edges, at=HEADER)
        stored.write(degrees, at=HEADER + edges.nbytes)
        return [stored, node.malloc(2 * 8 * (vertices + parts), name=f"{name}.given", **where)]

    def rank(self, node: lite.Node, part: int, rounds: int) -> Array:
        """This part's ranks after so many rounds; all parts must do this at the same time."""
        parts = len(self.first_vertex) - 1
        low, high = self.first_vertex[part : part + 2]
        first, last = self.first_edge[part : part + 2]
        edges: Array = numpy.empty((last - first, 2), "<u4")
        self.edges.read_into(edges, at=HEADER + 8 * first)
        degrees: Array = numpy.empty(high - low, "<u4")
        self.edges.read_into(degrees, at=HEADER + 8 * self.first_edge[-1] + 4 * low)
        sources, targets, ends = edges[:, 0], edges[:, 1] - numpy.uint32(low), degrees == 0
        ranks: Array = numpy.full(high - low, 1 / self.vertices)
        given: Array = numpy.empty(self.vertices + parts)
        for turn in range(rounds + 1):
            if turn:
                self.given.read_into(given, at=(turn + 1) % 2 * self.half)  # gather
                sums = numpy.bincount(targets, weights=given[sources], minlength=high - low)
                lost = given[self.vertices :].sum() / self.vertices  # by vertices that refer to nobody
                ranks = (1 - DAMPING) / self.vertices + DAMPING * (sums + lost)  # apply
            place = turn % 2 * self.half
            self.given.write(ranks / numpy.maximum(degrees, 1), at=place + 8 * low)  # scatter
            self.given.write(ranks[ends].sum().tobytes(), at=place + 8 * (self.vertices + part))
            node.barrier(f"{self.edges.name}.round", parts, ATTENDANCE_SECONDS)
        return ranks


def references(text: str) -> tuple[list[str], list[tuple[int, int]]]:
    """The words of a dictionary (in the form of dict-gcide), and (from, to) for each reference of one to another."""
    found: dict[str, set[str]] = {}
    entry: set[str] = set()
    for line in text.splitlines():
        head = re.match(r"(\w[^\\]*?) \\", line)
        if head:
            entry = found.setdefault(head[1].lower(), set())
        entry.update(word.lower() for word in re.findall(r"\{([^}]*)\}", line))
    words = sorted(found)
    number = {word: i for i, word in enumerate(words)}
    return words, [(number[a], number[b]) for a in words for b in sorted(found[a]) if b in number and a != b]


def main(words: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="graph", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("do", choices=["edges", "rank"])
    parser.add_argument("what", help="edges: a dictionary's text; rank: name of the graph in the rack")
    parser.add_argument("--edges", type=Path, help="rank, part 0: lines of two vertex numbers")
    parser.add_argument("--parts", type=int, default=1, help="rank: how many blades take part (1)")
    parser.add_argument("--part", type=int, default=0, help="rank: which of them this is, from 0")
    parser.add_argument("--on", default="", help="rank, part 0: blades that hold the graph (this one)")
    parser.add_argument("--rounds", type=int, default=20, help="rank (20)")
    asked = parser.parse_args(words)
    if asked.do == "edges":
        for edge in references(Path(asked.what).read_text(errors="replace"))[1]:
            print(*edge)
        return
    with lite.connect() as node:
        stored: list[lite.Lmr] = []
        if asked.edges:
            edges = numpy.loadtxt(asked.edges, dtype="u4", ndmin=2)
            on = [name for name in asked.on.split(",") if name]
            stored = Graph.store(node, asked.what, edges, asked.parts, on)
        node.barrier(f"{asked.what}.stored", asked.parts, ATTENDANCE_SECONDS)
        graph = Graph(node, asked.what)
        ranks = graph.rank(node, asked.part, asked.rounds)
        with node.malloc(max(1, ranks.nbytes), name=f"{asked.what}.ranks{asked.part}") as result:
            result.write(ranks)
            node.barrier(f"{asked.what}.ranked", asked.parts, ATTENDANCE_SECONDS)
            for part in range(asked.parts) if stored else ():
                low, high = graph.first_vertex[part : part + 2]
                with node.map(f"{asked.what}.ranks{part}", lite.Permission.READ) as others:
                    ranks = numpy.frombuffer(others.read(8 * (high - low)))
                sys.stdout.write("".join(f"{low + i} {float(rank)!r}\n" for i, rank in enumerate(ranks)))
            node.barrier(f"{asked.what}.printed", asked.parts, ATTENDANCE_SECONDS)


if __name__ == "__main__":
    main()
