"""What becomes of the pages that programs of a node have mapped, without programs."""

from __future__ import annotations

import os

import pytest

from guest_agents.hotpot.blocks import PAGE, Copy
from guest_agents.hotpot.cache import Cache
from guest_agents.hotpot.errors import Retry
from guest_agents.hotpot.records import Piece, Record

OLD, NEW = b"o" * PAGE, b"n" * PAGE
WHOLE = {0: [Piece(0, PAGE)]}


@pytest.fixture
def cache() -> Cache:
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
