"""What becomes of the pages that programs of a node have mapped. No program maps them: stores are made to the file."""

from __future__ import annotations

import os

import pytest

from guest_agents.hotpot import userfault
from guest_agents.hotpot.blocks import PAGE, Copy
from guest_agents.hotpot.cache import Cache
from guest_agents.hotpot.errors import Retry, StoresLost
from guest_agents.hotpot.records import Piece, Record
from guest_agents.hotpot.userfault import Fault

OLD, NEW = b"o" * PAGE, b"n" * PAGE
WHOLE = {0: [Piece(0, PAGE)]}


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setattr(userfault, "let", lambda *_, writable: None)  # there is nobody to be let
    record = Record(1, "set", 4 * PAGE, "mrmw", PAGE, 0x200000000000, homes=(1,))
    return Cache(record, lambda _record, pages: [Copy(1, OLD) for _ in pages])


def page(cache: Cache) -> bytes:
    return os.pread(cache.file, PAGE, 0)


def test_news_that_come_when_a_commit_is_just_over_are_not_lost(cache: Cache) -> None:
    cache.ensure([0])
    with cache.frozen(WHOLE, 0) as frozen:
        assert frozen[0].data == OLD
        cache.updated(0, Copy(2, NEW))
        assert page(cache) == OLD, "it is frozen"
    assert page(cache) == NEW


def test_news_of_an_acquired_page_wait_for_the_end_of_the_transaction(cache: Cache) -> None:
    cache.acquire([0], transaction=7)
    cache.updated(0, Copy(2, NEW))
    with pytest.raises(Retry, match="since it was acquired"), cache.frozen(WHOLE, 7):
        pass
    assert page(cache) == OLD
    cache.give_up([0])
    assert page(cache) == NEW


def store(cache: Cache, at: int, data: bytes) -> None:
    """What a program's first store to the page does."""
    cache.answer(0, Fault(cache.record.address, write=True, protected=False))
    os.pwrite(cache.file, data, at)


def test_what_others_committed_after_a_commit_has_it_in_it_and_other_stores_stay(cache: Cache) -> None:
    store(cache, 0, b"mine")
    store(cache, 100, b"later")
    with cache.frozen({0: [Piece(0, 4)]}, 0):
        theirs = b"mine" + OLD[4:200] + b"yours" + OLD[205:]
        cache.updated(0, Copy(3, theirs))  # of the commit after ours, which was version 2
        cache.committed({0: [Piece(0, 4)]}, {0: 2})
    assert page(cache) == theirs[:100] + b"later" + theirs[105:]
    with cache.frozen({0: [Piece(100, 5)]}, 0) as frozen:
        assert frozen[0].dirty, "they are still to be committed"
        cache.committed({0: [Piece(100, 5)]}, {0: 4})
    assert page(cache) == theirs[:100] + b"later" + theirs[105:]
    assert cache.states() == {"dirty": set(), "committed": {0}}


def test_stores_that_had_to_be_dropped_are_told_of_once(cache: Cache) -> None:
    store(cache, 0, b"mine")
    cache.updated(0, Copy(3, NEW))
    cache.refreshed(0, Copy(2, NEW))  # its home has come back without the last commit
    with pytest.raises(StoresLost, match=r"pages \[0\] of set"), cache.frozen(WHOLE, 0):
        pass
    with cache.frozen(WHOLE, 0) as frozen:
        assert frozen == {}


def test_who_discards_stores_need_not_hear_that_they_had_to_be_dropped(cache: Cache) -> None:
    store(cache, 0, b"mine")
    cache.updated(0, Copy(3, NEW))
    cache.refreshed(0, Copy(2, NEW))
    cache.give_up(cache.free([0]))
    with cache.frozen(WHOLE, 0) as frozen:
        assert frozen == {}
