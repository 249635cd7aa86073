"""The end of a move of files between storage blades: agents in this process, whose manager decides and may die."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from guest_agents.control import ControlError
from guest_agents.splitkernel.managers import files as moves
from guest_agents.splitkernel.managers.vnode import Move
from guest_agents.splitkernel.storage import arrival, wire
from guest_agents.splitkernel.storage.arrival import Arrival
from orchestrator import agents, departure
from orchestrator.errors import RacklessError
from orchestrator.settings import RackPaths, Settings
from orchestrator.spec import BladeSpec
from tests.unit.split_blades import KINDS, Rack, eventually
from tests.unit.stand_in import blade_specs

pytestmark = [pytest.mark.long, pytest.mark.skipif(os.geteuid() != 0, reason="owners and identities are set by root")]

NAMES = ("gm0", "pb0", "mb0", "sb0", "sb1", "sb2")


@pytest.fixture
def rack(tmp_path: Path) -> Iterator[Rack]:
    made = Rack(tmp_path, NAMES)
    made.host("vnode.create", name="web", storage=["sb1"])
    made.host("vnode.create", name="db", storage=["sb0"])
    for name, blade in (("web", "sb1"), ("db", "sb0")):
        (tmp_path / blade / name).mkdir()
        (tmp_path / blade / name / "f").write_text(name)
    (tmp_path / "sb0/plain").write_text("default")
    yield made
    made.close()


def storage(rack: Rack) -> dict[str, str]:
    return {vnode["name"]: vnode["storage"] for vnode in rack.host("vnode.list")["vnodes"]}


def names(rack: Rack, blade: str) -> list[str]:
    return [name for name in sorted(os.listdir(rack.folder / blade)) if name != wire.ATTIC]


def settled(rack: Rack, *blades: str) -> None:
    """Until nothing of a move is under way on these blades."""
    eventually(lambda: all(rack[blade].hold.token is None and not arrival.stages(rack.folder / blade)
                           for blade in blades))  # fmt: skip


def move(rack: Rack, source: str, target: str) -> None:
    rack.host("storage.leave", storage=source)
    while not rack[target].call("storage.fetch", source=source, seconds=5)["ready"]:
        pass
    rack.host("storage.move", storage=source, to=target)


def held(rack: Rack, blade: str) -> bool:
    return rack[blade].hold.token is not None


def test_vnodes_follow_their_files(rack: Rack) -> None:
    assert storage(rack) == {"default": "sb0", "web": "sb1", "db": "sb0"}
    ledger = rack["pb0"].line.holder.ledger
    move(rack, "sb0", "sb2")
    assert storage(rack) == {"default": "sb2", "web": "sb1", "db": "sb2"}
    now = rack["pb0"].line.holder.ledger  # everybody knows when it is answered
    assert (now.followed("sb0", ledger), now.followed("sb0", now), now.left("sb0")) == ("sb2", "sb0", 1)
    assert now.home(["sb0", "sb1", "sb2"]) == "sb2"
    assert (rack.folder / "sb2/plain").read_text() == "default"
    assert rack["sb0"].call("storage.content")["names"] == [], "its copies are not files"
    assert held(rack, "sb0"), "and nobody gets them"
    with pytest.raises(ControlError, match="sb0 is being removed"):
        rack.host("vnode.create", name="new", storage=["sb0"])
    move(rack, "sb2", "sb1")
    assert set(storage(rack).values()) == {"sb1"}
    assert rack["pb0"].line.holder.ledger.followed("sb0", ledger) == "sb1"
    assert names(rack, "sb1") == ["db", "plain", "web"]
    rack.restart("gm0")
    assert set(storage(rack).values()) == {"sb1"}, "a manager that was restarted knows"


def test_a_blade_that_is_not_removed_after_all_is_empty_and_used_again(rack: Rack) -> None:
    move(rack, "sb0", "sb2")
    rack.restart("sb0")
    assert held(rack, "sb0"), "also an agent that was restarted is still"
    rack.host("storage.leave", storage="sb0", cancel=True)
    settled(rack, "sb0", "sb2")
    assert names(rack, "sb0") == []
    assert names(rack, "sb2") == ["db", "plain"]
    rack.host("vnode.create", name="new", storage=["sb0"])


@pytest.mark.parametrize("fails", ["hold", "publish"])
def test_when_one_end_fails_the_files_are_where_they_were(rack: Rack, fails: str) -> None:
    rack.host("storage.leave", storage="sb0")
    assert rack["sb2"].call("storage.fetch", source="sb0", seconds=5)["ready"]
    if fails == "publish":
        (rack.folder / "sb2/db").mkdir()  # somebody has made it meanwhile
    else:
        rack["sb0"].hold.hold("other")
    with pytest.raises(ControlError, match="the files of sb0 are where they were"):
        rack.host("storage.move", storage="sb0", to="sb2")
    assert storage(rack) == {"default": "sb0", "web": "sb1", "db": "sb0"}
    assert names(rack, "sb0") == ["db", "plain"]
    if fails == "hold":
        rack["sb0"].hold.release()
    rack["sb2"].call("storage.fetch", source="sb0", cancel=True)
    settled(rack, "sb0", "sb2")
    assert names(rack, "sb2") == (["db"] if fails == "publish" else [])
    if fails == "hold":
        move(rack, "sb0", "sb2")  # and so it can be repeated
        assert names(rack, "sb2") == ["db", "plain"]


def _published(rack: Rack, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Thread]:
    """A move that stands still when the files have their names on sb2; set the event and it goes on."""
    reached, go, publish = threading.Event(), threading.Event(), Arrival.publish

    def stop(self: Arrival, *words: Any) -> None:
        publish(self, *words)
        reached.set()
        go.wait(30)

    monkeypatch.setattr(Arrival, "publish", stop)
    rack.host("storage.leave", storage="sb0")
    assert rack["sb2"].call("storage.fetch", source="sb0", seconds=5)["ready"]

    def end() -> None:
        with pytest.raises(ControlError):
            rack.host("storage.move", storage="sb0", to="sb2")

    thread = threading.Thread(target=end)
    thread.start()
    assert reached.wait(15)
    return go, thread


Kill = Callable[[Rack], None]


def _kill_manager(rack: Rack) -> None:
    def silence(*_words: Any) -> None:  # its threads go on in this process, and say nothing to anybody
        raise ControlError("dead")

    books = rack["gm0"].line.books
    assert books is not None
    books.files._change = silence  # type: ignore[assignment]
    rack.restart("gm0")


@pytest.mark.parametrize("kill", [_kill_manager, lambda r: r.restart("sb2"),
                                  lambda r: r.restart("sb0", "sb2")])  # fmt: skip
def test_when_a_blade_restarts_before_the_change_nothing_has_moved(
    rack: Rack, monkeypatch: pytest.MonkeyPatch, kill: Kill
) -> None:
    monkeypatch.setattr(moves, "_CALL_SECONDS", 3.0)
    go, thread = _published(rack, monkeypatch)
    assert names(rack, "sb2") == ["db", "plain"]
    kill(rack)
    go.set()
    thread.join(30)
    settled(rack, "sb0", "sb2")
    assert names(rack, "sb2") == []
    assert names(rack, "sb0") == ["db", "plain"]
    assert storage(rack) == {"default": "sb0", "web": "sb1", "db": "sb0"}


def test_what_was_said_not_to_have_moved_never_has(rack: Rack) -> None:
    """A manager died in the middle of telling, and only pb0 heard; pb0 is away while the next one answers."""
    stale = rack["pb0"].line.holder.ledger
    told = stale.moved(Move("sb0", "sb2", "t"), ["sb0", "sb1", "sb2"])
    life = rack["sb0"].line.life()
    assert life is not None
    assert rack["sb0"].line.holder.ask("managers.moved", 10.0, token="t") == {
        "pending": False, "moved": False, "leaving": False}  # fmt: skip
    late = replace(told, version=stale.version + 1)
    assert rack["gm0"].line.books is not None
    rack["gm0"].line.books._take(life, "sb0", {"ledger": late.to_json(), "sequence": 10**9, "programs": []})
    assert storage(rack)["db"] == "sb0"


# As the host asks for it


@pytest.fixture
def host(rack: Rack, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[RackPaths, list[BladeSpec]]:
    """The host's side: requests go to these agents. Disks are said to be small, and almost empty."""

    def call(_paths: object, blade: str, _address: str, op: str, _timeout: float, **fields: Any) -> dict[str, Any]:
        try:
            return rack[blade].call(op, **fields)
        except ControlError as error:
            raise RacklessError(f"{blade}: {error.error}", hint=error.hint) from None

    monkeypatch.setattr(agents, "call", call)
    disk = SimpleNamespace(f_frsize=4096, f_blocks=9000, f_bfree=8000, f_bavail=8000, f_files=900, f_ffree=800,
                           f_favail=800)  # fmt: skip
    monkeypatch.setattr(os, "statvfs", lambda _path: disk)
    paths = RackPaths(Settings(tmp_path / "cache", tmp_path / "state", tmp_path / "run"), "r")
    like = blade_specs("r", ["gm0"])["gm0"]
    return paths, [replace(like, name=name, kind=cast("Any", KINDS[name[:2]])) for name in NAMES]


