"""Who is in the rack: joining, heartbeats, deaths, a manager that is killed and comes back. Sockets on loopback."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from guest_agents import control
from guest_agents.control import Message
from guest_agents.membership import Books, Follower, Life, Manager, Member, Membership, Timing

ROOT = Path(__file__).parents[2]
SECRET = b"s" * 32
FAST = Timing(0.1, 1.0)

MANAGER = """
import json, sys
from guest_agents import control
from guest_agents.membership import Manager, Timing

manager = Manager("gm0", Timing(0.1, 1.0), lambda: json.loads(sys.argv[2]))
server = control.Server(("127.0.0.1", int(sys.argv[1])), b"s" * 32, manager.handlers())
manager.start()
print(server.address[1], flush=True)
server.run()
"""


def about(name: str, node_id: int, kind: str = "memory") -> dict[str, Any]:
    return {"name": name, "kind": kind, "address": f"fabric-{name}", "management": f"management-{name}",
            "node_id": node_id}  # fmt: skip


class Process:
    """A manager in a process of its own, as it can be killed."""

    def __init__(self, port: int = 0, expected: tuple[str, ...] = ()) -> None:
        command = [sys.executable, "-c", MANAGER, str(port), json.dumps(expected)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.address = ("127.0.0.1", int(self.process.stdout.readline()))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def join(self, name: str, node_id: int) -> None:
        """A blade joins, and is never heard of again."""
        with control.ControlClient(self.address, SECRET) as client:
            client.call("member.join", **about(name, node_id))

    def members(self) -> dict[str, tuple[int, int, str]]:
        reply = control.call(self.address, SECRET, "member.list")
        return {m["name"]: (m["node_id"], m["incarnation"], m["state"]) for m in reply["members"]}


@pytest.fixture
def manager() -> Iterator[Process]:
    running = Process()
    yield running
    running.kill()


class Watcher(Follower):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.lives: list[Life] = []
        self.deaths: dict[int, int] = {}

    def reborn(self, life: Life) -> None:
        self.lives.append(life)

    def news(self, members: list[Message], dead: dict[int, int]) -> None:
        self.deaths = dead


@pytest.fixture
def agents() -> Iterator[Callable[..., Membership]]:
    """Starts memberships that beat fast, and ends their threads afterwards."""
    made: list[tuple[Membership, threading.Thread]] = []

    def start(
        name: str, node_id: int, address: tuple[str, int], secret: bytes = SECRET, kind: str = "memory"
    ) -> Membership:
        member = Membership(address, secret, about(name, node_id, kind), FAST)
        member.follower = Watcher()
        thread = threading.Thread(target=member._run, daemon=True)
        made.append((member, thread))
        thread.start()
        return member

    yield start
    for member, _thread in made:
        member._left = True
    for _member, thread in made:
        thread.join(10)
        assert not thread.is_alive()


def eventually(condition: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


def names(member: Membership) -> list[str]:
    return [m["name"] for m in member.members]


def life(member: Membership) -> tuple[int, int]:
    assert member.incarnation is not None
    return member.node_id, member.incarnation


def test_agents_join_and_learn_of_each_other(manager: Process, agents: Callable[..., Membership]) -> None:
    first = agents("mb0", 2, manager.address)
    assert first.joined.wait(10)
    second = agents("pb0", 3, manager.address, kind="processor")
    assert second.joined.wait(10)
    eventually(lambda: names(first) == names(second) == ["mb0", "pb0"])
    assert first.of_kind("processor") == [
        {**about("pb0", 3, "processor"), "incarnation": second.incarnation, "state": "alive"},
    ]
    assert first.of_kind("storage") == []
    assert second.incarnation != first.incarnation


def test_news_need_no_heartbeat(manager: Process, agents: Callable[..., Membership]) -> None:
    first = agents("mb0", 2, manager.address)
    assert first.joined.wait(10)
    for number in range(3, 8):
        begun = time.monotonic()
        manager.join(f"mb{number}", number)
        eventually(lambda number=number: f"mb{number}" in names(first))  # type: ignore[misc]
        assert time.monotonic() - begun < FAST.heartbeat


def test_everyone_goes_on_living_when_the_manager_is_killed(
    manager: Process, agents: Callable[..., Membership]
) -> None:
    joined = {name: agents(name, number, manager.address) for number, name in enumerate(("mb0", "mb1", "mb2"), 2)}
    for member in joined.values():
        assert member.joined.wait(10)
    before = manager.members()
    manager.kill()
    eventually(lambda: not any(member.joined.is_set() for member in joined.values()))
    again = Process(manager.address[1])
    try:
        for member in joined.values():
            assert member.joined.wait(10)
        assert again.members() == before
        assert all(len(member.follower.lives) == 1 for member in joined.values())  # type: ignore[attr-defined]
    finally:
        again.kill()


@pytest.mark.long
def test_who_dies_with_the_manager_is_declared_dead_by_the_next(
    manager: Process, agents: Callable[..., Membership]
) -> None:
    stays = agents("mb0", 2, manager.address)
    goes = agents("mb1", 3, manager.address)
    eventually(lambda: names(stays) == ["mb0", "mb1"])
    lost = life(goes)
    goes._left = True
    manager.kill()
    again = Process(manager.address[1])
    try:
        assert stays.joined.wait(10)
        eventually(lambda: stays.follower.deaths.get(3) == lost[1])  # type: ignore[attr-defined]
    finally:
        again.kill()


@pytest.mark.long
def test_who_has_not_come_to_a_new_manager_yet_is_not_gone(
    manager: Process, agents: Callable[..., Membership]
) -> None:
    stays, goes = agents("mb0", 2, manager.address), agents("mb1", 3, manager.address)
    eventually(lambda: names(stays) == ["mb0", "mb1"])
    seen: list[tuple[list[str], list[str]]] = []
    stays.watch(lambda: seen.append((names(stays), [m["name"] for m in stays.of_kind("memory")])))
    goes._left = True
    manager.kill()
    again = Process(manager.address[1])
    try:
        eventually(lambda: seen and seen[-1][1] == ["mb0"])
        assert seen[0] == (["mb0"], ["mb0", "mb1"])
        assert stays.follower.deaths[3] == goes.incarnation  # type: ignore[attr-defined]
    finally:
        again.kill()


@pytest.mark.long
def test_silence_is_death_within_a_bounded_time(manager: Process, agents: Callable[..., Membership]) -> None:
    stays = agents("mb0", 2, manager.address)
    assert stays.joined.wait(10)
    manager.join("mb1", 3)
    incarnation = manager.members()["mb1"][1]
    begun = time.monotonic()
    eventually(lambda: stays.follower.deaths.get(3) == incarnation)  # type: ignore[attr-defined]
    seconds = time.monotonic() - begun
    assert FAST.dead_after - 0.1 < seconds < FAST.dead_after + 3 * FAST.heartbeat + 0.5
    assert manager.members()["mb1"] == (3, incarnation, "dead")
    assert stays.of_kind("memory") == [m for m in stays.members if m["name"] == "mb0"]


def test_who_was_declared_dead_learns_it_and_begins_anew(manager: Process, agents: Callable[..., Membership]) -> None:
    member = agents("mb0", 2, manager.address)
    assert member.joined.wait(10)
    before = life(member)
    control.call(manager.address, SECRET, "member.leave", node_id=2, incarnation=before[1])
    eventually(lambda: member.incarnation != before[1] and member.joined.is_set())
    assert life(member) > before
    assert [seen.incarnation for seen in member.follower.lives] == [before[1], member.incarnation]  # type: ignore[attr-defined]
    assert manager.members() == {"mb0": (*life(member), "alive")}


def test_who_leaves_is_gone_at_once(manager: Process, agents: Callable[..., Membership]) -> None:
    stays, goes = agents("mb0", 2, manager.address), agents("mb1", 3, manager.address)
    eventually(lambda: names(stays) == ["mb0", "mb1"] and goes.joined.is_set())
    goes.leave()
    eventually(lambda: stays.follower.deaths.get(3) == goes.incarnation, FAST.dead_after / 2)  # type: ignore[attr-defined]
    assert manager.members()["mb1"][2] == "left"


def test_an_agent_that_starts_before_its_manager(agents: Callable[..., Membership]) -> None:
    early = Process()
    early.kill()
    member = agents("mb0", 2, early.address)
    assert not member.joined.wait(0.2)
    late = Process(early.address[1])
    try:
        assert member.joined.wait(10)
    finally:
        late.kill()


def test_a_stranger_is_kept_out(manager: Process, agents: Callable[..., Membership]) -> None:
    stranger = agents("evil", 2, manager.address, secret=b"x" * 32)
    assert not stranger.joined.wait(0.5)
    assert stranger.incarnation is None
    assert "evil" not in manager.members()


class Ledger(Books):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.reports: list[tuple[str, Message]] = []

    def joined(self, member: Member, report: Message) -> None:
        self.reports.append((member.name, report))


@pytest.fixture
def book() -> Manager:
    return Manager("gm0", FAST)


def states(book: Manager) -> dict[str, str]:
    return {member["name"]: member["state"] for member in book.list({})["members"]}


def test_every_join_without_a_claim_is_a_new_life(book: Manager) -> None:
    first = book.join(about("mb0", 2))
    second = book.join({**about("mb0", 2), "address": "elsewhere"})
    assert second["node_id"] == first["node_id"] == 2
    assert second["incarnation"] > first["incarnation"]
    assert [(m["address"], m["state"]) for m in second["members"]] == [("elsewhere", "alive")]
    assert dict(second["dead"]) == {2: second["incarnation"] - 1}
    assert book.beat({"node_id": 2, "incarnation": first["incarnation"]})["known"] is False
    assert book.beat({"node_id": 2, "incarnation": second["incarnation"], "version": None})["known"] is True


def test_a_place_that_another_blade_takes_over(book: Manager) -> None:
    book.join(about("mb0", 2))
    book.join(about("mb1", 2))
    assert states(book) == {"mb0": "dead", "mb1": "alive"}
    book.join(about("mb0", 3))
    assert states(book) == {"mb0": "alive", "mb1": "alive"}
    book.join(about("mb0", 4))
    assert [(m["name"], m["node_id"]) for m in book.list({})["members"] if m["state"] == "alive"] == [
        ("mb1", 2), ("mb0", 4)]  # fmt: skip


def test_only_claims_of_living_lives_bring_reports(book: Manager) -> None:
    """A manager that was restarted: claims are believed unless somebody knows better."""
    ledger = Ledger()
    book.books = ledger
    others = [(2, 100), (3, 101), (4, 102)]
    report = {"holds": 1}
    mb0 = book.join({**about("mb0", 2), "incarnation": 100, "others": others, "dead": [(5, 90)], "report": report})
    assert mb0["incarnation"] == 100
    mb3 = book.join({**about("mb3", 5), "incarnation": 90, "report": report})  # paused while the first manager lived
    assert mb3["incarnation"] > 102
    fresh = book.join({**about("new", 3), "report": report})  # in place of the life 101, which will not come back
    assert fresh["incarnation"] > mb3["incarnation"]
    late = book.join({**about("mb1", 3), "incarnation": 101, "others": others, "report": report})
    assert late["incarnation"] > fresh["incarnation"]
    assert ledger.reports == [("mb0", report), ("mb3", {}), ("new", {}), ("mb1", {})]
    assert states(book) == {"mb0": "alive", "mb3": "alive", "new": "dead", "mb1": "alive"}


def test_a_claim_that_was_believed_too_soon(book: Manager) -> None:
    assert book.join({**about("mb0", 2), "incarnation": 100})["incarnation"] == 100
    book.join({**about("mb1", 3), "incarnation": 101, "dead": [(2, 100)]})
    assert states(book) == {"mb0": "dead", "mb1": "alive"}
    assert book.beat({"node_id": 2, "incarnation": 100})["known"] is False


def test_when_all_are_here() -> None:
    book = Manager("gm0", Timing(0.1, 60.0), lambda: ["gm0", "mb0"])
    assert not book.all_here()
    book.join(about("gm0", 1, "manager"))
    assert not book.all_here()
    book.join({**about("mb0", 2), "incarnation": 7, "others": [(3, 8)]})
    assert not book.all_here()  # somebody has another life to claim
    book.join({**about("mb9", 3), "incarnation": 8})
    assert book.all_here()


@pytest.mark.long
def test_time_begins_when_the_manager_can_be_heard() -> None:
    """A manager that is slow to start does not call those late whom it kept waiting."""
    book = Manager("gm0", Timing(0.2, 1.0), lambda: ["gm0", "mb0"])
    time.sleep(1.2)
    assert not book.all_here()
    book.start()
    assert not book.all_here()
    eventually(book.all_here)


def test_who_claims_a_life_too_late_begins_anew() -> None:
    book = Manager("gm0", Timing(0.05, 0.1), lambda: ["gm0", "mb0"])
    book.books = ledger = Ledger()
    book.start()
    eventually(book.all_here)
    late = book.join({**about("mb0", 2), "incarnation": 7, "report": {"holds": 1}})
    assert late["incarnation"] > 7
    assert ledger.reports == [("mb0", {})]


def test_reports_are_there_before_all_are() -> None:
    """Whoever takes over the books when all are here must not miss the last one's."""
    book = Manager("gm0", Timing(0.1, 60.0), lambda: ["gm0", "mb0"])

    class Early(Books):
        def joined(self, member: Member, report: Message) -> None:
            assert not book.all_here()

    book.books = Early()
    book.join(about("gm0", 1, "manager"))
    book.join({**about("mb0", 2), "incarnation": 7, "report": {"holds": 1}})
    assert book.all_here()


def test_agents_that_join_at_once_get_different_lives(book: Manager) -> None:
    start = threading.Barrier(16)
    given: list[int] = []

    def join(number: int) -> None:
        start.wait()
        given.append(book.join(about(f"mb{number}", number + 2))["incarnation"])

    threads = [threading.Thread(target=join, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(given)) == 16


@pytest.mark.parametrize("field", ["name", "kind", "address", "management", "node_id"])
def test_an_incomplete_join_changes_nothing(book: Manager, field: str) -> None:
    request = about("mb0", 2)
    del request[field]
    with suppress(KeyError):
        book.join(request)
    assert book.list({})["members"] == []


def test_who_watches_is_told_who_is_there(manager: Process, agents: Callable[..., Membership]) -> None:
    stays = agents("mb0", 2, manager.address)
    seen: list[list[str]] = []
    stays.watch(lambda: seen.append(names(stays)))
    goes = agents("mb1", 3, manager.address)
    eventually(lambda: seen and seen[-1] == ["mb0", "mb1"])
    goes.leave()
    eventually(lambda: [m["name"] for m in stays.of_kind("memory")] == ["mb0"] and len(seen) > 1)
