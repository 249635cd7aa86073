"""Allocation in a registered arena, against a plain model. No VM, no verbs."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guest_agents.extents import Extents
from guest_agents.gaps import Gap


def test_pieces_never_overlap_and_all_come_back() -> None:
    numbers = random.Random(3)
    book = Extents(1 << 20, 4096)
    held: dict[int, int] = {}
    for _ in range(5000):
        if held and numbers.random() < 0.48:
            offset = numbers.choice(list(held))
            book.free(offset)
            del held[offset]
        else:
            size = numbers.randrange(1, 60000)
            found = book.allocate(size)
            if found is None:
                continue
            offset = found
            size = -(-size // 4096) * 4096
            assert offset % 4096 == 0
            assert offset + size <= book.size
            assert all(offset + size <= o or o + s <= offset for o, s in held.items())
            held[offset] = size
        assert book.allocated == sum(held.values())
    for offset in held:
        book.free(offset)
    assert book.allocated == 0
    assert book.allocate(1 << 20) == 0
    assert book.allocate(1) is None


def test_a_piece_is_freed_once() -> None:
    book = Extents(8192)
    offset = book.allocate(1)
    assert offset is not None
    book.free(offset)
    with pytest.raises(KeyError):
        book.free(offset)


class Plain:
    """First fit, by looking at each unit."""

    def __init__(self, units: int) -> None:
        self.free = [True] * units
        self.held: dict[int, int] = {}

    def allocate(self, units: int) -> int | None:
        for at in range(len(self.free) - units + 1):
            if all(self.free[at : at + units]):
                self.free[at : at + units] = [False] * units
                self.held[at] = units
                return at
        return None

    def give(self, at: int) -> None:
        units = self.held.pop(at)
        self.free[at : at + units] = [True] * units

    def gaps(self) -> list[tuple[int, int]]:
        text = "".join("." if free else "#" for free in self.free)
        return [(at, len(run)) for run in set(filter(None, text.split("#")))
                for at in range(len(text)) if text.startswith(run, at) and text[at - 1 : at] != "."
                and text[at + len(run) : at + len(run) + 1] != "."]  # fmt: skip


def _gaps(tree: Gap | None) -> list[tuple[int, int]]:
    """The pieces of a tree in order; it must know its largest."""
    if tree is None:
        return []
    found = [*_gaps(tree.left), (tree.start, tree.length), *_gaps(tree.right)]
    assert tree.max_gap == max(length for _, length in found)
    assert all(child is None or child.weight <= tree.weight for child in (tree.left, tree.right))
    return found


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 12)), max_size=60))
def test_first_fit_is_what_a_plain_search_finds(steps: list[tuple[bool, int]]) -> None:
    book, plain = Extents(64, 1), Plain(64)
    for take, number in steps:
        if take or not plain.held:
            assert book.allocate(number) == plain.allocate(number)
        else:
            at = sorted(plain.held)[number % len(plain.held)]
            book.free(at)
            plain.give(at)
        gaps = _gaps(book._free)
        assert gaps == sorted(plain.gaps())
        assert book.max_gap == max((length for _, length in gaps), default=0)


def test_many_pieces_are_no_deep_tree() -> None:
    book = Extents(50_000, 1)
    for _ in range(50_000):
        book.allocate(1)
    assert book.max_gap == 0
    for offset in range(0, 50_000, 2):
        book.free(offset)
    assert book.max_gap == 1
    assert book.allocate(2) is None
    book.free(25_001)
    assert book.allocate(2) == 25_000
