"""Persistent memory that loses what was not persisted: the host's crash image, the blade's device, named pieces of it.

The files are those that a blade would have; only that no kernel lies between.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from guest_agents import pmem as guest
from guest_agents.pmem import LINE, SCRATCH, Device, Places, PmemError
from guest_agents.shelf import UNIT, Damaged, Different, Foreign, Full, Shelf
from orchestrator import pmem, sparse
from orchestrator.powertest import Verdict
from orchestrator.settings import BladePaths

SIZE = 2 << 20


class Power:
    """A blade's two files, and its device while the power is on."""

    def __init__(self, root: Path) -> None:
        self.files = BladePaths(root)
        self.file = root / "pmem.json"
        places = Places("devdax", SIZE, str(self.files.pmem_vol), 0, str(self.files.pmem), 0)
        places.save(self.file)
        pmem.prepare(self.files, SIZE)

    def on(self) -> Device:
        """Start the blade."""
        pmem.prepare(self.files, SIZE)
        return Device(self.file)


@pytest.fixture
def power(tmp_path: Path) -> Power:
    return Power(tmp_path)


def line(number: int) -> slice:
    """The bytes of a line."""
    return slice(number * LINE, (number + 1) * LINE)


def fill(device: Device, number: int, letter: bytes) -> None:
    """Store a line."""
    device.memory[line(number)] = letter * LINE


# The crash image


def test_what_is_persisted_stays_and_all_else_vanishes(power: Power) -> None:
    with power.on() as device:
        for number in range(4):
            fill(device, number, b"x")
        device.persist(2 * LINE + 5, 1)
    assert pmem.pull_power(power.files) == pmem.Crash(3, 0)
    with power.on() as device:
        assert [bytes(device.memory[line(n)]) == b"x" * LINE for n in range(4)] == [False, False, True, False]


def test_with_certainty_everything_survives(power: Power) -> None:
    """Were vol not really what is lost from, the test above would prove nothing: the same stores are kept here."""
    with power.on() as device:
        fill(device, 3, b"x")
        fill(device, 5000, b"y")
    assert pmem.pull_power(power.files, 1.0) == pmem.Crash(2, 2)
    with power.on() as device:
        assert bytes(device.memory[line(3)]) == b"x" * LINE
        assert bytes(device.memory[line(5000)]) == b"y" * LINE


def test_zeros_are_stores_too_where_a_restored_blade_has_a_hole(power: Power) -> None:
    """QEMU writes no zeros when it fills vol of a blade from a snapshot."""
    with power.on() as device:
        fill(device, 5000, b"x")
        device.persist(5000 * LINE, LINE)
    sparse.make(power.files.pmem_vol, power.files.pmem_vol.stat().st_size)
    assert pmem.pull_power(power.files, 1.0) == pmem.Crash(1, 1)
    with power.on() as device:
        assert bytes(device.memory[line(5000)]) == bytes(LINE)


def survivors(power: Power, stored: range, seed: int) -> set[int]:
    """Which of these lines survive a crash at 50 %."""
    with power.on() as device:
        for number in stored:
            fill(device, number, b"z")
    crash = pmem.pull_power(power.files, 0.5, seed)
    with power.on() as device:
        found = {number for number in stored if bytes(device.memory[line(number)]) == b"z" * LINE}
        assert crash == pmem.Crash(len(stored), len(found))
        device.memory[:] = bytes(device.size)
        device.persist(0, device.size)
    pmem.shut_down(power.files)
    return found


def test_a_seed_plays_the_same_crash_again(power: Power) -> None:
    first = survivors(power, range(2000), 7)
    assert 800 < len(first) < 1200
    assert survivors(power, range(2000), 7) == first
    assert survivors(power, range(2000), 8) != first
    assert survivors(power, range(1000, 3000), 7) & {*range(2000)} == first & {*range(1000, 2000)}, "place, not order"


def test_every_line_is_old_or_new_after_any_crash(power: Power) -> None:
    """Random stores and persists: a line is what was persisted last, or (with p above 0) a whole line stored since."""
    chance = random.Random(3)
    durable = [b"\0"] * 512
    for round_ in range(20):
        now = list(durable)
        with power.on() as device:
            for _ in range(300):
                number, letter = chance.randrange(512), bytes([chance.randrange(1, 255)])
                fill(device, number, letter)
                now[number] = letter
                if chance.random() < 0.5:
                    device.persist(number * LINE, LINE)
                    durable[number] = letter
        pmem.pull_power(power.files, chance.choice((0.0, 0.3)), round_)
        with power.on() as device:
            for number in range(512):
                content = bytes(device.memory[line(number)])
                assert content in (durable[number] * LINE, now[number] * LINE)
                durable[number] = content[:1]
        pmem.shut_down(power.files)


