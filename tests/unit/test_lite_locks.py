"""LITE's locks and barriers: order, holders and homes that die, timeouts. In-process blades, real control servers."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest_agents.control import Message
from guest_agents.lite import errors
from guest_agents.membership import Follower, Life
from tests.unit.lite_blades import Program, Rack, eventually


@pytest.fixture
def rack(tmp_path: Path) -> Iterator[Rack]:
    made = Rack(tmp_path, ["gm0", "mb0", "mb1", "mb2"])
    yield made
    made.close()


def word(rack: Rack, name: str, home: str) -> int:
    lock = rack[home].tier.locks._locks[name]
    return rack[home].core.fetch_add(rack[home].core.node, lock.word.address, 7, 0)


class Wanting(threading.Thread):
    """A program that waits for a lock."""

    def __init__(self, program: Program, name: str, timeout_ms: int = 0) -> None:
        super().__init__(daemon=True)
        self.program, self.lock_name, self.timeout_ms = program, name, timeout_ms
        self.outcome: object = None
        self.start()

    def run(self) -> None:
        try:
            self.program.call("lock_create", name=self.lock_name)
            self.program.call("lock", name=self.lock_name, timeout_ms=self.timeout_ms)
            self.outcome = "has it"
        except (errors.LiteError, OSError, ValueError) as failure:
            self.outcome = type(failure)


def waiting(rack: Rack, name: str, home: str) -> int:
    return len(rack[home].tier.locks._locks[name].queue)


def test_an_uncontended_lock_never_asks_its_home(rack: Rack, monkeypatch: pytest.MonkeyPatch) -> None:
    one = rack["mb1"].client()
    one.call("lock_create", name="door", home="mb0")
    one.call("lock", name="door")  # connects to mb0
    one.call("unlock", name="door")
    links = rack["mb1"].tier.links
    calls, asked = links.call, list[str]()

    def call(life: Life, op: str, timeout: float | None = None, /, **fields: object) -> Message:
        asked.append(op)
        return calls(life, op, timeout, **fields)

    monkeypatch.setattr(links, "call", call)
    for _ in range(3):
        one.call("lock", name="door")
        assert word(rack, "door", "mb0") == 1
        one.call("unlock", name="door")
    assert word(rack, "door", "mb0") == 0
    assert asked == []


def test_waiters_are_served_in_order(rack: Rack) -> None:
    holder = rack["mb0"].client()
    holder.call("lock_create", name="door")
    holder.call("lock", name="door")
    wanting = []
    for turn, name in enumerate(["mb1", "mb2", "mb0", "gm0", "mb1"]):
        wanting.append(Wanting(rack[name].client(), "door"))
        eventually(lambda turn=turn: waiting(rack, "door", "mb0") == turn + 1)  # type: ignore[misc]
    holder.call("unlock", name="door")
    for turn, current in enumerate(wanting):
        current.join(10)
        assert current.outcome == "has it"
        assert [w.outcome for w in wanting[turn + 1 :]] == [None] * (4 - turn)
        current.program.call("unlock", name="door")
    eventually(lambda: word(rack, "door", "mb0") == 0)
    with pytest.raises(errors.NotHeld):
        holder.call("unlock", name="door")


def test_threads_of_one_program_exclude_each_other(rack: Rack) -> None:
    one = rack["mb1"].client()
    again = Program(rack["mb1"], one.token)
    one.call("lock_create", name="door")
    one.call("lock", name="door")
    with pytest.raises(errors.TimedOut):
        again.call("lock", name="door", timeout_ms=100)
    again.call("unlock", name="door")
    again.call("lock", name="door", timeout_ms=5000)


def test_time_runs_out(rack: Rack) -> None:
    holder, late = rack["mb0"].client(), rack["mb1"].client()
    holder.call("lock_create", name="door")
    holder.call("lock", name="door")
    late.call("lock_create", name="door")
    begun = time.monotonic()
    with pytest.raises(errors.TimedOut):
        late.call("lock", name="door", timeout_ms=200)
    assert 0.15 < time.monotonic() - begun < 2
    eventually(lambda: word(rack, "door", "mb0") == 1)
    holder.call("unlock", name="door")
    assert word(rack, "door", "mb0") == 0


def test_a_killed_holder_passes_the_lock_on(rack: Rack) -> None:
    holder, gone = rack["mb1"].client(), rack["mb2"].client()
    holder.call("lock_create", name="door", home="mb0")
    holder.call("lock", name="door")
    first = Wanting(gone, "door")
    eventually(lambda: waiting(rack, "door", "mb0") == 1)
    second = Wanting(rack["mb0"].client(), "door")
    eventually(lambda: waiting(rack, "door", "mb0") == 2)
    gone.socket.shutdown(socket.SHUT_RDWR)  # killed while it waits
    eventually(lambda: waiting(rack, "door", "mb0") == 1)
    holder.kill()
    second.join(10)
    assert second.outcome == "has it"
    first.join(10)
    assert first.outcome != "has it"
    second.program.call("unlock", name="door")
    eventually(lambda: word(rack, "door", "mb0") == 0)


def test_the_lock_of_a_dead_node_passes_on(rack: Rack) -> None:
    """Its holder took the fast path: nobody but that node knew."""
    holder = rack["mb2"].client()
    holder.call("lock_create", name="door", home="mb0")
    holder.call("lock", name="door")
    wanting = [Wanting(rack[name].client(), "door") for name in ("mb0", "mb1")]
    eventually(lambda: waiting(rack, "door", "mb0") == 2)
    rack["mb2"].kill()
    eventually(lambda: any(w.outcome for w in wanting))
    first = next(w for w in wanting if w.outcome)
    second = next(w for w in wanting if w is not first)
    assert (first.outcome, second.outcome) == ("has it", None)
    first.program.call("unlock", name="door")
    second.join(10)
    assert second.outcome == "has it"
    second.program.call("unlock", name="door")


def test_who_lost_its_lock_with_its_life_reaches_no_memory_any_more(tmp_path: Path) -> None:
    """A holder that was only paused goes on where it was, before it hears that it was declared dead. The memory is on
    a third blade, which has not heard either; the lock's home must see to it before the next owner gets the lock."""
    rack = Rack(tmp_path, ["gm0", "mb0", "mb1", "mb2", "mb3"])
    holder, waiter = rack["mb3"].client(), rack["mb1"].client()
    shared = holder.call("malloc", size=4096, nodes=["mb2"], name="shared", permissions=31)["handle"]
    mapped = waiter.call("map", name="shared")["handle"]
    holder.call("lock_create", name="door", home="mb0")
    holder.call("lock", name="door", timeout_ms=5000)
    waiter.call("lock_create", name="door")
    holder.write(shared, 0, b"holder")
    rack["mb2"].membership.follower = Follower()
    rack["mb3"].membership._left = True  # so that it does not join anew
    rack["mb3"].declare_dead()
    waiter.call("lock", name="door", timeout_ms=30_000)
    assert waiter.read(mapped, 0, 6) == b"holder"
    waiter.write(mapped, 0, b"waiter")
    with pytest.raises(errors.NodeUnreachable):
        holder.write(shared, 0, b"late")
    assert waiter.read(mapped, 0, 6) == b"waiter"
    rack.close()


