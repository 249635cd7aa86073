"""Who is in the rack: joining, heartbeats, a manager that is killed and comes back. Real sockets on loopback."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from guest_agents import control, membership
from guest_agents.membership import Manager, Membership

ROOT = Path(__file__).parents[2]
SECRET = b"s" * 32

MANAGER = """
import sys
from guest_agents import control
from guest_agents.membership import Manager

own = {"name": "gm0", "kind": "manager", "address": "10.77.0.10", "management": "10.78.0.10"}
server = control.Server(("127.0.0.1", int(sys.argv[1])), b"s" * 32, Manager(own).handlers())
print(server.address[1], flush=True)
server.run()
"""


def about(name: str, kind: str = "memory") -> dict[str, Any]:
    return {"name": name, "kind": kind, "address": f"fabric-{name}", "management": f"management-{name}"}


class EndedError(Exception):
    """The test is over."""


class Process:
    """A manager in a process of its own, as it can be killed."""

    def __init__(self, port: int = 0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", MANAGER, str(port)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.address = ("127.0.0.1", int(self.process.stdout.readline()))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def members(self) -> dict[str, int]:
        reply = control.call(self.address, SECRET, "member.list")
        return {member["name"]: member["node_id"] for member in reply["members"]}


@pytest.fixture
def manager() -> Iterator[Process]:
    running = Process()
    yield running
    running.kill()


@pytest.fixture
def agents(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Membership]]:
    """Starts memberships that beat fast, and ends their threads afterwards."""
    ended = threading.Event()
    threads: list[threading.Thread] = []

    def sleep(seconds: float) -> None:
        if ended.wait(seconds / 20):
            raise EndedError

    monkeypatch.setattr(membership, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))

    def start(name: str, address: tuple[str, int], secret: bytes = SECRET, kind: str = "memory") -> Membership:
        made = Membership(address, secret, about(name, kind))

        def run() -> None:
            with suppress(EndedError):
                made._run()

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        return made

    yield start
    ended.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def eventually(condition: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


def names(member: Membership) -> list[str]:
    return [m["name"] for m in member.members]


def test_agents_join_and_learn_of_each_other(manager: Process, agents: Callable[..., Membership]) -> None:
    first = agents("mb0", manager.address)
    assert first.joined.wait(10)
    second = agents("pb0", manager.address, kind="processor")
    assert second.joined.wait(10)
    assert [first.node_id, second.node_id] == [2, 3]
    eventually(lambda: names(first) == names(second) == ["gm0", "mb0", "pb0"])
    assert first.of_kind("processor") == [
        {"node_id": 3, **about("pb0", "processor"), "state": "alive"},
    ]
    assert first.of_kind("storage") == []


def test_everyone_keeps_its_id_when_the_manager_is_killed(manager: Process, agents: Callable[..., Membership]) -> None:
    joined = {}
    for name in ("mb0", "mb1", "mb2"):
        joined[name] = agents(name, manager.address)
        assert joined[name].joined.wait(10)
    before = manager.members()
    assert before == {"gm0": 1, "mb0": 2, "mb1": 3, "mb2": 4}
    manager.kill()
    eventually(lambda: not any(member.joined.is_set() for member in joined.values()))
    again = Process(manager.address[1])
    try:
        for member in joined.values():
            assert member.joined.wait(10)
        assert again.members() == before
        assert {name: member.node_id for name, member in joined.items()} == {"mb0": 2, "mb1": 3, "mb2": 4}
    finally:
        again.kill()


def test_an_agent_that_starts_before_its_manager(agents: Callable[..., Membership]) -> None:
    early = Process()
    early.kill()
    member = agents("mb0", early.address)
    assert not member.joined.wait(0.2)
    late = Process(early.address[1])
    try:
        assert member.joined.wait(10)
    finally:
        late.kill()


def test_a_stranger_is_kept_out(manager: Process, agents: Callable[..., Membership]) -> None:
    stranger = agents("evil", manager.address, secret=b"x" * 32)
    assert not stranger.joined.wait(0.5)
    assert stranger.node_id is None
    assert "evil" not in manager.members()


@pytest.fixture
def book() -> Manager:
    return Manager(about("gm0", "manager"))


def test_the_manager_itself_is_always_node_1(book: Manager) -> None:
    assert book.list({})["members"] == [{"node_id": 1, **about("gm0", "manager"), "state": "alive"}]
    assert book.join({**about("gm0", "manager"), "node_id": None})["node_id"] == 1


def test_a_restarted_agent_keeps_its_id_and_may_have_moved(book: Manager) -> None:
    assert [book.join(about(name))["node_id"] for name in ("mb0", "mb1")] == [2, 3]
    reply = book.join({**about("mb0"), "address": "elsewhere", "node_id": None})
    assert reply["node_id"] == 2
    assert reply["members"][1]["address"] == "elsewhere"


def test_an_id_is_never_given_twice(book: Manager) -> None:
    """Even if agents ask for one that has gone to another since the manager was restarted."""
    wanted = {"mb0": None, "mb1": 2, "mb2": 2, "mb3": 1, "mb4": 7, "mb5": None}
    given = {name: book.join({**about(name), "node_id": node_id})["node_id"] for name, node_id in wanted.items()}
    assert given == {"mb0": 2, "mb1": 3, "mb2": 4, "mb3": 5, "mb4": 7, "mb5": 6}


def test_a_stranger_to_the_book_is_asked_to_join(book: Manager) -> None:
    assert book.beat(about("mb0"))["known"] is False
    book.join(about("mb0"))
    assert book.beat(about("mb0"))["known"] is True


def test_who_stops_beating_is_shown_as_silent(book: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    later = 0.0
    monkeypatch.setattr(membership, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + later))
    for name in ("gm0", "mb0", "mb1"):
        book.join(about(name))

    def states() -> dict[str, str]:
        return {member["name"]: member["state"] for member in book.list({})["members"]}

    later = membership.SILENT_AFTER_SECONDS - 1
    book.beat(about("mb1"))
    assert set(states().values()) == {"alive"}
    later = membership.SILENT_AFTER_SECONDS + 1
    assert states() == {"gm0": "silent", "mb0": "silent", "mb1": "alive"}
    book.beat(about("mb0"))
    assert states() == {"gm0": "silent", "mb0": "alive", "mb1": "alive"}


def test_agents_that_join_at_once_get_different_ids(book: Manager) -> None:
    start = threading.Barrier(16)
    given: list[int] = []

    def join(number: int) -> None:
        start.wait()
        given.append(book.join(about(f"mb{number}"))["node_id"])

    threads = [threading.Thread(target=join, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(given) == list(range(2, 18))


@pytest.mark.parametrize("field", ["name", "kind", "address", "management"])
def test_an_incomplete_join_changes_nothing(book: Manager, field: str) -> None:
    request = about("mb0")
    del request[field]
    with suppress(KeyError):
        book.join(request)
    assert [member["name"] for member in book.list({})["members"]] == ["gm0"]
