"""The process monitor's desk, its lender and the memory monitors' books, over real sockets: who holds what."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from guest_agents.lite.links import Links
from guest_agents.splitkernel.managers.holder import Holder
from tests.unit.stand_in_memory import GID, SECRET, Blades, memory_blades

from guest_agents.splitkernel.process.belonging import Belonging  # isort: skip  (needs the stand-in for pyverbs)
from guest_agents.splitkernel.process.desk import Desk, Stock  # isort: skip

REGION = 4 << 20
SECONDS = 20.0
RUNS = 200
GIDHEX = socket.inet_pton(socket.AF_INET6, GID).hex()

# A pager's side of the conversation: attaches, connects, takes regions two by two until it is killed.
PROGRAM = f"""
import os, socket, sys
ask = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
ask.connect(sys.argv[1])
def call(text):
    ask.send(text.encode())
    return ask.recv(4096).decode()
blades = call(f"attach {{os.getpid()}} /none").split()[1:]
for blade in blades:
    call(f"connect {{blade}} 1 2 {GIDHEX}")
print(flush=True)
while call("region {REGION} 2").startswith("ok"):
    pass
ask.recv(1)
"""


class Pager:
    """A program's pager at the desk."""

    def __init__(self, path: Path, copies: int = 1) -> None:
        self.copies = copies
        self.socket, self.news = (socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2))
        for each in (self.socket, self.news):
            each.settimeout(SECONDS)
            each.connect(str(path))
        self.news.send(b"watch")
        assert self.news.recv(100) == b"ok"
        self.blades = self.ask("attach 4 /none").split()[1:]
        for blade in self.blades:
            self.connect(blade)

    def ask(self, text: str) -> str:
        self.socket.send(text.encode())
        return self.socket.recv(4096).decode()

    def connect(self, blade: str) -> None:
        assert self.ask(f"connect {blade} 1 2 {GIDHEX}").endswith(GIDHEX)

    def region(self, *without: str, copies: int | None = None) -> list[str]:
        """The blades that gave the copies of a region; empty if there is no room."""
        numbers = [str(self.blades.index(blade)) for blade in without]
        status, *words = self.ask(" ".join(["region", str(REGION), str(copies or self.copies), *numbers])).split()
        if status == "error":
            assert words[0] == "12", words  # ENOMEM
            return []
        return [self.blades[int(number)] for number in words[::3]]

    def hear(self) -> str:
        return self.news.recv(100).decode()

    def close(self) -> None:
        self.socket.close()
        self.news.close()


@pytest.fixture
def blades() -> Iterator[Blades]:
    with memory_blades("mb0", "mb1", "mb2", size=64 << 20) as made:
        yield made


@pytest.fixture
def desk(blades: Blades, tmp_path: Path) -> Path:
    path = tmp_path / "split.sock"
    # Without a manager: regions go to the blades in turn.
    holder = Holder(Links(SECRET, lambda: None, lambda life: None), lambda: None, lambda: None, lambda dead: None,
                    tmp_path / "vnodes.json")  # fmt: skip
    belonging = Belonging("pb0", holder, lambda vnode: None, dict)
    Desk(path, Stock(tmp_path / "jobs", lambda: 1 << 20, blades.lender, belonging, dict)).start()
    return path