def test_an_orderly_end_keeps_all_and_an_unannounced_one_nothing(power: Power) -> None:
    with power.on() as device:
        fill(device, 1, b"a")
    pmem.shut_down(power.files)
    with power.on() as device:
        assert bytes(device.memory[line(1)]) == b"a" * LINE
        fill(device, 1, b"b")
    with power.on() as device:  # nobody said how it ended
        assert bytes(device.memory[line(1)]) == b"a" * LINE
    pmem.pull_power(power.files)
    assert pmem.pull_power(power.files) == pmem.Crash(0, 0), "nothing is stored in a blade that is off"
    pmem.shut_down(power.files)
    with power.on() as device:
        assert bytes(device.memory[line(1)]) == b"a" * LINE


def test_files_stay_sparse_and_another_size_is_a_new_device(power: Power) -> None:
    size = 1 << 40
    pmem.prepare(power.files, size)
    assert power.files.pmem.stat().st_size == power.files.pmem_vol.stat().st_size == size
    for place in (5 << 30, 700 << 30):
        with power.files.pmem_vol.open("r+b") as file:
            file.seek(place)
            file.write(b"far away")
    assert pmem.pull_power(power.files, 1.0) == pmem.Crash(2, 2)
    pmem.prepare(power.files, size)
    assert power.files.pmem_vol.stat().st_blocks * 512 < 1 << 20
    with power.files.pmem_vol.open("rb") as file:
        file.seek(700 << 30)
        assert file.read(8) == b"far away"
    pmem.prepare(power.files, SIZE)
    assert power.files.pmem_vol.read_bytes() == bytes(SIZE)


@pytest.mark.parametrize(
    ("survive", "persisted", "other", "honest"),
    [
        (0.0, True, False, True), (0.0, True, True, False), (0.0, False, False, False),
        (0.5, True, False, True), (0.5, True, True, True), (0.5, False, True, False),
        (1.0, True, True, True), (1.0, True, False, False),
    ],
)  # fmt: skip
def test_what_a_self_test_makes_of_what_it_finds(survive: float, persisted: bool, other: bool, honest: bool) -> None:
    verdict = Verdict("mb1", survive, persisted, other)
    assert verdict.honest == honest
    assert ("NOT HONEST" in str(verdict)) != honest


# The device


def test_persist_rounds_to_lines_and_knows_its_end(power: Power) -> None:
    with power.on() as device:
        fill(device, 0, b"a")
        fill(device, 1, b"b")
        device.persist(LINE - 1, 2)
        assert power.files.pmem.read_bytes()[: 2 * LINE] == b"a" * LINE + b"b" * LINE
        device.persist(device.size, SCRATCH)
        for offset, length in ((-1, 1), (SIZE, 1), (0, -1), (SIZE - 1, 2)):
            with pytest.raises(ValueError, match="of persistent memory"):
                device.persist(offset, length)


def test_one_user_at_a_time(power: Power) -> None:
    with power.on():
        assert guest.in_use(power.file)
        with pytest.raises(PmemError, match="somebody uses"):
            Device(power.file)
        Device(power.file, exclusive=False).close()
    assert not guest.in_use(power.file)
    with power.on():
        pass


def test_a_blade_without_or_in_another_mode(tmp_path: Path) -> None:
    with pytest.raises(PmemError, match="no persistent memory"):
        guest.open_device(tmp_path / "none.json")
    Places("fsdax", SIZE, "/dev/null", 0, "/dev/null", 0).save(tmp_path / "pmem.json")
    with pytest.raises(PmemError, match="in mode fsdax"):
        guest.open_device(tmp_path / "pmem.json")


# Named pieces