def test_a_lock_of_a_dead_node_that_nobody_waits_for_is_free(rack: Rack) -> None:
    holder = rack["mb2"].client()
    holder.call("lock_create", name="door", home="mb0")
    holder.call("lock", name="door")
    other = rack["mb1"].client()
    other.call("lock_create", name="door")
    rack["mb2"].kill()
    eventually(lambda: word(rack, "door", "mb0") == 0)
    other.call("lock", name="door", timeout_ms=5000)
    other.call("unlock", name="door")


@pytest.mark.long
def test_a_living_holder_keeps_its_lock_when_others_die(rack: Rack) -> None:
    holder = rack["mb1"].client()
    holder.call("lock_create", name="door", home="mb0")
    holder.call("lock", name="door")
    gone = Wanting(rack["mb2"].client(), "door")
    eventually(lambda: waiting(rack, "door", "mb0") == 1)
    wanting = Wanting(rack["mb0"].client(), "door")
    eventually(lambda: waiting(rack, "door", "mb0") == 2)
    rack["mb2"].kill()
    eventually(lambda: waiting(rack, "door", "mb0") == 1)
    time.sleep(0.5)
    assert wanting.outcome is None
    holder.call("unlock", name="door")
    wanting.join(10)
    assert wanting.outcome == "has it"
    assert gone.outcome != "has it"


def test_when_the_home_dies_waiters_are_told(rack: Rack) -> None:
    holder = rack["mb1"].client()
    holder.call("lock_create", name="door", home="mb2")
    holder.call("lock", name="door")
    wanting = Wanting(rack["mb0"].client(), "door")
    eventually(lambda: waiting(rack, "door", "mb2") == 1)
    rack["mb2"].kill()
    wanting.join(10)
    assert wanting.outcome is errors.NodeDead
    with pytest.raises(errors.NodeDead):
        holder.call("unlock", name="door")
    holder.call("lock_create", name="door")
    holder.call("lock", name="door")
    wanting.program.call("lock_create", name="door")
    with pytest.raises(errors.TimedOut):
        wanting.program.call("lock", name="door", timeout_ms=100)


