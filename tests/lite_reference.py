"""PageRank without LITE, numpy, or cleverness: what the distributed one must agree with."""

from __future__ import annotations

from collections.abc import Sequence


def pagerank(edges: Sequence[tuple[int, int]], rounds: int, damping: float = 0.85, count: int = 0) -> dict[int, float]:
    """Rank of each vertex; vertices that refer to nobody give to all. `count`: of vertices; 0: as the edges have."""
    count = count or max(max(edge) for edge in edges) + 1
    degrees = [0] * count
    for source, _ in edges:
        degrees[source] += 1
    ranks = [1 / count] * count
    for _ in range(rounds):
        sums = [0.0] * count
        for source, target in edges:
            sums[target] += ranks[source] / degrees[source]
        lost = sum(rank for rank, degree in zip(ranks, degrees, strict=True) if not degree)
        ranks = [(1 - damping) / count + damping * (each + lost / count) for each in sums]
    return dict(enumerate(ranks))
