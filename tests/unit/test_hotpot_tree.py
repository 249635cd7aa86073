"""The sorted index of the store, without Hotpot: pages in a dict, of which plain loads may see old versions."""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from typing import Any

import pytest

from guest_agents import hotpot
from guest_agents.hotpot.apps import tree as tree_module
from guest_agents.hotpot.apps.pages import PAGE, Page
from guest_agents.hotpot.apps.tree import LEAF, MOST, Tree


class Memory:
    """What Work is for the tree, with all versions of all pages."""

    def __init__(self, rand: random.Random, stale: float) -> None:
        self._rand, self._stale = rand, stale
        self.versions: dict[int, list[bytes]] = {}
        self._next = 2 * PAGE

    def load(self, address: int) -> Page:
        return Page.unpack(self.versions.get(address, [bytes(PAGE)])[-1])

    def store(self, address: int, page: Page) -> None:
        data = page.pack()
        assert len(data) == PAGE
        self.versions.setdefault(address, [bytes(PAGE)]).append(data)

    def peek(self, address: int) -> Page:
        """Often the latest version, sometimes any other."""
        if self._rand.random() < self._stale:
            return Page.unpack(self._rand.choice(self.versions[address]))
        return self.load(address)

    def take(self, _work: Any) -> int:
        self._next += PAGE
        return self._next


@pytest.mark.parametrize(("stale", "longest", "count"), [(0.0, MOST, 1500), (0.2, MOST, 1500), (0.0, 30, 700)])
def test_it_is_a_sorted_set(stale: float, longest: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_module, "_PAUSE_SECONDS", 0)
    rand = random.Random(longest + stale)
    memory: Any = Memory(rand, stale)
    tree = Tree(PAGE, memory.peek, memory.take)
    tree.format(memory)
    model: list[tuple[bytes, bytes]] = []
    again = 0
    for _ in range(count):
        entry = (rand.randbytes(rand.randrange(3)), rand.randbytes(rand.randint(1, longest)))
        grows = not model or (entry not in model and rand.random() < 0.7)
        if not grows:
            entry = rand.choice(model)
        while True:
            before = {address: len(found) for address, found in memory.versions.items()}
            try:
                (tree.add if grows else tree.remove)(memory, entry)
                break
            except hotpot.Retry:  # an old page led astray: as a transaction, nothing of it takes place
                for address, found in list(memory.versions.items()):
                    del found[before.get(address, 0) :]
                    if not found:
                        del memory.versions[address]
                again += 1
        insort(model, entry) if grows else model.remove(entry)
    exact = Tree(PAGE, memory.load, memory.take)
    assert list(exact.walk((b"", b""))) == model
    for _ in range(100):
        start = (rand.randbytes(rand.randrange(3)), rand.randbytes(1))
        assert list(exact.walk(start)) == model[bisect_left(model, start) :]
    assert memory.load(PAGE).kind > LEAF + (longest > 100), "several levels were made"
    assert bool(again) == bool(stale)


def test_a_page_that_is_torn_or_forged_is_not_taken_for_one() -> None:
    page = Page(3, 12345, [(b"a", b"b" * 300, b""), (b"", b"", b"\0")])
    data = page.pack()
    assert Page.unpack(data) == page
    assert Page.unpack(bytes(PAGE)) == Page()
    rand = random.Random(1)
    for _ in range(300):
        place = rand.randrange(PAGE)
        with pytest.raises(hotpot.Corrupt):
            Page.unpack(data[:place] + bytes([data[place] ^ 1 << rand.randrange(8)]) + data[place + 1 :])
    older = Page(3, 12345, [(b"a", b"c" * 300, b""), (b"", b"", b"\0")]).pack()
    for cut in range(4, 600):
        torn = data[:cut] + older[cut:]
        if torn not in (data, older):
            with pytest.raises(hotpot.Corrupt):
                Page.unpack(torn)