def eventually(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_copies_are_on_different_blades_and_each_blade_has_its_turn(blades: Blades, desk: Path) -> None:
    with closing(Pager(desk, copies=2)) as pager:
        pairs = [pager.region() for _ in range(6)]
        assert all(len(set(pair)) == 2 for pair in pairs)
        assert sorted(first for first, _ in pairs) == ["mb0", "mb0", "mb1", "mb1", "mb2", "mb2"]
        assert {name: held["regions"] for name, held in blades.books().items()} == dict.fromkeys(pager.blades, 4)
        assert pager.region("mb0", "mb2", copies=1) == ["mb1"]
    eventually(lambda: not blades.books())


def test_there_are_two_copies_or_none(blades: Blades, desk: Path) -> None:
    with closing(Pager(desk)) as other, closing(Pager(desk, copies=2)) as pager:
        while other.region("mb2"):
            pass  # only mb2 has room now
        before = blades.books()
        assert pager.region() == []
        assert blades.books() == before  # what mb2 gave it has back
        assert pager.region(copies=1) == ["mb2"]
    eventually(lambda: not blades.books())


def test_all_of_the_memory_can_be_lent_and_no_more(blades: Blades, desk: Path) -> None:
    with closing(Pager(desk, copies=2)) as pager:
        count = 0
        while pager.region():
            count += 1
        assert count == 3 * (64 << 20) // REGION // 2
    eventually(lambda: not blades.books())


def test_a_region_that_is_returned_is_another_programs_next(blades: Blades, desk: Path) -> None:
    with closing(Pager(desk, copies=2)) as pager:
        words = pager.ask(f"region {REGION} 2").split()[1:]
        kept = pager.ask(f"region {REGION} 2").split()[1:]
        pager.socket.send(f"return {words[0]} {words[1]} {words[3]} {words[4]}".encode())  # nothing is answered
        pager.socket.send(b"return 0 12345 9 x")
        pager.ask("release nobody")  # but in order
        assert sum(held["regions"] for held in blades.books().values()) == 2
        assert sum(monitor.tally.counts().get("P2M_MUNMAP", 0) for monitor in blades.monitors.values()) == 2
        with closing(Pager(desk, copies=2)) as other:
            taken = set()
            while (answer := other.ask(f"region {REGION} 1").split())[0] == "ok":
                taken.add((answer[1], answer[2]))
            assert len(taken) == 3 * (64 << 20) // REGION - 2
            assert not {(kept[0], kept[1]), (kept[3], kept[4])} & taken
    eventually(lambda: not blades.books())


def test_programs_hear_of_deaths_and_returns(blades: Blades, desk: Path) -> None:
    with closing(Pager(desk, copies=2)) as pager:
        pager.region()
        del blades.lives["mb1"]
        blades.tell()
        assert pager.hear() == "lost mb1"
        assert pager.ask("release mb1") == "ok"
        assert [pager.region() for _ in range(3)].count([]) == 0
        assert "mb1" not in {blade for _ in range(3) for blade in pager.region()}
        blades.lives["mb1"] = 2
        blades.tell()
        assert pager.hear() == "back mb1"
        pager.connect("mb1")
        assert pager.region("mb0", "mb2", copies=1) == ["mb1"]
    eventually(lambda: not blades.books())


def test_programs_hear_of_a_drain_and_get_nothing_there(blades: Blades, desk: Path) -> None:
    with closing(Pager(desk)) as pager:
        blades.lender.drain("mb0", True)
        assert pager.news.recv(100) == b"drain mb0"
        placed = [pager.ask(f"region {REGION} 1").split()[1] for _ in range(6)]
        assert "0" not in placed
        with closing(Pager(desk)) as later:
            assert "mb0" not in later.blades
        blades.lender.drain("mb0", False)
        assert pager.news.recv(100) == b"keep mb0"
        assert "0" in [pager.ask(f"region {REGION} 1").split()[1] for _ in range(6)]


def test_a_blade_that_returns_at_once_is_another(blades: Blades, desk: Path) -> None:
    with closing(Pager(desk)) as pager:
        assert pager.region("mb0", "mb2") == ["mb1"]
        blades.lives["mb1"] = 2
        blades.tell()
        assert [pager.hear(), pager.hear()] == ["lost mb1", "back mb1"]
        assert pager.region("mb0", "mb2") == []  # the connection was to its former life
    eventually(lambda: not blades.books())


def test_what_a_program_cannot_reach_is_returned_and_it_may_come_again(blades: Blades, desk: Path) -> None:
    with closing(Pager(desk)) as pager:
        assert pager.region("mb0", "mb2") == ["mb1"]
        assert pager.ask("release mb1") == "ok"
        assert pager.hear() == "back mb1"
        assert not blades.books()
        assert pager.region("mb0", "mb2") == []
        pager.connect("mb1")
        assert pager.region("mb0", "mb2") == ["mb1"]


def test_who_waits_for_a_blade_that_dies_need_not_wait_long(blades: Blades, desk: Path) -> None:
    held, asked = threading.Event(), threading.Event()
    allocate = blades.monitors["mb1"].allocate

    def silent(request: dict[str, object]) -> dict[str, object]:
        asked.set()
        held.wait(SECONDS)
        return allocate(request)

    blades.handlers["mb1"]["memory.allocate"] = silent
    with closing(Pager(desk)) as pager:
        answer: list[list[str]] = []
        asking = threading.Thread(target=lambda: answer.append(pager.region("mb0")))
        asking.start()
        assert asked.wait(SECONDS)
        del blades.lives["mb1"]
        blades.tell()
        asking.join(SECONDS)
        assert answer == [["mb2"]]
        held.set()


def test_a_checkpoints_memory_is_nobodys_until_it_is_claimed(blades: Blades, desk: Path) -> None:
    with closing(Pager(desk, copies=2)) as pager:
        for _ in range(3):
            pager.region()
        held = regions(blades)
        assert sum(held.values()) == 6
        assert pager.ask("keep pb0.7-12ab 6") == "ok"
    with closing(Pager(desk)) as other:
        assert other.region()
    eventually(lambda: regions(blades) == held)  # the others' memory has gone back
    kept = [monitor.stats({})["kept"] for monitor in blades.monitors.values()]
    assert sum(each["pb0.7-12ab"] for each in kept if each) == 6 * REGION
    with closing(Pager(desk)) as wrong:
        assert wrong.ask("claim pb0.7-12ab 7").startswith("error ")
        assert wrong.ask("claim pb0.8-12ab 6").startswith("error ")
    with closing(Pager(desk)) as heir:
        assert regions(blades) == held
        assert heir.ask("claim pb0.7-12ab 6") == "ok"
        with closing(Pager(desk)) as late:
            assert "have 0 regions of pb0.7-12ab, and there were 6" in late.ask("claim pb0.7-12ab 6")
        assert regions(blades) == held
    eventually(lambda: not blades.books())


def test_what_was_claimed_can_be_returned_and_kept_again(blades: Blades, desk: Path) -> None:
    with closing(Pager(desk)) as pager:
        places = [pager.ask(f"region {REGION} 1").split()[1:3] for _ in range(4)]
        assert pager.ask("keep pb0.7-12ab 4") == "ok"
    with closing(Pager(desk)) as again:
        assert again.ask("claim pb0.7-12ab 4") == "ok"
        again.socket.send(" ".join(["return", *places[1]]).encode())
        assert again.ask("keep pb0.7-34cd 3") == "ok"
        assert sum(regions(blades).values()) == 3
    with closing(Pager(desk)) as heir:
        assert heir.ask("claim pb0.7-34cd 3") == "ok"
    eventually(lambda: not blades.books())


def test_a_checkpoint_that_could_not_be_claimed_is_refused(blades: Blades, desk: Path) -> None:
    """The books do not agree; the agent of a memory blade was restarted, and others' connections have the numbers."""
    with closing(Pager(desk)) as pager:
        pager.region()
        pager.region()
        assert pager.ask("keep pb0.7-12ab 3").endswith("the memory blades have 2 regions of it, and it knows 3")
        assert not any(monitor.stats({})["kept"] for monitor in blades.monitors.values())
        assert pager.ask("keep pb0.7-12ab 2") == "ok"
        assert pager.ask("claim pb0.7-12ab 2") == "ok"
        blades.lives["mb1"] = 2
        blades.tell()
        assert pager.ask("keep pb0.7-12ab 2").startswith("error 113 mb1 is not there")
        assert not any(monitor.stats({})["kept"] for monitor in blades.monitors.values())


def test_a_claim_that_fails_leaves_what_there_is(blades: Blades, desk: Path) -> None:
    """Also when a memory blade is not there."""
    with closing(Pager(desk)) as pager:
        for _ in range(3):
            pager.region()
        assert pager.ask("keep pb0.7-12ab 3") == "ok"
    held = regions(blades)
    with closing(Pager(desk)) as wrong:
        assert wrong.ask("release mb0") == "ok"
        wrong.connect("mb0")
        blades.lives["mb0"] = 2
        blades.tell()
        assert wrong.ask("claim pb0.7-12ab 4").startswith("error ")
    eventually(lambda: all(not monitor.stats({})["connections"] for monitor in blades.monitors.values()))
    assert regions(blades) == held


def test_a_checkpoint_that_is_discarded_leaves_nothing(blades: Blades, desk: Path) -> None:
    with closing(Pager(desk)) as pager:
        pager.region()
        assert pager.ask("keep pb0.7-12ab 1") == "ok"
    with closing(Pager(desk)) as other:
        assert sum(regions(blades).values()) == 1
        assert other.ask("discard pb0.7-12ab") == "ok"
        assert not sum(regions(blades).values())


def regions(blades: Blades) -> dict[str, int]:
    """By memory blade, a checkpoint's included."""
    return {name: int(monitor.stats({})["regions"]) for name, monitor in blades.monitors.items()}


def test_with_no_blade_left_there_is_no_memory(blades: Blades, desk: Path) -> None:
    with closing(Pager(desk)) as pager:
        assert pager.ask(f"region {REGION} 0") == "error 12 no memory blade is left"


@pytest.mark.long
def test_killed_programs_leave_nothing_in_the_books(blades: Blades, desk: Path) -> None:
    chance = random.Random(2026)
    seen = 0
    for _ in range(RUNS // 4):
        running = [
            subprocess.Popen([sys.executable, "-S", "-c", PROGRAM, desk], stdout=subprocess.PIPE) for _ in range(4)
        ]
        for each in running:
            if chance.random() < 0.8:  # the others are killed as they start
                assert each.stdout is not None
                each.stdout.readline()
        time.sleep(chance.uniform(0, 0.02))
        seen += bool(blades.books())
        for each in running:
            each.send_signal(signal.SIGKILL)
            each.communicate()
    assert seen > RUNS // 8
    eventually(lambda: not blades.books())
    assert not list((desk.parent / "jobs").iterdir())
