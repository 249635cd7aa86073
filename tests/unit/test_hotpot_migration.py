"""Parts of datasets go to other nodes while they are read and written, on a simulated rack (hotpot_sim.py)."""

from __future__ import annotations

import itertools

import pytest

from guest_agents.hotpot import migration
from guest_agents.hotpot.blocks import PAGE
from guest_agents.hotpot.errors import BadArgument, HotpotError, NoSuchTransaction, NotOwner, Retry
from tests.unit.hotpot_crash import FATES, Case, assert_clean
from tests.unit.hotpot_sim import Net, simulated
from tests.unit.test_hotpot_recovery import SET, net, opened, read, service, write

__all__ = ["net"]
STEPS = [
    *(f"{when} {op}" for op in ("leave", "hand_over", "promote", "attend", "confirm", "seed", "clear", "fence",
                                "synced", "replica", "give")
      for when in ("send", "serve", "served", "sent")),
    *(f"persist {media}" for media in ("home", "copies", "node", "datasets", "log", "mirror")),
]  # fmt: skip


def homes(net: Net) -> tuple[int, ...]:
    return service(net, 1).atlas.refresh(SET).homes


def until_moved(net: Net, part: int, node: int) -> None:
    for _ in range(40):
        if homes(net)[part] == node and service(net, node).owner.home(SET, part).ready:
            return
        net.wait(0.1)
    raise AssertionError(f"part {part} does not come to node {node}: {homes(net)}")


def test_a_part_goes_to_another_node_with_all_that_was_committed(net: Net) -> None:
    write(net, 4, b"two.", 0, 1, replicas=2)
    write(net, 3, b"one.", 2)
    assert read(net, 1, 0) == b"two."
    service(net, 4).migrate(SET, 0, 1)
    until_moved(net, 0, 1)
    assert homes(net) == (1, 3)
    assert [read(net, node, page) for node in (1, 2, 3, 4) for page in (0, 1, 2)] == [b"two.", b"two.", b"one."] * 4
    write(net, 2, b"then", 0, 2, replicas=2)
    assert [read(net, node, page) for node in (1, 2, 3, 4) for page in (0, 2)] == [b"then"] * 8
    assert not service(net, 2).owner.homes()
    assert service(net, 2).owner.counts["migrations"] == 1


def test_reads_and_commits_go_on_while_it_moves_and_find_the_new_home(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migration, "_FEW", 0)
    write(net, 4, b"0000", 0)
    seen, done, refused, count = [], {0: 0, 2: 0}, 0, itertools.count(1)

    def meanwhile(op: str) -> None:
        nonlocal refused
        if op in ("clear", "seed", "hand_over", "promote", "fence", "attend", "confirm"):
            net.between = lambda _op: None
            seen.append(read(net, 4, 0))
            cache = opened(net, 3)
            cache.ensure([0])
            cache._forget(0)  # its next read is from the home
            assert read(net, 3, 0) == seen[-1]
            for page in (0, 2):
                try:
                    write(net, 4, b"%04d" % next(count), page)
                    done[page] += 1
                except Retry:
                    refused += 1
            net.between = meanwhile

    opened(net, 4)
    opened(net, 3)
    net.between = meanwhile
    service(net, 4).migrate(SET, 0, 1)
    until_moved(net, 0, 1)
    net.between = lambda _op: None
    assert len(seen) > 4
    assert done[2]
    assert refused
    write(net, 4, b"last", 0)
    assert {read(net, node, 0) for node in (1, 2, 3, 4)} == {b"last"}


def test_it_goes_by_itself_to_the_node_that_uses_it_most(net: Net) -> None:
    service(net, 1).dispatcher("create", name="busy", size=64 * PAGE, mode="mrmw", chunk=16 * PAGE, owners=[2, 3],
                               adapt=True)  # fmt: skip
    cache = service(net, 4).open("busy")
    cache.ensure(range(64))
    net.wait(2.5)
    record = service(net, 1).atlas.refresh(cache.record.id)
    assert record.homes == (4, 4)
    assert homes(net) == (2, 3)  # this one is not to adapt


