"""Changes of a rack that is up: what they make of its file, whom they touch, and what they refuse."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from guest_agents import control
from orchestrator import engine, holdings, journal, rackfile, topology
from orchestrator.errors import RacklessError
from orchestrator.hypervisor import domain
from orchestrator.image import build as image_build
from orchestrator.settings import Settings
from tests.unit.broken_racks import BrokenRack, broken_rack
from tests.unit.netns_racks import needs_root

TEXT = """\
name: {name}  # a rack
blades:
  gm0: {{kind: manager,   memory: 256 MiB}}
  pb0: {{kind: processor, memory: 256 MiB}}
  mb0: {{kind: memory,    memory: 256 MiB}}
  mb1: {{kind: memory,    memory: 256 MiB}}
"""
IDLE = {"bytes_allocated": 0, "bytes_of_others": 0, "bytes_total": 4 << 20}
STAYS = {"moved": 0, "own": 0, "locks": []}
DEFAULT = {"name": "default", "processors": ["pb0"], "memory": ["mb0", "mb1"], "storage": None}


# Without a rack that is up


@pytest.fixture
def down(tmp_path: Path) -> tuple[Settings, Path]:
    file = tmp_path / "rack.yml"
    file.write_text(TEXT.format(name="tdown"))
    return Settings(tmp_path / "cache", tmp_path / "state", tmp_path / "run"), file


def test_of_a_rack_that_is_not_up_only_the_file_changes(down: tuple[Settings, Path]) -> None:
    settings, file = down
    before = file.read_text()
    dry = topology.add(settings, file, "memory", None, {}, dry=True)
    assert (dry.blade, dry.changed, dry.result) == ("mb2", True, None)
    assert file.read_text() == before
    assert "+  mb2: {kind: memory, cpus: 1, memory: 256 MiB}\n" in dry.diff
    made = topology.add(settings, file, "memory", "mb2", {})
    assert made.changed
    assert rackfile.load(file).blades["mb2"].memory == 256 << 20
    again = topology.add(settings, file, "memory", "mb2", {"memory": "0.25 GiB"})
    assert not again.changed
    with pytest.raises(RacklessError, match="mb2 is there already, with another memory"):
        topology.add(settings, file, "memory", "mb2", {"memory": "512 MiB"})
    with pytest.raises(RacklessError, match="mb2 is there already, with another kind"):
        topology.add(settings, file, "processor", "mb2", {})
    topology.set_link(settings, file, "mb2", {"latency": "1 ms"})
    assert not topology.set_link(settings, file, "mb2", {"latency": "1000 us"}).changed
    removed = topology.remove(settings, file, "mb2")
    assert file.read_text() == before
    assert not topology.remove(settings, file, "mb2", missing_ok=True).changed
    topology.undo(settings, removed)
    assert rackfile.load(file).link("mb2").latency == 0.001
    with pytest.raises(RacklessError, match="has been changed since"):
        topology.undo(settings, removed)


def test_a_new_blade_may_say_more(down: tuple[Settings, Path]) -> None:
    settings, file = down
    topology.add(settings, file, "storage", None, {"disk": {"iops": 100}, "cpu_quota": "50 %"})
    blade = rackfile.load(file).blades["sb0"]
    assert blade.disk is not None
    assert (blade.disk.size, blade.disk.iops, blade.cpu_quota) == (1 << 30, 100, 0.5)
    topology.resize(settings, file, "sb0", {"disk": {"iops": None, "bandwidth": "1 MiB/s"}, "cpu_quota": None})
    disk = rackfile.load(file).blades["sb0"].disk
    assert disk is not None
    assert (disk.iops, disk.bandwidth) == (None, 1 << 20)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, f: topology.remove(s, f, "mb7"), "no blade mb7 in rack tdown"),
        (lambda s, f: topology.remove(s, f, "gm0"), "gm0 is the last manager"),
        (lambda s, f: topology.resize(s, f, "mb7", {}), "no blade mb7"),
        (lambda s, f: topology.resize(s, f, "mb0", {"memory": "12"}), 'memory: "12" has no unit'),
        (lambda s, f: topology.resize(s, f, "mb0", {"memory": "64 TiB"}), "too large"),
        (lambda s, f: topology.resize(s, f, "mb0", {"memory": "900 GiB"}), "larger than the host"),
        (lambda s, f: topology.resize(s, f, "mb0", {"excache": "1 MiB"}), "a memory blade has no ExCache"),
        (lambda s, f: topology.set_link(s, f, "mb0", {"jitter": "1 s"}), "more than the latency"),
        (lambda s, f: topology.add(s, f, "disk", None, {}), "no kind of blade is called disk"),
        (lambda s, f: topology.add(s, f, "memory", "All", {}), "cannot name a blade"),
        (lambda s, f: topology.restore(s, f, "mb7"), "no blade mb7"),
    ],
)
def test_what_cannot_be_leaves_the_file_alone(down: tuple[Settings, Path], call: Any, message: str) -> None:
    with pytest.raises(RacklessError, match=message):
        call(*down)
    assert down[1].read_text() == TEXT.format(name="tdown")


def test_the_manager_with_the_books_stays(down: tuple[Settings, Path]) -> None:
    settings, file = down
    topology.add(settings, file, "manager", None, {})
    with pytest.raises(RacklessError, match="gm0 keeps the rack's books"):
        topology.remove(settings, file, "gm0")
    assert topology.remove(settings, file, "gm1").changed


# On one that is


@pytest.fixture
def rack(monkeypatch: pytest.MonkeyPatch) -> Iterator[BrokenRack]:
    monkeypatch.setattr(image_build, "image_key", lambda _recipe, _flavour: "0" * 64)
    with broken_rack(monkeypatch) as made:
        made.replies.update({f"{name} memory.stats": IDLE for name in ("mb0", "mb1")})
        made.replies["pb0 process.stats"] = {"programs": 0}
        made.replies["gm0 vnode.list"] = {"vnodes": [DEFAULT]}
        yield made


@pytest.fixture
def file(rack: BrokenRack, tmp_path: Path) -> Path:
    path = tmp_path / "rack.yml"
    path.write_text(TEXT.format(name=rack.name))
    return path


@pytest.mark.netns
@needs_root
class TestUp:
    def test_only_the_blade_it_is_about_is_touched(self, rack: BrokenRack, file: Path) -> None:
        settings = rack.paths.settings
        change = topology.add(settings, file, "memory", None, {})
        assert [(a.kind, a.blade) for a in change.actions] == [("create", "mb2")]
        assert [only for _, only in rack.ups] == [{"mb2"}]
        change = topology.set_link(settings, file, "mb0", {"latency": "2 ms"})
        assert change.lines() == ["mb0: changed while it runs (link.latency 0 us -> 2 ms)"]
        assert [only for _, only in rack.ups] == [{"mb2"}, {"mb0"}]
        assert not topology.restore(settings, file, "mb1").changed
        assert len(rack.ups) == 2

    def test_a_dry_run_tells_and_does_nothing(self, rack: BrokenRack, file: Path) -> None:
        before = file.read_text()
        change = topology.remove(rack.paths.settings, file, "mb0", dry=True)
        assert [(a.kind, a.blade) for a in change.actions] == [("remove", "mb0")]
        assert change.changed
        assert file.read_text() == before
        assert rack.ups == []

    @pytest.mark.parametrize(
        ("reply", "blade", "message"),
        [
            (("mb0 memory.stats", {**IDLE, "bytes_allocated": 5 << 20}), "mb0", r"memory of programs \(5 MiB, .* 4 M"),
            (("gm0 lite.directory.drain", {**STAYS, "own": 2}), "mb0", r"only its own programs use \(2 LMRs\)"),
            (("gm0 lite.directory.drain", {**STAYS, "locks": ["door"]}), "mb0", r"locks of LITE \(door\)"),
            (("mb0 hotpot.stat", {"datasets": {"notes": {"owned_chunks": 1}}}), "mb0", r"Hotpot datasets .*notes"),
            (("pb0 process.stats", {"programs": 2}), "pb0", r"programs that run on it \(2\)"),
            (("gm0 vnode.list", {"vnodes": [DEFAULT, {**DEFAULT, "name": "web"}]}), "mb1", "its place in vNode web"),
        ],
    )
    def test_what_is_in_use_is_not_removed(
        self, rack: BrokenRack, file: Path, reply: tuple[str, Any], blade: str, message: str
    ) -> None:
        settings, before = rack.paths.settings, file.read_text()
        rack.replies.update([reply])
        with pytest.raises(RacklessError, match=f"removing {blade} would lose .*{message}"):
            topology.remove(settings, file, blade)
        assert file.read_text() == before
        assert rack.ups == []
        assert topology.remove(settings, file, blade, force=True).changed
        assert [only for _, only in rack.ups] == [{blade}]

    def test_what_can_move_moves_first(self, rack: BrokenRack, file: Path) -> None:
        settings = rack.paths.settings
        held = rack.replies["gm0 lite.directory.drain"] = {**STAYS, "moved": 6 << 20}
        rack.drained = lambda: held.update(moved=0)
        told = topology.remove(settings, file, "mb0", dry=True)
        assert (told.moved, rack.ups) == (6 << 20, [])
        assert all(asked["dry"] for asked in rack.drains), rack.drains
        done = topology.remove(settings, file, "mb0")
        assert {"node": "mb0", "meant_for": [1, 1], "but": "hotpot."} in rack.drains
        assert rack.drains[-1] != {"memory": "mb0", "cancel": True}
        assert done.lines() == ["mb0: 6 MiB moved to other blades", "mb0: removed (not in the rack file)"]
        assert [only for _, only in rack.ups] == [{"mb0"}]
        steps = [(event["phase"], event["blade"], event["state"]) for event in journal.Tail(rack.paths.events).new()]
        assert steps == [("drain", "mb0", "start"), ("drain", "mb0", "done")], "a dry run is no event"

    def test_what_comes_back_while_it_is_drained_keeps_it(self, rack: BrokenRack, file: Path) -> None:
        told: dict[str, Any] = {}
        rack.replies["mb0 hotpot.stat"] = told
        rack.drained = lambda: told.update(datasets={"notes": {"owned_chunks": 1}})
        with pytest.raises(RacklessError, match=r"mb0 was drained, and is used again: chunks of Hotpot"):
            topology.remove(rack.paths.settings, file, "mb0")
        assert [asked["cancel"] for asked in rack.drains if "cancel" in asked] == [True, True]
        assert "mb0" in file.read_text()
        assert rack.ups == []

    def test_chunks_of_hotpot_get_another_owner_first(self, rack: BrokenRack, file: Path) -> None:
        settings = rack.paths.settings
        rack.replies["mb0 hotpot.stat"] = told = {"node_id": 3, "datasets": {"notes": {"owned_chunks": 2}}}
        held = rack.replies["mb0 hotpot.depart"] = {"datasets": {"notes": 2 << 20}, "moved": 0}
        rack.replies["mb1 hotpot.stat"] = {"node_id": 4, "datasets": {}}
        assert topology.remove(settings, file, "mb0", dry=True).moved == 2 << 20

        def leave(request: dict[str, Any]) -> None:
            if request["nodes"] == [4]:
                told.update(datasets={})
                held.update(datasets={})

        rack.departing = leave
        assert topology.remove(settings, file, "mb0").moved == 2 << 20
        assert [only for _, only in rack.ups] == [{"mb0"}]

    @pytest.mark.long
    def test_chunks_that_do_not_go_keep_their_blade(self, rack: BrokenRack, file: Path) -> None:
        rack.replies["mb0 hotpot.stat"] = {"node_id": 3, "datasets": {"notes": {"owned_chunks": 2}}}
        rack.replies["mb0 hotpot.depart"] = {"datasets": {"notes": 2 << 20}, "moved": 0}
        rack.replies["mb1 hotpot.stat"] = {"node_id": 4, "datasets": {}}
        with pytest.raises(RacklessError, match=r"chunks of Hotpot datasets \(notes\) do not leave mb0"):
            topology.remove(replace(rack.paths.settings, control_seconds=0.3), file, "mb0")
        assert rack.ups == []

    def test_programs_take_their_memory_elsewhere_first(self, rack: BrokenRack, file: Path) -> None:
        held = rack.replies["mb0 memory.stats"] = {**IDLE, "bytes_allocated": 3 << 20}
        rack.drained = lambda: held.update(bytes_allocated=0) if {"memory": "mb0"} in rack.drains else None
        assert topology.remove(rack.paths.settings, file, "mb0").moved == 3 << 20
        assert {"memory": "mb0"} in rack.drains

    @pytest.mark.long
    def test_programs_that_cannot_keep_it(
        self, rack: BrokenRack, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rack.replies["mb0 memory.stats"] = {**IDLE, "bytes_allocated": 1 << 20}
        monkeypatch.setattr("orchestrator.drain._SLOWEST", 1 << 40)
        impatient = replace(rack.paths.settings, control_seconds=0.3)
        with pytest.raises(RacklessError, match=r"would lose memory of programs .* no place"):
            topology.remove(impatient, file, "mb0")
        assert {"memory": "mb0", "cancel": True} in rack.drains
        assert "mb0" in file.read_text()

    @pytest.mark.parametrize("silent", ["pb0 process.drain", "gm0 lite.directory.drain"])
    def test_a_drain_that_fails_is_cancelled_wherever_it_can_be(
        self, rack: BrokenRack, file: Path, monkeypatch: pytest.MonkeyPatch, silent: str
    ) -> None:
        def fail(*_words: object) -> int:
            rack.replies[silent] = control.ControlError("gone")  # type: ignore[assignment]
            raise RacklessError("no room")

        monkeypatch.setattr("orchestrator.drain._programs", fail)
        with pytest.raises(RacklessError, match="no room"):
            topology.remove(rack.paths.settings, file, "mb0")
        (told,) = (asked for asked in rack.drains if asked.get("cancel"))
        assert ("memory" in told) == silent.startswith("gm0")

    @pytest.mark.parametrize("failure", [RacklessError("rack t is being changed by 1"), KeyboardInterrupt()])
    def test_a_drain_is_cancelled_when_the_blade_is_not_removed_then(
        self, rack: BrokenRack, file: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
    ) -> None:
        settings, before, up = rack.paths.settings, file.read_text(), engine.up

        def fail(*_words: object, **_more: object) -> None:
            raise failure

        monkeypatch.setattr(engine, "up", fail)
        with pytest.raises(type(failure)):
            topology.remove(settings, file, "mb0")
        cancels = [asked for asked in rack.drains if asked.get("cancel")]
        assert [asked.get("node") or asked["memory"] for asked in cancels] == ["mb0", "mb0"]
        rack.drains.clear()
        monkeypatch.setattr(engine, "up", up)
        topology.undo(settings, topology.Change("mb0", file, before, file.read_text(), rackfile.load(file)))
        assert file.read_text() == before
        assert [asked["cancel"] for asked in rack.drains] == [True, True]

    def test_one_that_cannot_be_asked_is_not_removed(self, rack: BrokenRack, file: Path) -> None:
        rack.replies["mb0 memory.stats"] = control.ControlError("busy")  # type: ignore[assignment]
        with pytest.raises(RacklessError, match="cannot tell what would be lost with mb0: mb0: busy"):
            topology.remove(rack.paths.settings, file, "mb0")
        assert rack.ups == []

    def test_a_new_size_makes_it_anew_unless_it_is_in_use(self, rack: BrokenRack, file: Path) -> None:
        settings = rack.paths.settings
        rack.replies["mb0 memory.stats"] = {**IDLE, "bytes_allocated": 5 << 20}
        with pytest.raises(RacklessError, match=r"making anew \(memory 256 MiB -> 300 MiB\) mb0 would lose memory of"):
            topology.resize(settings, file, "mb0", {"memory": "300 MiB"})
        assert topology.resize(settings, file, "mb1", {"memory": "300 MiB"}).actions[0].kind == "recreate"
        assert topology.resize(settings, file, "mb0", {"cpu_quota": "50 %"}).actions[0].kind == "update"

    def test_chunks_of_hotpot_are_in_use_too_unless_they_are_persistent(self, rack: BrokenRack) -> None:
        rack.replies["mb0 hotpot.stat"] = {"datasets": {"notes": {"owned_chunks": 2}, "old": {"owned_chunks": 0}}}
        blades = engine.observe(rack.paths.settings, rack.name)
        lost = holdings.lost_with(rack.paths, blades, "mb0", keeps_files=True)
        assert lost == ["chunks of Hotpot datasets that it owns (notes)"]
        assert blades["mb0"].spec is not None
        blades["mb0"] = replace(blades["mb0"], spec=replace(blades["mb0"].spec, pmem=16 << 20))
        assert holdings.lost_with(rack.paths, blades, "mb0", keeps_files=True) == []
        assert holdings.lost_with(rack.paths, blades, "mb0") == ["its persistent memory"]

    def test_one_that_died_is_made_again(self, rack: BrokenRack, file: Path) -> None:
        domain.destroy(domain.owned(rack.conn, rack.name)["mb0"].domain)
        change = topology.restore(rack.paths.settings, file, "mb0")
        assert [(a.kind, a.blade) for a in change.actions] == [("create", "mb0")]
        assert [only for _, only in rack.ups] == [{"mb0"}]

    def test_the_rack_as_it_is_changes_nothing(self, rack: BrokenRack) -> None:
        wanted = engine.as_it_is(domain.owned(rack.conn, rack.name), rack.name)
        assert not engine.plan(rack.paths.settings, wanted).pending
