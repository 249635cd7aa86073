"""What goes when there is no room, on a simulated rack (hotpot_sim.py), and on a device."""

from __future__ import annotations

import itertools

import pytest

from guest_agents.hotpot.blocks import PAGE, STRIDE
from tests.unit.hotpot_crash import FATES, Case, assert_clean, store
from tests.unit.hotpot_sim import Net
from tests.unit.test_hotpot_recovery import SET, net, opened, read, service, write

__all__ = ["net"]
STEPS = [
    *(f"{when} {op}" for op in ("make_room", "clear", "seed", "synced")
      for when in ("send", "serve", "served", "sent")),
    "persist copies",
]  # fmt: skip


def holders(net: Net, page: int) -> set[int]:
    return {machine.number for machine in net.machines if page in machine.service.copies.held(SET)}


def test_mapped_pages_go_that_were_longest_not_asked_for_and_come_back(net: Net) -> None:
    write(net, 1, b"kept", 0, 1, 2)
    cache = opened(net, 4)
    for page in (1, 0, 2):
        cache.ensure([page])
    cache.acquire([1], 77)
    cache.release([1])
    service(net, 4).eviction.limits.mapped = 2 * PAGE
    net.wait(0.3)
    assert sorted(cache.pages()) == [1, 2]
    assert cache.counts["evicted"] == 1
    assert read(net, 4, 0) == b"kept"
    write(net, 1, b"more", 0, 1, 2)
    assert [read(net, 4, page) for page in (0, 1, 2)] == [b"more"] * 3


def test_what_was_written_or_is_in_a_transaction_never_goes(net: Net) -> None:
    write(net, 1, b"kept", 0, 1, 2)
    cache = opened(net, 4)
    cache.ensure([0, 1, 2])
    store(cache, 0, b"mine")
    cache.acquire([1], 77)
    service(net, 4).eviction.limits.mapped = 0
    net.wait(0.3)
    assert sorted(cache.pages()) == [0, 1]
    assert read(net, 4, 0) == b"mine"


def test_a_copy_goes_only_when_there_is_another_and_the_home_knows(net: Net) -> None:
    write(net, 4, b"kept", 0, 1, replicas=2)
    before = {page: holders(net, page) for page in (0, 1)}
    assert before == {0: {4}, 1: {4}}
    service(net, 4).eviction.limits.copies = 0
    net.wait(0.5)
    assert all(4 not in holders(net, page) and len(holders(net, page)) == 1 for page in (0, 1))
    assert service(net, 4).owner.counts["copies_evicted"] == 2
    assert service(net, 2).owner.home(SET, 0).copies[0] == holders(net, 0)
    net.machines[1].power_off()
    net.machines[1].lose_media()
    net.machines[1].power_on()
    net.wait(3.0)
    assert read(net, 3, 0) == b"kept"


def test_a_copy_stays_that_nobody_else_can_take(net: Net) -> None:
    write(net, 4, b"kept", 0, replicas=4)
    service(net, 4).eviction.limits.copies = 0
    net.wait(0.5)
    assert holders(net, 0) == {1, 3, 4}
    assert service(net, 2).owner.counts["evictions_refused"]


def test_redundant_copies_go_before_those_of_mapped_pages_and_never_those_of_dirty_ones(net: Net) -> None:
    service(net, 1).dispatcher("create", name="long", size=192 * PAGE, mode="mrmw", chunk=64 * PAGE, owners=[2])
    writer, reader = service(net, 3).open("long"), service(net, 4).open("long")
    number = writer.record.id
    for page in (0, 64, 128):
        reader.ensure([page])  # so that the second copy comes here
        writer.ensure([page])
        store(writer, page * PAGE, b"page")
        service(net, 3).commit_areas(number, [(page * PAGE, 4)], 3)
    assert service(net, 4).copies.held(number) == {0, 64, 128}
    reader._forget(128)
    store(reader, 0, b"mine")
    limits = service(net, 4).eviction.limits
    limits.copies = 2 * STRIDE
    net.wait(0.3)
    assert service(net, 4).copies.held(number) == {0, 64}
    limits.copies = 0
    net.wait(0.5)
    assert service(net, 4).copies.held(number) == {0}


def matrix() -> list[Case]:
    """Every step, with every fate."""
    return [Case(("mrmw", "mrsw")[number % 2], fate, step, 1 + number % 4, number, scarce=True)
            for number, (step, fate) in enumerate(itertools.product(STEPS, FATES))]  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("part", range(2))
def test_no_acknowledged_commit_is_lost_whoever_dies_while_copies_go(part: int) -> None:
    assert_clean(matrix()[part::2])
