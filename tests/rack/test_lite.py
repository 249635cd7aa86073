"""LITE on real blades: sharing, and what happens when programs, agents and blades die or are paused."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.hypervisor import daemon, domain
from orchestrator.settings import RackPaths, Settings
from tests.rack.conftest import Bench, Rack
from tests.rack.program import Program, end_all

pytestmark = pytest.mark.rack

PROGRAMS = Path(__file__).parent / "programs"
SEED = int(os.environ.get("RACKLESS_SEED", "2026"))
SOAK_SECONDS = float(os.environ.get("RACKLESS_SOAK_SECONDS", "40"))
DEAD_AFTER = 6.0
BLADES = {
    "gm0": {"kind": "manager", "memory": "256 MiB"},
    "pb0": {"kind": "processor", "memory": "320 MiB"},
    "mb0": {"kind": "memory", "memory": "320 MiB"},
    "mb1": {"kind": "memory", "memory": "320 MiB"},
}
QUEUE_PAIRS = 4


@pytest.fixture(scope="module")
def lite(bench: Bench) -> Iterator[Rack]:
    """A rack that notices death soon."""
    timing = {"heartbeat": "0.5 s", "dead_after": f"{DEAD_AFTER:g} s"}
    with bench.up("l", "pair", blades=BLADES, membership=timing) as rack:
        for blade in BLADES:
            copy_programs(rack, blade)
        yield rack


@pytest.fixture(autouse=True)
def programs() -> Iterator[None]:
    """None outlives its test."""
    yield
    end_all()


def stat(rack: Rack, *blades: str) -> dict[str, Any]:
    words = ("lite", "stat", "--rack", rack.name, "--json", "--seconds", "0.1")
    return dict(json.loads(rack.bench.rackless(*words, *blades).stdout))


def books(rack: Rack, *blades: str) -> dict[str, dict[str, int]]:
    """What each blade holds for programs."""
    return {
        name: {
            **{key: found[key] for key in ("lmrs", "handles", "locks", "locks_held")},
            "clients": len(found["clients"]),
            **{key: found["memory"][key] for key in ("blocks", "bytes_allocated", "bytes_registered")},
            **{f"core_{key}": found["core"][key]
               for key in ("clients", "channels", "lmrs", "handles", "buffers", "ports", "ops", "bytes_slabs")},
        }
        for name, found in stat(rack, *blades).items()
    }  # fmt: skip


def assert_books_are_empty(rack: Rack, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while True:
        found = books(rack)
        full = {name: {key: n for key, n in held.items() if n} for name, held in found.items() if any(held.values())}
        if not full:
            return
        assert time.monotonic() < deadline, f"still held: {full}"
        time.sleep(0.5)


def power(rack: Rack, blade: str, action: str) -> None:
    """Destroy, suspend or resume a blade, as libvirt does it."""
    bench = rack.bench
    settings = Settings.from_environment({**os.environ, **bench.env()})
    with daemon.connection(RackPaths(settings, rack.name)) as conn:
        assert conn is not None
        getattr(domain.owned(conn, rack.name)[blade].domain, action)()


def test_two_programs_on_two_blades_share_an_lmr(lite: Rack) -> None:
    owner = Program(lite, "pb0", """
        m = node.malloc(3 << 20, on="mb0", name="box")
        m.write(b"hello", at=2 << 20)
        say("ready")
        input()
        say(m.read(5, at=100).decode())
        m.free()
        node.close()
    """)  # fmt: skip
    assert owner.hear() == "ready"
    other = Program(lite, "mb1", """
        m = node.map("box")
        say(m.read(5, at=2 << 20).decode())
        m.write(b"world", at=100)
        say("done")
        input()
        try:
            m.read(1)
        except lite.Freed as error:
            say(error.name)
    """)  # fmt: skip
    assert [other.hear(), other.hear()] == ["hello", "done"]
    found = stat(lite)
    assert (found["pb0"]["lmrs"], found["pb0"]["handles"], found["mb1"]["handles"]) == (1, 1, 1)
    assert found["mb0"]["memory"]["bytes_allocated"] == 3 << 20
    owner.tell()
    assert owner.end() == "world"
    other.tell()
    assert other.end() == "FREED"
    assert_books_are_empty(lite)


def test_queue_pairs_do_not_grow_with_programs(lite: Rack) -> None:
    work = """
        m = node.malloc(4096, on="mb0")
        m.write(b"x" * 4096)
        say("ready")
        input()
    """
    programs = [Program(lite, "pb0", work)]
    programs[0].hear()
    before = stat(lite)
    programs += [Program(lite, "pb0", work) for _ in range(5)]
    for program in programs[1:]:
        program.hear()
    after = stat(lite)
    for blade in BLADES:
        assert after[blade]["core"]["queue_pairs"] == before[blade]["core"]["queue_pairs"]
    assert before["pb0"]["core"]["queue_pairs"] == QUEUE_PAIRS * len(BLADES)
    for program in programs:
        program.tell()
        program.end()
    assert_books_are_empty(lite)


def test_a_killed_program_leaves_nothing(lite: Rack) -> None:
    victim = Program(lite, "pb0", """
        m = node.malloc(8 << 20, spread=True, name="big")
        b = node.buffer(65536)
        p = node.register(7)
        door = node.lock("door", home="mb1")
        door.acquire()
        say("ready")
        input()
    """)  # fmt: skip
    assert victim.hear() == "ready"
    waiting = Program(lite, "mb0", """
        door = node.lock("door")
        say("waits")
        door.acquire()
        say("has it")
        input()
        door.release()
    """)  # fmt: skip
    assert waiting.hear() == "waits"
    lite.on("pb0", f"kill -9 {victim.pid}")
    assert waiting.hear(30) == "has it"
    waiting.tell()
    waiting.end()
    assert_books_are_empty(lite)


def test_moving_while_two_blades_write(lite: Rack) -> None:
    master = Program(lite, "gm0", """
        m = node.malloc(5 << 20, on="mb0", name="box", permissions=lite.Permission.ALL)
        say("made")
        input()
        for n in range(6):
            m.move(["mb1", "pb0", "mb0"][n % 3])
        say("moved")
        input()
    """)  # fmt: skip
    assert master.hear() == "made"
    worker = """
        import time
        m = node.map("box")
        say("ready")
        n = 0
        end = time.monotonic() + 8
        while time.monotonic() < end:
            n += 1
            at = BASE + 8 * (n % 1000)
            m.write(n.to_bytes(8, "little"), at=at)
            assert int.from_bytes(m.read(8, at=at), "little") == n
        say(n)
    """
    workers = [Program(lite, blade, worker.replace("BASE", str(base)))
               for blade, base in (("pb0", 0), ("mb1", (4 << 20) + 8000))]  # fmt: skip
    assert [worker.hear() for worker in workers] == ["ready", "ready"]
    master.tell()
    assert master.hear() == "moved"
    assert all(int(worker.end()) > 10 for worker in workers)
    master.tell()
    master.end()
    assert_books_are_empty(lite)


def test_copies_and_fills_where_the_data_are(lite: Rack) -> None:
    program = Program(lite, "pb0", """
        import random
        a = node.malloc(300_000, on=["mb0", "mb1"], spread=True)
        b = node.malloc(300_000, on=["mb1", "pb0"], spread=True)
        data = random.Random(1).randbytes(300_000)
        a.write(data)
        model = bytearray(300_000)
        a.copy_to(b, at=1000, to=7, length=250_000)
        model[7:250_007] = data[1000:251_000]
        b.memset(0xA5, at=100_000, length=123_456)
        model[100_000:223_456] = b"\\xa5" * 123_456
        b.move_to(b, at=5, to=50_000, length=200_000)
        model[50_000:250_000] = bytes(model[5:200_005])
        say(b.read() == bytes(model))
    """)  # fmt: skip
    assert program.hear() == "True"
    program.end()
    assert_books_are_empty(lite)


def test_a_restarted_agent_begins_anew(lite: Rack) -> None:
    owner = Program(lite, "pb0", """
        m = node.malloc(65536, on=["mb0", "mb1"], spread=True, name="half")
        say("ready")
        input()
        try:
            m.read(1, at=40000)
        except lite.LiteError as error:
            say(error.name)
        say(len(m.read(1)))
        input()
    """)  # fmt: skip
    assert owner.hear() == "ready"
    before = stat(lite, "mb1")["mb1"]
    _kill_agent(lite, "mb1")
    again = stat(lite, "mb1")["mb1"]
    assert again["node_id"] == before["node_id"]
    assert again["incarnation"] > before["incarnation"]
    owner.tell()
    assert [owner.hear(), owner.hear()] == ["NODE_DEAD", "1"]
    assert Program(lite, "mb1", "m = node.map('half'); say(len(m.read(10)))").end() == "10"
    owner.tell()
    owner.end()
    assert_books_are_empty(lite)


def test_a_restarted_manager_finds_its_books_again(lite: Rack) -> None:
    owner = Program(lite, "pb0", """
        m = node.malloc(65536, on="mb0", name="box")
        door = node.lock("door", home="mb1")
        door.acquire()
        say("ready")
        input()
        say(m.read(3).decode())
        door.release()
        input()
    """)  # fmt: skip
    assert owner.hear() == "ready"
    lives = {name: found["incarnation"] for name, found in stat(lite).items()}
    _kill_agent(lite, "gm0")
    after = {name: found["incarnation"] for name, found in stat(lite).items()}
    assert {name for name in lives if after[name] != lives[name]} == {"gm0"}
    other = Program(lite, "mb1", """
        m = node.map("box")
        m.write(b"abc")
        try:
            node.malloc(1, name="box")
        except lite.NameTaken:
            say("taken")
        door = node.lock("door")
        try:
            door.acquire(timeout=1)
        except lite.TimedOut:
            say("held")
        door.acquire()
        say("mine")
        door.release()
    """)  # fmt: skip
    assert [other.hear(), other.hear()] == ["taken", "held"]
    owner.tell()
    assert owner.hear() == "abc"
    assert other.hear() == "mine"
    other.end()
    owner.tell()
    owner.end()
    assert_books_are_empty(lite)


def test_a_paused_blade_comes_back_as_another_life(lite: Rack) -> None:
    owner = Program(lite, "pb0", """
        m = node.malloc(65536, on="mb0", name="box")
        say("ready")
        input()
        say(len(m.read(9)))
        input()
    """)  # fmt: skip
    assert owner.hear() == "ready"
    paused = Program(lite, "mb1", """
        import time
        m = node.map("box")
        mine = node.malloc(4096, name="mine")
        door = node.lock("door", home="mb0")
        door.acquire()
        say("ready")
        while True:
            try:
                m.read(1)
                mine.read(1)
                time.sleep(0.05)
            except lite.NodeDead as error:
                say(error.name)
                break
            except lite.NodeUnreachable:
                time.sleep(0.1)

        def back(call):  # it takes a moment to join again
            while True:
                try:
                    return call()
                except lite.NotJoined:
                    time.sleep(0.1)

        try:
            back(door.release)
        except lite.NotHeld as error:
            say(error.name)
        again = back(lambda: node.map("box"))
        say(len(again.read(5)))
    """)  # fmt: skip
    assert paused.hear() == "ready"
    before = stat(lite, "mb1")["mb1"]["incarnation"]
    power(lite, "mb1", "suspend")
    try:
        waiting = Program(lite, "mb0", "door = node.lock('door'); door.acquire(); say('has it'); door.release()")
        begun = time.monotonic()
        assert waiting.hear(60) == "has it"
        assert time.monotonic() - begun < DEAD_AFTER + 15
        waiting.end()
    finally:
        power(lite, "mb1", "resume")
    assert [paused.hear(), paused.hear(), paused.hear()] == ["NODE_DEAD", "NOT_HELD", "5"]
    paused.end()
    assert stat(lite, "mb1")["mb1"]["incarnation"] > before
    owner.tell()
    assert owner.hear() == "9"
    owner.tell()
    owner.end()
    assert_books_are_empty(lite)


def test_a_blade_that_loses_its_power(lite: Rack) -> None:
    """Every call to it ends with a named error, within the time that the rack file says."""
    owner = Program(lite, "pb0", """
        import time
        m = node.malloc(65536, on=["mb0", "mb1"], spread=True, name="half")
        say("ready")
        input()
        begun = time.monotonic()
        while True:
            try:
                m.read(8, at=40000)
            except lite.NodeUnreachable:
                time.sleep(0.1)
            except lite.NodeDead:
                break
        say(time.monotonic() - begun)
        say(len(m.read(8)))
        m.free()
        try:
            node.malloc(1, on="mb1")
        except lite.NodeDead as error:
            say(error.name)
    """)  # fmt: skip
    assert owner.hear() == "ready"
    power(lite, "mb1", "destroy")
    owner.tell()
    seconds = float(owner.hear())
    print(f"a destroyed blade was noticed after {seconds:.1f} s; dead_after is {DEAD_AFTER:g} s")
    assert seconds < DEAD_AFTER + 5
    assert [owner.hear(), owner.hear()] == ["8", "NODE_DEAD"]
    owner.end()
    power_on(lite, "mb1")
    again = Program(lite, "pb0", "m = node.malloc(65536, on='mb1'); m.write(b'x'); say(m.read(1).decode())")
    assert again.end() == "x"
    assert_books_are_empty(lite)


@pytest.mark.timeout(2400)
def test_soak(lite: Rack) -> None:
    """Random operations by several processes; some are killed, and a blade loses its power. Then the books balance."""
    chance = random.Random(SEED)
    keeper = Program(lite, "gm0", "m = node.malloc(8, name='soak-counter'); say('ready'); input()")
    assert keeper.hear() == "ready"
    nodes = ",".join(BLADES)
    running: dict[int, str] = {}
    numbers = iter(range(1000))
    begun = time.monotonic()
    killed = 0

    def start(blade: str) -> None:
        number = next(numbers)
        left = max(5.0, SOAK_SECONDS - (time.monotonic() - begun))
        command = f"python3 /root/lite_soak.py {SEED + number} {left:.0f} {nodes} > /root/soak.{number} 2>&1"
        lite.on(blade, f"setsid sh -c '{command}; echo exit $? >> /root/soak.{number}' > /dev/null 2>&1 & echo started")
        running[number] = blade

    for blade in ("pb0", "pb0", "mb0", "mb1", "gm0"):
        start(blade)
    cut = SOAK_SECONDS * 0.4
    while time.monotonic() - begun < SOAK_SECONDS - 5:
        time.sleep(chance.uniform(2, 6))
        if cut and time.monotonic() - begun > cut:
            power(lite, "mb1", "destroy")
            running = {number: blade for number, blade in running.items() if blade != "mb1"}
            time.sleep(DEAD_AFTER)
            power_on(lite, "mb1")
            start("mb1")
            cut = cut + 150 if cut + 150 < SOAK_SECONDS else 0
        number = chance.choice(sorted(running))
        blade = running[number]
        pid = lite.on(blade, f"pgrep -f '^python3 /root/lite_soak.py {SEED + number} ' || true").strip()
        if pid:
            lite.on(blade, f"kill -9 {pid} || true")
            killed += 1
            del running[number]
            start(blade)
    outcomes = {number: _outcome(lite, blade, number) for number, blade in running.items()}
    print(f"seed {SEED}, {SOAK_SECONDS:g} s, {killed} processes killed; {json.dumps(outcomes)}")
    for outcome in outcomes.values():
        assert outcome["wrong"] is None, outcome
    assert sum(sum(outcome["done"].values()) for outcome in outcomes.values()) > SOAK_SECONDS
    keeper.tell()
    keeper.end()
    assert_books_are_empty(lite)
    for found in stat(lite).values():
        assert found["core"]["queue_pairs"] == QUEUE_PAIRS * len(BLADES)


def _kill_agent(rack: Rack, blade: str) -> None:
    """Kill a blade's agent and wait until the next one has joined."""
    before = stat(rack, blade)[blade]["incarnation"]
    rack.kill_agent(blade)
    deadline = time.monotonic() + 90
    while True:
        found = stat(rack).values()
        if all(one.get("joined") for one in found) and stat(rack, blade)[blade].get("incarnation", 0) > before:
            return
        assert time.monotonic() < deadline, f"the agents are not back: {found}"
        time.sleep(0.5)


def power_on(rack: Rack, blade: str) -> None:
    rack.bench.rackless("up", str(rack.file))
    copy_programs(rack, blade)


def copy_programs(rack: Rack, blade: str) -> None:
    for program in PROGRAMS.glob("*.py"):
        rack("cp", str(program), f"{blade}:/root/{program.name}")


def _outcome(rack: Rack, blade: str, number: int) -> dict[str, Any]:
    """What a soaking process said at its end."""
    deadline = time.monotonic() + 120
    while "exit " not in (text := rack.on(blade, f"cat /root/soak.{number}")):
        assert time.monotonic() < deadline, f"soak {number} on {blade} does not end: {text}"
        time.sleep(1)
    lines = text.strip().splitlines()
    assert len(lines) == 2, text
    return dict(json.loads(lines[0]))