def test_pieces_are_found_again_with_what_was_persisted(power: Power) -> None:
    shelf = Shelf(power.on())
    one, two = shelf.open("one", 3 * UNIT), shelf.open("two", 1 << 40)
    one.reserve(0, one.size)
    two.write((1 << 39) - 3, b"across")
    two.persist((1 << 39) - 3, 6)
    one.write(UNIT - 2, b"unit")
    assert (one.read(UNIT - 2, 4), two.read((1 << 39) - 4, 8)) == (b"unit", b"\0across\0")
    assert shelf.used == 5 * UNIT
    shelf.close()
    pmem.pull_power(power.files)
    shelf = Shelf(power.on())
    assert shelf.names() == {"one": 3 * UNIT, "two": 1 << 40}
    assert shelf.open("one", 3 * UNIT).read(0, 3 * UNIT) == bytes(3 * UNIT)
    assert shelf.open("two", 1 << 40).read((1 << 39) - 3, 6) == b"across"
    with pytest.raises(Different, match="one has"):
        shelf.open("one", UNIT)
    shelf.open("one", 3 * UNIT).remove()
    assert (shelf.names(), shelf.used) == ({"two": 1 << 40}, 2 * UNIT)
    shelf.close()
    with power.on() as device:
        assert Shelf(device).used == 2 * UNIT


def test_a_full_shelf_and_a_small_device(power: Power) -> None:
    with power.on() as device:
        shelf = Shelf(device)
        piece = shelf.open("all", shelf.size + UNIT)
        with pytest.raises(Full):
            piece.reserve(0, piece.size)
        assert shelf.used == 0
        piece.reserve(UNIT, shelf.size)
        assert shelf.used == shelf.size
        with pytest.raises(Full):
            piece.write(0, b"x")
        piece.write(piece.size - 3, b"end")
        assert piece.read(piece.size - 4, 4) == b"\0end"
        assert bytes(device.memory[-UNIT:]) == bytes(UNIT) or bytes(device.memory[-UNIT:]).count(b"end") == 1
        for wrong in (-1, piece.size):
            with pytest.raises(ValueError, match="of all"):
                piece.read(wrong, 1)


def test_what_was_left_of_other_pieces_is_not_in_a_new_one(power: Power) -> None:
    with power.on() as device:
        shelf = Shelf(device)
        old = shelf.open("old", 4 * UNIT)
        old.write(0, b"s" * old.size)
        old.remove()
        new = shelf.open("new", 4 * UNIT)
        new.reserve(0, new.size)
        assert new.read(0, new.size) == bytes(new.size)


@pytest.mark.parametrize("survive", [0.0, 0.5, 1.0])
def test_a_power_failure_in_any_change_leaves_a_whole_shelf(power: Power, survive: float) -> None:
    """The power fails after each of the stores and persists of a day with a shelf: it opens, and pieces are whole."""

    class FailureError(Exception):
        pass

    def day(device: Device) -> None:
        shelf = Shelf(device)
        for name in ("a", "b", "c"):
            piece = shelf.open(name, 3 * UNIT)
            piece.reserve(0, piece.size)
            piece.write(UNIT - 1, name.encode() * 2)
            piece.persist(UNIT - 1, 2)
            if name == "b":
                shelf.open("a", 3 * UNIT).remove()

    step, ended = 0, False
    while not ended:
        power.files.pmem.unlink()
        device, left = power.on(), step
        persist = device.persist

        def failing(offset: int, length: int) -> None:
            nonlocal left
            if not left:
                raise FailureError
            left -= 1
            persist(offset, length)  # noqa: B023 (called within this turn)

        device.persist = failing  # type: ignore[method-assign]
        try:
            day(device)
            ended = True
        except FailureError:
            pass
        device.close()
        pmem.pull_power(power.files, survive, step)
        with power.on() as again:
            shelf = Shelf(again)
            owned = [unit for slot in shelf._names for unit in shelf.units(slot).values()]
            assert len(owned) == len({*owned}) == shelf.used // UNIT
            for name, size in shelf.names().items():
                found = shelf.open(name, size).read(UNIT - 1, 2)
                assert set(found) <= {0, ord(name)}
        step += 1
    assert step > 15


def test_damage_is_found_and_others_data_are_left_alone(power: Power) -> None:
    with power.on() as device:
        shelf = Shelf(device)
        shelf.open("one", UNIT).write(0, b"x")
        names = bytes(device.memory).index(b"one\0")
        units = next(at for at in range(4096 + 256 * 64, SIZE) if device.memory[at])
        for place, message in ((7, "head"), (names, "entry 0"), (units, "unit 0")):
            device.memory[place] ^= 1
            with pytest.raises(Damaged, match=message):
                Shelf(device)
            device.memory[place] ^= 1
        Shelf(device)
        for place in (0, 5000):
            device.memory[: 1 << 16] = bytes(1 << 16)
            device.memory[place] = 1
            with pytest.raises(Foreign):
                Shelf(device)
            assert device.memory[place] == 1