@pytest.mark.parametrize(
    ("accessed", "node"),
    [({}, None), ({1: 99999, 2: 50000}, None), ({2: 50000, 1: 40000}, 2), ({2: 50000, 3: 40000, 1: 20000}, None),
     ({2: migration.LEAST - 1}, None), ({2: migration.LEAST}, 2)],
)  # fmt: skip
def test_only_a_node_that_uses_more_than_all_others_and_enough_gets_it(
    net: Net, accessed: dict[int, int], node: int | None
) -> None:
    home = service(net, 2).owner.home(SET, 0)
    home.accessed.update(accessed)
    assert migration.hottest(home, 1) == node


def test_each_commit_has_as_many_copies_as_before_whoever_is_lost_next(net: Net) -> None:
    """Two copies: one at the old home, which keeps it, or at another node."""
    for victim in (1, 2, 4):
        write(net, 4, b"%04d" % victim, 0, 2, replicas=2)
        goal = 1 if homes(net)[0] != 1 else 3
        service(net, 4).migrate(SET, 0, goal)
        until_moved(net, 0, goal)
        machine = net.machines[victim - 1]
        machine.power_off()
        machine.lose_media()
        machine.power_on()
        net.wait(4.0)
        assert [read(net, 3, page) for page in (0, 2)] == [b"%04d" % victim] * 2


def test_pages_that_were_never_written_are_zero_and_lost_ones_stay_lost(net: Net) -> None:
    write(net, 4, b"lost", 2)
    machine = net.machines[1]
    machine.power_off()
    machine.lose_media()
    machine.power_on()
    net.wait(3.0)
    goal = 4 if homes(net)[0] != 4 else 1
    service(net, 3).open("set")
    service(net, 3).migrate(SET, 0, goal)
    until_moved(net, 0, goal)
    assert read(net, 3, 0) == bytes(4)
    with pytest.raises(HotpotError, match="page 2 of set was lost"):
        read(net, 3, 2)


def test_a_node_that_is_gone_for_good_and_has_missed_a_commit_does_not_keep_a_part_from_moving(net: Net) -> None:
    write(net, 3, b"once", 0)
    assert read(net, 4, 0) == b"once"
    net.machines[3].power_off()
    write(net, 3, b"then", 0)
    assert service(net, 2).owner.home(SET, 0).missed == {4}
    net.wait(1.0)
    service(net, 3).migrate(SET, 0, 1)
    until_moved(net, 0, 1)
    assert read(net, 3, 0) == b"then"


def test_a_copy_on_a_node_that_is_gone_for_good_is_made_elsewhere_and_the_part_can_move(net: Net) -> None:
    """Nobody commits to it."""
    write(net, 4, b"kept", 0, replicas=2)
    [holder] = service(net, 2).owner.home(SET, 0).copies[0]
    net.machines[holder - 1].power_off()
    net.wait(3.0)
    [other] = service(net, 2).owner.home(SET, 0).copies[0]
    assert other != holder
    opened(net, 3)
    service(net, 3).migrate(SET, 0, 3)
    until_moved(net, 0, 3)
    assert read(net, 3, 0) == b"kept"


def test_a_node_that_does_not_hear_of_a_new_home_hears_of_it_later(net: Net) -> None:
    write(net, 3, b"once", 0)
    assert read(net, 4, 0) == b"once"

    def cut(op: str) -> None:
        if op == "attend":
            net.away = {4}

    net.between = cut
    service(net, 3).migrate(SET, 0, 1)
    until_moved(net, 0, 1)
    assert net.away == {4}
    write(net, 3, b"then", 0)
    net.between, net.away = lambda _op: None, set()
    assert service(net, 4).lease.valid  # so it has no reason of its own to look again
    net.wait(0.5)
    assert read(net, 4, 0) == b"then"