def test_the_host_moves_them_where_there_is_room(rack: Rack, host: tuple[RackPaths, list[BladeSpec]]) -> None:
    paths, blades = host
    spec = blades[3]
    (rack.folder / "sb1/plain").write_text("another")  # so that one is no place for them
    assert departure.refusals(paths, blades, spec) == []
    assert departure.used(paths, spec) > 0
    assert departure.move(paths, blades, spec) > 0
    assert storage(rack) == {"default": "sb2", "web": "sb1", "db": "sb2"}
    assert departure.refusals(paths, blades, spec) == []
    assert departure.move(paths, blades, spec) == departure.used(paths, spec) == 0, "again: there is nothing left"
    departure.cancel(paths, blades, spec)
    settled(rack, "sb0", "sb2")
    assert names(rack, "sb0") == []


def test_a_vnode_without_files_moves_too(rack: Rack, host: tuple[RackPaths, list[BladeSpec]]) -> None:
    paths, blades = host
    shutil.rmtree(rack.folder / "sb1/web")
    assert "there is no other storage blade" in departure.refusals(paths, [*blades[:3], blades[4]], blades[4])[0]
    assert departure.move(paths, blades, blades[4]) == 0
    assert storage(rack)["web"] != "sb1"
    assert departure.refusals(paths, [*blades[:3], blades[4]], blades[4]) == [], "nothing is left for which to keep it"