def test_mutual_exclusion_under_load_and_kills(rack: Rack) -> None:
    """Programs increment an unprotected counter under the lock; some die while they hold it or wait for it."""
    chance = random.Random(7)
    rack["mb0"].client().call("lock_create", name="door")
    keeper = rack["mb0"].client()
    keeper.call("lock_create", name="door")
    inside: list[int] = []
    passes, problems = [0], []

    def work(number: int, blade: str, rounds: int, dies: bool) -> None:
        program = rack[blade].client()
        program.call("lock_create", name="door")
        for turn in range(rounds):
            program.call("lock", name="door", timeout_ms=20000)
            inside.append(number)
            if inside != [number]:
                problems.append(list(inside))
            passes[0] += 1
            time.sleep(0.001)
            inside.remove(number)
            if dies and turn == rounds - 1:
                break
            program.call("unlock", name="door")
        program.kill()

    names = list(rack.blades)
    threads = [threading.Thread(target=work, args=(n, chance.choice(names), 15, n % 3 == 0)) for n in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert problems == []
    assert passes == [9 * 15]
    eventually(lambda: word(rack, "door", "mb0") == 0)
    keeper.kill()
    eventually(lambda: rack["mb0"].tier.blocks.stat()["blocks"] == 0)


class Arriving(threading.Thread):
    """A program at a barrier."""

    def __init__(self, program: Program, count: int, timeout_ms: int = 0, name: str = "gate") -> None:
        super().__init__(daemon=True)
        self.program, self.count, self.timeout_ms, self.gate = program, count, timeout_ms, name
        self.outcome: object = None
        self.start()

    def run(self) -> None:
        try:
            self.program.call("barrier", name=self.gate, count=self.count, timeout_ms=self.timeout_ms)
            self.outcome = "through"
        except (errors.LiteError, OSError, ValueError) as failure:
            self.outcome = type(failure)


def arrived(rack: Rack, name: str = "gate") -> int:
    directory = rack["gm0"].directory
    assert directory is not None
    barrier = directory.barriers._barriers.get(name)
    return len(barrier.waiting) if barrier else 0


def test_a_barrier_again_and_again(rack: Rack) -> None:
    programs = [blade.client() for blade in rack.blades.values()]
    for _ in range(5):
        first = [Arriving(program, 4) for program in programs[:3]]
        eventually(lambda: arrived(rack) == 3)
        assert [a.outcome for a in first] == [None] * 3
        programs[3].call("barrier", name="gate", count=4)
        for thread in first:
            thread.join(10)
            assert thread.outcome == "through"
    for program in programs:
        program.kill()
    directory = rack["gm0"].directory
    assert directory is not None
    eventually(lambda: not directory.barriers._barriers)


def test_a_participant_that_dies_breaks_the_barrier(rack: Rack) -> None:
    programs = [rack[name].client() for name in ("mb0", "mb1", "mb2")]
    for thread in [Arriving(program, 3) for program in programs]:
        thread.join(10)
        assert thread.outcome == "through"
    here = Arriving(programs[0], 3)
    eventually(lambda: arrived(rack) == 1)
    programs[2].kill()
    here.join(10)
    assert here.outcome is errors.BarrierBroken
    with pytest.raises(errors.BarrierBroken):
        programs[1].call("barrier", name="gate", count=3)
    for thread in [Arriving(program, 2) for program in programs[:2]]:
        thread.join(10)
        assert thread.outcome == "through"


def test_a_node_that_dies_breaks_the_barrier(rack: Rack) -> None:
    here = Arriving(rack["mb0"].client(), 3)
    there = Arriving(rack["mb2"].client(), 3)
    eventually(lambda: arrived(rack) == 2)
    rack["mb2"].kill()
    here.join(10)
    assert here.outcome is errors.BarrierBroken
    assert there.outcome != "through"


def test_one_who_gives_up_breaks_the_barrier(rack: Rack) -> None:
    one, two = rack["mb0"].client(), rack["mb1"].client()
    patient = Arriving(one, 3)
    eventually(lambda: arrived(rack) == 1)
    hasty = Arriving(two, 3, timeout_ms=300)
    for thread in (patient, hasty):
        thread.join(10)
    assert (patient.outcome, hasty.outcome) == (errors.BarrierBroken, errors.TimedOut)
    directory = rack["gm0"].directory
    assert directory is not None
    assert not directory.barriers._barriers


def test_a_barrier_has_one_count_and_a_limit_of_time(rack: Rack) -> None:
    one, two = rack["mb0"].client(), rack["mb1"].client()
    here = Arriving(one, 2, timeout_ms=300)
    eventually(lambda: arrived(rack) == 1)
    with pytest.raises(errors.BadArgument):
        two.call("barrier", name="gate", count=5)
    here.join(10)
    assert here.outcome is errors.TimedOut
    assert arrived(rack) == 0
    with pytest.raises(errors.BadArgument):
        two.call("barrier", name="gate", count=0)
