"""Another node becomes the dispatcher when its blade is gone, on a simulated rack (hotpot_sim.py)."""

from __future__ import annotations

import itertools

import pytest

from guest_agents.hotpot import promotion
from guest_agents.hotpot.blocks import PAGE
from guest_agents.hotpot.errors import HotpotError, Isolated, NodeLost, NotOwner
from tests.unit.hotpot_crash import FATES, Case, assert_clean
from tests.unit.hotpot_sim import Net
from tests.unit.test_hotpot_recovery import SET, net, opened, read, service, write

__all__ = ["net"]
STEPS = [
    *(f"{when} {op}" for op in ("mirror", "vote") for when in ("send", "serve", "served", "sent")),
    *(f"serve {op}" for op in ("beat", "synced", "confirm", "find", "hand_over", "acquire", "register")),
    *(f"served {op}" for op in ("beat", "synced", "confirm", "hand_over", "acquire")),
    "send promote", "sent promote", "persist datasets", "persist mirror",
]  # fmt: skip


def seats(net: Net) -> list[int]:
    """Whom each living node takes for the dispatcher."""
    return [machine.service.lease.manager for machine in net.machines if machine.life is not None]


def test_commits_go_on_without_the_managers_blade_and_its_parts_get_other_homes(net: Net) -> None:
    service(net, 1).dispatcher("create", name="more", size=2 * PAGE, mode="mrsw", chunk=PAGE, owners=[1, 3])
    write(net, 4, b"kept", 0, 1, replicas=2)
    net.machines[0].power_off()
    net.wait(3.0)
    assert seats(net) == [2, 2, 2]
    assert [about["name"] for about in service(net, 4).dispatcher("list")["datasets"]] == ["set", "more"]
    write(net, 4, b"then", 0, 1, replicas=3)
    assert read(net, 3, 0) == b"then"
    service(net, 3).dispatcher("create", name="new", size=PAGE, mode="mrmw", chunk=PAGE)
    datasets = {about["name"]: about for about in service(net, 3).dispatcher("list")["datasets"]}
    assert datasets["more"]["homes"] == [2, 3]
    net.machines[0].power_on()
    net.wait(1.0)
    assert seats(net) == [2, 2, 2, 2]
    assert read(net, 1, 0) == b"then"
    write(net, 1, b"last", 0, 1, replicas=4)


@pytest.mark.parametrize("lost", [False, True])
def test_a_manager_that_comes_back_soon_stays_the_dispatcher(net: Net, lost: bool) -> None:
    write(net, 4, b"kept", 0, 1, replicas=2)
    net.machines[0].power_off()
    if lost:
        net.machines[0].lose_media()
    net.wait(0.3)
    net.machines[0].power_on()
    net.wait(1.0)
    assert seats(net) == [1, 1, 1, 1]
    assert read(net, 1, 0) == b"kept"


def test_a_dispatcher_that_is_cut_off_changes_nothing_and_follows_the_next_one(net: Net) -> None:
    net.away = {1}
    with pytest.raises(HotpotError):
        service(net, 1).dispatcher("create", name="no", size=PAGE, mode="mrmw", chunk=PAGE, owners=[1])
    net.wait(3.0)
    assert seats(net) == [1, 2, 2, 2]
    with pytest.raises(Isolated):
        service(net, 1).dispatcher("open", name="set")
    net.away = set()
    net.wait(2.0)
    assert len(set(seats(net))) == 1
    assert [about["name"] for about in service(net, 4).dispatcher("list")["datasets"]] == ["set"]


def test_a_dispatcher_that_was_superseded_does_not_replace_the_homes_of_the_next_one(net: Net) -> None:
    write(net, 3, b"both", 0, replicas=2)
    old = service(net, 1)._dispatcher
    assert old is not None
    net.away = {1}
    net.wait(4.0)
    net.machines[1].power_off()
    net.wait(4.0)
    home = service(net, 4).atlas.refresh(SET).homes[0]
    write(net, home, b"only", 2)
    net.away = set()
    assert not old.superseded  # it has not heard of it yet
    with pytest.raises(HotpotError):
        promotion.move(old, old.listed[SET], 0, home)
    net.wait(2.0)
    assert (read(net, 4, 0), read(net, 4, 2)) == (b"both", b"only")


def test_a_home_that_is_in_use_is_not_made_again(net: Net) -> None:
    """Its dispatcher has asked twice, and the first time took long."""
    write(net, 4, b"only", 0)
    record = service(net, 1).atlas.refresh(SET)
    about = {"record": record.to_json(), "part": 0, "synced": [], "media": [], "solo": [], "claims": [], "term": 0}
    with pytest.raises(NotOwner):
        service(net, 1).links.call(2, "promote", about)
    assert read(net, 3, 0) == b"only"


def test_a_node_that_has_become_the_dispatcher_still_is_when_it_comes_back(net: Net) -> None:
    net.machines[0].power_off()
    net.wait(3.0)
    assert seats(net) == [2, 2, 2]
    net.machines[1].power_off()
    net.machines[1].power_on()
    net.wait(0.3)
    assert [about["name"] for about in service(net, 4).dispatcher("list")["datasets"]] == ["set"]
    assert seats(net) == [2, 2, 2]


def test_half_of_the_nodes_make_none(net: Net) -> None:
    net.away = {1, 2}
    net.wait(5.0)
    assert seats(net) == [1, 1, 1, 1]
    with pytest.raises((NodeLost, Isolated)):
        write(net, 4, b"none", 0)
    assert not any(machine.service._dispatcher for machine in net.machines[1:])


def test_nodes_that_die_one_after_the_other_leave_a_dispatcher_to_the_last(net: Net) -> None:
    write(net, 1, b"kept", 0, replicas=4)
    for number in (4, 3, 2):
        net.machines[number - 1].power_off()
        net.wait(4.0)
    assert seats(net) == [1]
    assert read(net, 1, 0) == b"kept"
    service(net, 1).dispatcher("create", name="new", size=PAGE, mode="mrmw", chunk=PAGE)
    assert opened(net, 1).record.id == SET


def matrix() -> list[Case]:
    """Every step at the dispatcher, with every fate, while parts move or not."""
    return [Case(("mrmw", "mrsw")[number % 2], fate, step, 1 + number % 4, number, number % 3 == 0, standby=True)
            for number, (step, fate) in enumerate(itertools.product(STEPS, FATES))]  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("part", range(2))
def test_no_acknowledged_commit_is_lost_when_the_dispatcher_dies(part: int) -> None:
    assert_clean(matrix()[part::2])