def test_the_host_refuses_before_anything_is_touched(rack: Rack, host: tuple[RackPaths, list[BladeSpec]]) -> None:
    paths, blades = host
    spec = blades[3]
    (rack.folder / "sb1/plain").write_text("another")
    refused = departure.refusals(paths, blades[:5], spec)
    assert len(refused) == 1
    assert "sb1 has plain already" in refused[0]
    assert "there is no other storage blade" in departure.refusals(paths, blades[:4], spec)[0]
    full = {"names": ["a"], "bytes": 5 << 20, "files": 9}
    assert departure._obstacle(full, {"names": [], "free": 5 << 20, "free_files": 99}) == "has room for 5 MiB"
    assert departure._obstacle(full, {"names": [], "free": 7 << 20, "free_files": 8}) == "has room for 7 MiB"
    assert departure._obstacle(full, {"names": [], "free": 7 << 20, "free_files": 9}) is None
    assert not held(rack, "sb0")


def test_a_host_that_gives_up_leaves_them_where_they_were(
    rack: Rack, host: tuple[RackPaths, list[BladeSpec]], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, blades = host
    spec = blades[3]

    def fail(*_words: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Arrival, "fetch", fail)
    with pytest.raises(RacklessError, match="No space left"):
        departure.move(paths, blades, spec)
    departure.cancel(paths, blades, spec)
    settled(rack, "sb0", "sb1", "sb2")
    assert names(rack, "sb0") == ["db", "plain"]
    assert (names(rack, "sb1"), names(rack, "sb2")) == (["web"], [])
    rack.host("vnode.create", name="new", storage=["sb0"])