def test_a_home_does_not_carry_out_what_an_earlier_one_has_promised_not_to(net: Net) -> None:
    """Other owners have undone it then."""
    xid = 77
    about = {"xid": xid, "dataset": SET, "part": 0}
    asked = []

    def late(op: str) -> None:
        if op == "promote":
            with pytest.raises(NotOwner):  # the next one would not know of this promise
                service(net, 3).links.call(2, "status", {**about, "xid": 78})
            asked.append(op)

    assert service(net, 3).links.call(2, "status", about) == {"state": "unknown"}
    opened(net, 3)
    net.between = late
    service(net, 3).migrate(SET, 0, 4)
    until_moved(net, 0, 4)
    assert asked
    commit = {**about, "pages": [], "parts": [0, 1], "everywhere": [], "replicas": 1, "origin": [3, ""]}
    with pytest.raises(NoSuchTransaction):
        service(net, 3).links.call(4, "commit_now", commit)


def test_a_part_does_not_go_where_nobody_is(net: Net) -> None:
    opened(net, 4)
    with pytest.raises(BadArgument):
        service(net, 4).migrate(SET, 0, 9)
    service(net, 4).migrate(SET, 0, 3)
    with pytest.raises(Retry):
        service(net, 4).migrate(SET, 0, 1)


def test_the_dispatcher_knows_which_pages_only_a_new_home_has() -> None:
    """They must not be taken for unwritten when that one is away, too."""
    with simulated(2, "only copy") as net:
        net.died = lambda _machine: None
        net.machines[1].service.dispatcher("create", name="set", size=3 * PAGE, mode="mrmw", chunk=PAGE, owners=[2])
        write(net, 2, b"kept", 1, replicas=2)
        net.machines[1].power_off()
        until_moved(net, 0, 1)
        dispatcher = service(net, 1)._dispatcher
        assert dispatcher is not None
        assert dispatcher.listed[SET].solo == {1}
        net.machines[1].power_on()
        net.wait(2.0)
        write(net, 1, b"both", 0, 1, replicas=2)
        assert [read(net, node, 1) for node in (1, 2)] == [b"both"] * 2


def matrix() -> list[Case]:
    """Every step, with every fate."""
    return [Case(("mrmw", "mrsw")[number % 2], fate, step, 1 + number % 4, number, moves=True)
            for number, (step, fate) in enumerate(itertools.product(STEPS, FATES))]  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("part", range(4))
def test_no_acknowledged_commit_is_lost_whoever_dies_while_parts_move(part: int) -> None:
    assert_clean(matrix()[part::4])


def test_a_node_that_shall_go_leaves_all_parts_and_copies_are_made_elsewhere(net: Net) -> None:
    write(net, 4, b"two.", 0, 2, replicas=2)
    write(net, 4, b"one.", 1)
    for _ in range(100):
        left = service(net, 2).migration.depart([1, 4])["datasets"]
        if not left:
            break
        assert left.keys() == {"set"}
        net.wait(0.1)
    assert 2 not in homes(net)
    assert service(net, 2).migration.depart([1, 4])["datasets"] == {}
    machine = net.machines[1]
    machine.power_off()
    machine.lose_media()
    net.wait(4.0)  # it is dead, and what has too few copies without it gets others
    assert [read(net, 3, page) for page in (0, 1, 2)] == [b"two.", b"one.", b"two."]
    home = service(net, homes(net)[0]).owner.home(SET, 0)
    assert not home.short
    assert all(home.copies[page] for page in home.record.pages_of(0))


def test_without_another_node_nothing_departs(net: Net) -> None:
    assert service(net, 2).migration.depart([])["datasets"].keys() == {"set"}
    assert service(net, 2).migration.depart([9])["datasets"].keys() == {"set"}
    assert service(net, 2).owner.home(SET, 0).leave is None
