"""Which host each blade is on: properties that hold for every rack, and what is said when there is no room."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from orchestrator.errors import RacklessError
from orchestrator.fields import MIB
from orchestrator.model import Rack
from orchestrator.placement import Room, Seat, place

HOSTS = ("here", "far", "away")
SIZES = st.integers(192, 1024)


def rack(blades: dict[str, dict[str, Any]], hosts: int = 3) -> Rack:
    """A rack of memory blades (as in a rack file, without kind) on so many hosts, with a manager that needs little."""
    return Rack.model_validate({
        "name": "demo",
        "hosts": {name: {"address": f"192.168.1.{number + 1}",
                         **({"uri": f"qemu+ssh://root@192.168.1.{number + 1}/system"} if number else {})}
                  for number, name in enumerate(HOSTS[:hosts])},
        "blades": {"gm0": {"kind": "manager", "memory": "192 MiB"},
                   **{name: {"kind": "memory", **blade} for name, blade in blades.items()}},
    })  # fmt: skip


@st.composite
def cases(draw: st.DrawFn) -> tuple[Rack, dict[str, Room], dict[str, Seat]]:
    """A rack, rooms that may be too small for it, and where some of its blades are already."""
    blades = {f"mb{number}": {"memory": f"{draw(SIZES)} MiB", "cpus": draw(st.integers(1, 4)),
                              "host": draw(st.none() | st.sampled_from(HOSTS))}
              for number in range(draw(st.integers(0, 8)))}  # fmt: skip
    rooms = {name: Room(draw(st.integers(1, 4096)) * MIB, draw(st.integers(1, 8))) for name in HOSTS}
    seats = st.builds(Seat, st.sampled_from([*HOSTS, "left"]), SIZES.map(lambda size: size * MIB), st.integers(1, 4))
    there = draw(st.dictionaries(st.sampled_from(["gm0", "gone", *blades]), seats))
    return rack(blades), rooms, there


def seats(made: Rack, placed: dict[str, str]) -> dict[str, Seat]:
    """Of blades that are where they were placed."""
    return {name: Seat(host, made.blades[name].memory, made.blades[name].cpus) for name, host in placed.items()}


def fits(made: Rack, rooms: dict[str, Room], placed: dict[str, str], there: dict[str, Seat]) -> bool:
    """Is there room, wherever a blade came, or grew?"""
    used = dict.fromkeys(rooms, 0)
    for name, host in placed.items():
        used[host] += made.blades[name].memory
    for name, host in placed.items():
        blade, seat = made.blades[name], there.get(name)
        stays = seat and seat.host == host and blade.memory <= seat.memory and blade.cpus <= seat.cpus
        if not stays and (used[host] > rooms[host].memory or blade.cpus > rooms[host].cpus):
            return False
    return True


Case = tuple[Rack, dict[str, Room], dict[str, Seat]]


@given(cases())
def test_blades_are_where_they_must_be_and_no_host_is_filled_too_much(case: Case) -> None:
    made, rooms, there = case
    try:
        placed = place(made, rooms, there)
    except RacklessError:
        return  # what it says is tested below
    assert list(placed) == list(made.blades)
    assert fits(made, rooms, placed, there)
    for name, blade in made.blades.items():
        if blade.host is not None:
            assert placed[name] == blade.host
        elif name in there and there[name].host in rooms:
            assert placed[name] == there[name].host


@pytest.mark.long
@given(cases())
def test_planning_again_moves_nothing_also_when_there_is_less_room(case: Case) -> None:
    made, rooms, there = case
    try:
        placed = place(made, rooms, there)
    except RacklessError:
        assume(False)
    assert place(made, rooms, seats(made, placed)) == placed
    for memory in (rooms["far"].memory * 2, MIB, -MIB):  # others came, and have promised each other too much
        other = {**rooms, "far": Room(memory, 1)}
        assert place(made, other, seats(made, placed)) == placed


def test_one_that_is_there_is_refused_only_when_it_grows() -> None:
    made = rack({"mb0": {"memory": "512 MiB", "host": "far"}}, hosts=2)
    rooms = {"here": Room(300 * MIB, 2), "far": Room(256 * MIB, 1)}
    there = {"mb0": Seat("far", 512 * MIB, 1)}
    assert place(made, rooms, there) == {"gm0": "here", "mb0": "far"}
    for smaller in (Seat("far", 511 * MIB, 1), Seat("here", 512 * MIB, 1)):
        with pytest.raises(RacklessError, match=r"blades\.mb0 does not fit on host far"):
            place(made, rooms, {"mb0": smaller})


@given(st.lists(SIZES, min_size=1, max_size=10))
def test_a_rack_that_leaves_room_for_one_more_everywhere_is_never_refused(mebibytes: list[int]) -> None:
    """Packing is not perfect; but the least full host has no more than its share, and so room for any blade."""
    made = rack({f"mb{number}": {"memory": f"{size} MiB"} for number, size in enumerate(mebibytes)})
    share = (sum(mebibytes) + 192) // len(HOSTS) + 1
    rooms = {name: Room((share + max(192, *mebibytes)) * MIB, 1) for name in HOSTS}
    assert fits(made, rooms, place(made, rooms, {}), {})


def test_blades_are_spread_by_memory_and_by_cpus() -> None:
    made = rack({f"mb{number}": {"memory": "512 MiB"} for number in range(4)}, hosts=2)
    same = {"here": Room(4096 * MIB, 8), "far": Room(4096 * MIB, 8)}
    placed = place(made, same, {})
    assert sorted(placed[f"mb{number}"] for number in range(4)) == ["far", "far", "here", "here"]
    few = {**same, "here": Room(4096 * MIB, 2)}
    assert [*place(made, few, {}).values()].count("here") == 1, "its CPUs are taken, though there is memory"


def test_one_that_died_goes_where_its_disk_is_if_there_is_room() -> None:
    made = rack({f"mb{number}": {"memory": "512 MiB"} for number in range(3)}, hosts=2)
    rooms = {"here": Room(8192 * MIB, 8), "far": Room(1024 * MIB, 1)}
    assert set(place(made, rooms, {}).values()) == {"here"}
    assert place(made, rooms, {}, {"mb2": "far"})["mb2"] == "far"
    assert place(made, rooms, {"gm0": Seat("far", 600 * MIB, 1)}, {"mb1": "far", "mb2": "far", "mb0": "left"}) == {
        "gm0": "far", "mb0": "here", "mb1": "far", "mb2": "here"}  # fmt: skip
    pinned = rack({"mb0": {"memory": "512 MiB", "host": "here"}}, hosts=2)
    assert place(pinned, rooms, {}, {"mb0": "far"})["mb0"] == "here"


def test_what_does_not_fit_is_named_with_what_is_left() -> None:
    rooms = {"here": Room(300 * MIB, 2), "far": Room(600 * MIB, 1)}
    with pytest.raises(RacklessError) as caught:
        place(rack({"mb0": {"memory": "512 MiB", "cpus": 2}}, hosts=2), rooms, {})
    assert caught.value.message == (
        "blades.mb0 does not fit on any host: it has 512 MiB and 2 CPUs; left are: here 300 MiB and 2 CPUs, "
        "far 600 MiB and 1 CPUs"
    )
    with pytest.raises(RacklessError, match="on host far: it has 1 GiB and 1 CPU; left are: far 600 MiB and 1 CPUs"):
        place(rack({"mb0": {"memory": "1 GiB", "host": "far"}}, hosts=2), rooms, {})
