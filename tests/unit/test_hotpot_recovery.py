"""What a recovery does in single cases, on a simulated rack (hotpot_sim.py)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from guest_agents.hotpot.blocks import PAGE
from guest_agents.hotpot.cache import Cache
from guest_agents.hotpot.coordinator import new_xid
from guest_agents.hotpot.errors import Corrupt, HotpotError, InDoubt, Isolated, NodeLost, NotOwner, PagesLost, Retry
from guest_agents.hotpot.home import Home
from guest_agents.hotpot.service import Service, Transaction
from tests.unit.hotpot_crash import load, store
from tests.unit.hotpot_sim import TIMING, LossyFolder, Machine, Net, PowerOff, simulated

SET = 1


@pytest.fixture
def net() -> Iterator[Net]:
    """Four nodes; the second is the home of pages 0 and 2 of a dataset, the third of page 1."""
    with simulated(4, "recovery") as made:
        made.survival = 0.0
        made.died = lambda _machine: None
        made.machines[3].service.dispatcher("create", name="set", size=3 * PAGE, mode="mrmw", chunk=PAGE, owners=[2, 3])
        yield made


def service(net: Net, node: int) -> Service:
    return net.machines[node - 1].service


def opened(net: Net, node: int) -> Cache:
    found = service(net, node)._opened.get(SET)
    return service(net, node).open("set") if found is None else found.cache


def write(net: Net, node: int, data: bytes, *pages: int, replicas: int = 1) -> None:
    """One transaction that begins these pages with `data`."""
    there, cache = service(net, node), opened(net, node)
    transaction = Transaction(new_xid(), SET)
    there.acquire(transaction, [(page * PAGE, len(data)) for page in pages])
    for page in pages:
        store(cache, page * PAGE, data)
    there.commit(transaction, replicas)


def read(net: Net, node: int, page: int) -> bytes:
    cache = opened(net, node)
    cache.ensure([page])
    return load(cache, page * PAGE, 4)


def test_what_is_not_persisted_is_lost_with_the_power(net: Net) -> None:
    """Else none of these tests would prove anything."""
    life = net.machines[3].life
    assert life is not None
    media = LossyFolder(life).open("other", 256)
    media.write(0, b"kept")
    media.persist(0, 4)
    media.write(64, b"gone")
    assert media.read(64, 4) == b"gone"
    net.machines[3].power_off()
    assert net.machines[3].disk["other"][:4] == b"kept"
    assert net.machines[3].disk["other"][64:68] == bytes(4)


def test_a_whole_rack_without_power_comes_back(net: Net) -> None:
    write(net, 4, b"kept", 0, 1, replicas=2)
    write(net, 1, b"more", 2)
    for machine in net.machines:
        machine.power_off()
    for machine in reversed(net.machines):
        machine.power_on()
    net.wait(2.0)
    assert [read(net, 4, page) for page in range(3)] == [b"kept", b"kept", b"more"]
    write(net, 3, b"then", 0, 1, 2, replicas=3)
    assert [read(net, 2, page) for page in range(3)] == [b"then"] * 3


def test_what_was_open_where_the_power_failed_is_not_open_there_any_more(net: Net) -> None:
    write(net, 4, b"kept", 0)
    service(net, 4).close_dataset(SET)
    read(net, 3, 0)
    net.machines[2].power_off()
    net.machines[2].power_on()
    net.wait(1.0)
    service(net, 1).dispatcher("delete", name="set")
    assert service(net, 1).dispatcher("list")["datasets"] == []


def test_a_corrupt_page_is_mended_from_a_copy_and_reported(net: Net) -> None:
    write(net, 4, b"kept", 0, replicas=2)
    write(net, 4, b"only", 2)
    machine = net.machines[1]
    machine.power_off()
    machine.disk["home-1-0"][100] ^= 1
    machine.power_on()
    net.wait(1.0)
    assert read(net, 1, 0) == b"kept"
    assert machine.service.owner.home(SET, 0).read(0).data[:4] == b"kept"
    assert "1 corrupt pages of set were mended from copies" in machine.service.stat()["recovered"]


def test_a_corrupt_page_without_a_copy_is_reported_and_not_used(net: Net) -> None:
    write(net, 4, b"kept", 0, 1)
    write(net, 4, b"only", 2)
    machine = net.machines[1]
    machine.power_off()
    machine.disk["home-1-0"][100] ^= 1
    machine.power_on()
    net.wait(1.0)
    with pytest.raises(Corrupt, match="page 0 of set"):
        read(net, 2, 0)
    net.wait(0.3)
    assert "1 pages of set are corrupt and have no copy: 0" in machine.service.stat()["recovered"]
    assert (read(net, 2, 1), read(net, 2, 2)) == (b"kept", b"only")
    with pytest.raises(Corrupt):
        write(net, 2, b"over", 0)
    write(net, 1, b"more", 2)


def test_pages_that_only_a_lost_node_had_are_named_and_others_are_there(net: Net) -> None:
    write(net, 4, b"kept", 0, replicas=2)
    write(net, 4, b"lost", 2)
    write(net, 4, b"safe", 1)
    machine = net.machines[1]
    machine.power_off()
    machine.lose_media()
    machine.power_on()
    net.wait(3.0)
    assert (read(net, 1, 0), read(net, 1, 1)) == (b"kept", b"safe")
    with pytest.raises(PagesLost, match="page 2 of set"):
        read(net, 1, 2)
    with pytest.raises(PagesLost):
        write(net, 1, b"over", 2)
    write(net, 1, b"more", 0, 1, replicas=2)


def test_a_page_that_only_a_dead_node_has_is_waited_for(net: Net) -> None:
    write(net, 4, b"only", 0)
    net.machines[1].power_off()
    net.wait(3.0)
    with pytest.raises(NodeLost):
        read(net, 1, 0)
    net.machines[1].power_on()
    net.wait(1.0)
    assert read(net, 1, 0) == b"only"


def test_copies_on_a_dead_node_are_made_again_without_anybody_asking(net: Net) -> None:
    write(net, 4, b"kept", 0, replicas=2)
    home = service(net, 2).owner.home(SET, 0)
    [holder] = home.copies[0]
    net.machines[holder - 1].power_off()
    write(net, 2, b"more", 0)
    net.wait(1.0)
    [other] = home.copies[0]
    assert other != holder
    copy = service(net, other).copies.read(SET, 0)
    assert copy is not None
    assert copy.data[:4] == b"more"


def test_the_side_without_the_dispatcher_commits_nothing_and_heals(net: Net) -> None:
    write(net, 4, b"kept", 0, replicas=3)
    assert read(net, 2, 0) == b"kept"
    net.away = {2}
    net.wait(TIMING.lease + 0.2)
    with pytest.raises(Isolated):
        write(net, 2, b"lost", 0)
    net.wait(TIMING.promote)
    write(net, 4, b"more", 0, replicas=2)
    assert read(net, 2, 0) == b"kept", "it may still be read there, as it was"
    net.away = set()
    net.wait(1.0)
    assert read(net, 2, 0) == b"more"
    assert service(net, 1).atlas.refresh(SET).homes[0] != 2
    write(net, 2, b"then", 0)
    assert read(net, 4, 0) == b"then"


def test_the_dispatcher_has_its_book_again_after_it_was_lost(net: Net) -> None:
    write(net, 4, b"kept", 0, 1, replicas=2)
    machine = net.machines[0]
    machine.power_off()
    machine.lose_media()
    machine.power_on()
    net.wait(1.0)
    assert [about["name"] for about in service(net, 4).dispatcher("list")["datasets"]] == ["set"]
    write(net, 1, b"more", 0, 1, replicas=3)
    assert read(net, 3, 0) == b"more"


@pytest.mark.parametrize("back", [False, True])
def test_a_commit_that_was_decided_outlives_its_owner(net: Net, back: bool) -> None:
    """Another node becomes the home, and is told all of it; or the owner comes back with its log."""
    write(net, 4, b"kept", 0, 1, replicas=2)
    net.trap = lambda machine, event: event == "serve commit" and machine is net.machines[2]
    if back:
        net.died = lambda machine: setattr(machine, "back_at", net.now + 0.2)
    write(net, 4, b"more", 0, 1, replicas=2)
    assert (service(net, 1).atlas.refresh(SET).homes[1] == 3) == back
    assert (read(net, 1, 0), read(net, 1, 1)) == (b"more", b"more")


def test_a_commit_in_doubt_is_settled_without_its_node(net: Net) -> None:
    write(net, 4, b"kept", 0, 1, replicas=2)
    net.trap = lambda machine, event: event == "send commit"
    with pytest.raises(PowerOff):
        write(net, 4, b"more", 0, 1, replicas=2)
    assert service(net, 2).owner.homes()[0].locks
    net.wait(2.0)
    assert not service(net, 2).owner.homes()[0].locks
    assert (read(net, 1, 0), read(net, 1, 1)) == (b"kept", b"kept"), "no owner had seen the decision"


def test_a_commit_does_not_count_on_a_node_that_the_dispatcher_has_struck_off_meanwhile(net: Net) -> None:
    """Node 4 comes back without its media and registers; before the home hears of that, it commits with a copy there.
    The copy counts only when the dispatcher knows of it: then the home may be lost, too."""
    write(net, 4, b"kept", 0, replicas=2)
    copies = net.machines[3]
    copies.power_off()
    copies.lose_media()
    copies.power_on()
    copies.service.keeper.turn()
    write(net, 4, b"more", 0, replicas=2)
    write(net, 4, b"new.", 2, replicas=2)
    net.machines[1].power_off()
    net.machines[1].lose_media()
    net.machines[1].power_on()
    net.wait(4.0)
    assert (read(net, 3, 0), read(net, 3, 2)) == (b"more", b"new.")


def test_a_home_that_is_dropped_in_the_middle_of_a_commit_is_written_no_more(net: Net) -> None:
    write(net, 4, b"kept", 0, replicas=2)
    owner = service(net, 2).owner
    dropped: list[Home] = []

    def between(op: str) -> None:
        if op == "replica" and not dropped:
            dropped.append(owner.home(SET, 0))
            owner.drop(dropped[0])
            assert owner.log.used, "the commit that uses its record has not ended"

    net.between = between
    with pytest.raises(HotpotError):
        write(net, 4, b"lost", 0, replicas=2)
    assert dropped
    assert not owner.log.used
    with pytest.raises(NotOwner):
        dropped[0].write({})


def test_copies_of_a_dataset_that_was_deleted_meanwhile_go(net: Net) -> None:
    write(net, 2, b"kept", 0, replicas=4)
    service(net, 2).close_dataset(SET)
    net.machines[3].power_off()
    service(net, 1).dispatcher("delete", name="set")
    assert "copies-1" in net.machines[3].disk
    net.machines[3].power_on()
    net.wait(0.5)
    assert "copies-1" not in net.machines[3].disk


def test_a_commit_in_doubt_ends_with_its_dataset(net: Net) -> None:
    cache = opened(net, 4)
    cache.ensure([0, 1])

    def cut(op: str) -> None:
        if op == "commit":
            net.away = {4}

    net.between = cut
    with pytest.raises(InDoubt):
        write(net, 4, b"mine", 0, 1)
    service(net, 4).close_dataset(SET)
    service(net, 1).dispatcher("delete", name="set")
    net.between, net.away = lambda _op: None, set()
    net.wait(1.0)
    assert not service(net, 4).coordinator.unfinished
    assert not any(log.used for node in (2, 3, 4) for log in (service(net, node)._log, service(net, node)._intents))


def test_nobody_else_writes_pages_of_an_mrsw_commit_of_which_it_is_not_known_whether_it_took_place(net: Net) -> None:
    service(net, 1).dispatcher("create", name="one", size=PAGE, mode="mrsw", chunk=PAGE, owners=[2])
    caches = {node: service(net, node).open("one") for node in (3, 4)}
    number = caches[4].record.id
    for cache in caches.values():
        cache.ensure([0])
    store(caches[4], 0, b"once")
    service(net, 4).commit_areas(number, [(0, 4)], 1)  # so no other node can become the home

    def cut(op: str) -> None:
        if op == "replica":
            net.away = {2}

    mine, other = Transaction(new_xid(), number), Transaction(new_xid(), number)
    service(net, 4).acquire(mine, [(0, 4)])
    store(caches[4], 0, b"mine")
    net.between = cut
    with pytest.raises(InDoubt):
        service(net, 4).commit(mine, 2)
    with pytest.raises(Retry):
        service(net, 3).acquire(other, [(0, 4)])
    net.between, net.away = lambda _op: None, set()
    net.wait(2.0)
    service(net, 3).acquire(other, [(0, 4)])
    assert load(caches[3], 0, 4) == b"mine"
    assert not service(net, 4).coordinator.unfinished


def test_a_copy_of_which_the_home_has_not_heard_is_not_used_when_it_is_old(net: Net) -> None:
    write(net, 3, b"once", 0)
    owner = service(net, 2).owner

    def cut(_machine: Machine, event: str) -> bool:
        net.away = {2} if event == "served seed" else net.away
        return False

    net.trap = cut
    with pytest.raises(Isolated):  # nor can it tell the dispatcher not to trust that one
        owner.replicas.give(owner.home(SET, 0), 4, [0])
    net.trap, net.away = None, set()
    assert service(net, 4).copies.held(SET) == {0}
    write(net, 3, b"then", 0)
    net.wait(0.5)
    assert read(net, 4, 0) == b"then"


def test_pages_that_have_copies_by_now_do_not_wait_for_their_home(net: Net) -> None:
    """They were committed with one copy at first."""
    write(net, 4, b"once", 0, 2)
    write(net, 4, b"then", 0, 2, replicas=2)
    net.wait(0.5)
    net.machines[1].power_off()
    net.wait(3.0)
    assert [read(net, 3, page) for page in (0, 2)] == [b"then"] * 2
