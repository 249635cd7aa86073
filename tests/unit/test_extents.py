"""Allocation in a registered arena, against a plain model. No VM, no verbs."""

from __future__ import annotations

import random

import pytest

from guest_agents.extents import Extents


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
