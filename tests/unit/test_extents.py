"""Allocation in a registered arena, against a plain model. No VM, no verbs."""

from __future__ import annotations

import random
import sys
from types import ModuleType

import pytest


class _Anything(ModuleType):
    def __getattr__(self, name: str) -> object:
        return 0


@pytest.fixture
def extents(monkeypatch: pytest.MonkeyPatch) -> type:
    try:
        from guest_agents.verbs.arena import Extents
    except ModuleNotFoundError:  # no pyverbs on this machine: the allocator needs none
        for name in ("", ".enums", ".mr", ".addr", ".device", ".pd"):
            monkeypatch.setitem(sys.modules, f"pyverbs{name}", _Anything(f"pyverbs{name}"))
        for name in ("arena", "device", "enums"):
            monkeypatch.delitem(sys.modules, f"guest_agents.verbs.{name}", raising=False)
        from guest_agents.verbs.arena import Extents
    return Extents


def test_pieces_never_overlap_and_all_come_back(extents: type) -> None:
    numbers = random.Random(3)
    book = extents(1 << 20, 4096)
    held: dict[int, int] = {}
    for _ in range(5000):
        if held and numbers.random() < 0.48:
            offset = numbers.choice(list(held))
            book.free(offset)
            del held[offset]
        else:
            size = numbers.randrange(1, 60000)
            offset = book.allocate(size)
            if offset is None:
                continue
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


def test_a_piece_is_freed_once(extents: type) -> None:
    book = extents(8192)
    offset = book.allocate(1)
    book.free(offset)
    with pytest.raises(KeyError):
        book.free(offset)
