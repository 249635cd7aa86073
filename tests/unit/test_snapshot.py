"""Snapshots of racks without VMs: what is written and refused, and what is left when something goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import libvirt
import pytest
from typer.testing import CliRunner

from orchestrator import engine, freeze, leftovers, lock, prune, snapshot, thaw
from orchestrator.cli.main import app
from orchestrator.errors import RacklessError
from orchestrator.events import Emit, Note, Step, ignore
from orchestrator.faults import inject
from orchestrator.hypervisor import domain, save_image, template
from orchestrator.hypervisor.domain import Guest
from orchestrator.image import cache
from orchestrator.network import namespace, place
from orchestrator.settings import RackPaths, Settings
from orchestrator.ssh import keys
from orchestrator.templates import render
from tests.unit.broken_racks import DOMAIN, BrokenRack, broken_rack
from tests.unit.netns_racks import needs_root
from tests.unit.stand_in import blade_specs
from tests.unit.test_domain_xml import DEVICES, domain_xml
from tests.unit.test_template_clone import save_image as save_image_of

QEMU = "QEMU emulator version 7.2"


@pytest.fixture(autouse=True)
def qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.engine.emulator", lambda: "qemu")
    monkeypatch.setattr(template, "emulator_version", lambda _emulator: QEMU)


def saved_by(settings: Settings, name: str, metadata: dict[str, Any]) -> bytes:
    """The save image of a blade that runs from what the cache has."""
    entry = image(settings)
    xml = domain.domain_xml(
        Guest(name, 256 << 20, 1, Path("/old/c"), Path("/old/l"), Path("/old/a"), metadata),
        _image(entry), "tcg", "/usr/bin/qemu",
    )  # fmt: skip
    return save_image_of(None, 4096, xml)


def _image(entry: Path) -> Any:
    from orchestrator.image.build import Image

    file = entry / "data"
    return Image("debian13", "blade", "0" * 64, system=file, agents=file, kernel=file, initramfs=file, cmdline="quiet")


def image(settings: Settings, content: bytes = b"an image") -> Path:
    def fill(work: Path) -> None:
        (work / "data").write_bytes(content)

    return cache.obtain(settings.cache_dir / "images", "system-1", fill)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name in ("CACHE", "STATE", "RUN"):
        monkeypatch.setenv(f"RACKLESS_{name}", str(tmp_path / name.lower()))
    return Settings.from_environment()


def make(settings: Settings, name: str = "one", rack: str = "r", **more: Any) -> snapshot.Snapshot:
    """A snapshot of gm0 and mb0 that was never made."""
    specs = blade_specs(rack, ("gm0", "mb0"))
    metadata = {blade: {"rack": rack, "blade": blade, "ready": True, "spec": spec.to_json()}
                for blade, spec in specs.items()}  # fmt: skip
    with snapshot.making(settings, rack, name) as folder:
        for blade in specs:
            (folder / "blades" / blade).mkdir(parents=True)
            (folder / "blades" / blade / snapshot.MEMORY).write_bytes(saved_by(settings, blade, metadata[blade]))
        images = snapshot.images_of(folder / "blades/gm0" / snapshot.MEMORY)
        made = snapshot.Snapshot(rack, name, 1763866000.0, "0.1.0", QEMU, "tcg", metadata, images, folder)
        replace(made, **more).write()
    return snapshot.Snapshot(**{**made.__dict__, **more, "folder": settings.snapshots / rack / name})


def test_what_is_written_is_what_is_read(settings: Settings) -> None:
    made = make(settings)
    assert snapshot.find(settings, "r", "one") == made
    assert snapshot.find(settings, "r", "one").specs == blade_specs("r", ("gm0", "mb0"))
    assert made.missing() == []
    assert [one.name for one in snapshot.of_rack(settings, "r")] == ["one"]
    assert (settings.snapshots / "r/one").stat().st_mode & 0o077 == 0  # keys are in it


def test_names(settings: Settings) -> None:
    make(settings)
    with pytest.raises(RacklessError, match="has a snapshot one already") as caught:
        snapshot.must_be_free(settings, "r", "one")
    assert "delete one" in str(caught.value.hint)
    with pytest.raises(RacklessError, match="has no snapshot onw") as caught:
        snapshot.find(settings, "r", "onw")
    assert caught.value.hint == 'did you mean "one"? (one)'
    for bad in ("..", "a/b", "", "Ä", ".one.tmp1"):
        with pytest.raises(RacklessError, match="cannot name a snapshot"):
            snapshot.must_be_free(settings, "r", bad)
        with pytest.raises(RacklessError, match="cannot name a snapshot"):
            snapshot.delete(settings, "r", bad)


@pytest.mark.parametrize("manifest", [
    "{", "[]", "{}", json.dumps({"format": 2}), None,
], ids=["cut off", "a list", "empty", "format 2", "one more key"])  # fmt: skip
def test_one_of_another_version_is_refused_and_can_be_deleted(settings: Settings, manifest: str | None) -> None:
    made = make(settings)
    file = made.folder / "snapshot.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "more": 1}) if manifest is None else manifest)
    with pytest.raises(RacklessError, match="another version of Rackless made the snapshot one") as caught:
        snapshot.find(settings, "r", "one")
    assert caught.value.log == file
    assert snapshot.of_rack(settings, "r") == []
    assert snapshot.delete(settings, "r", "one") > 0
    assert list(settings.snapshots.iterdir()) == []


def test_one_whose_blades_another_version_described(settings: Settings) -> None:
    blades = {"gm0": {"spec": {"colour": "red"}}}
    with pytest.raises(RacklessError, match=r"another version of Rackless made the snapshot one.*description"):
        thaw.restore(settings, make(settings, blades=blades).rack, "one")


def test_one_that_fails_leaves_nothing(settings: Settings) -> None:
    def fail() -> None:
        with snapshot.making(settings, "r", "one") as folder:
            (folder / "file").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(settings.snapshots.iterdir()) == []


def test_gc_removes_what_a_killed_command_left(settings: Settings) -> None:
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    half, busy = (settings.snapshots / f"r/.one.tmp{pid}" for pid in (ended.pid, os.getpid()))
    for folder in (half, busy):
        folder.mkdir(parents=True)
    make(settings, "whole")
    found = leftovers.find(settings)
    assert [(item.kind, item.name) for item in found] == [("folder", str(half))]
    leftovers.remove(settings, found)
    assert {path.name for path in (settings.snapshots / "r").iterdir()} == {"whole", busy.name}


def test_its_image_stays_in_the_cache(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    image(settings)
    assert [entry.folder.name for entry in prune.stale(settings)] == ["system-1"]
    make(settings)
    assert prune.stale(settings) == []
    (kept,) = prune.remove(prune.everything(settings))
    assert kept.kept == "a snapshot needs it"
    snapshot.delete(settings, "r", "one")
    assert [entry.kept for entry in prune.remove(prune.stale(settings))] == [None]


@needs_root
def test_one_whose_image_was_made_anew_is_refused(settings: Settings) -> None:
    """The same recipe gives other files on another day, and the blades remember the old ones."""
    entry = image(settings)
    make(settings)
    shutil.rmtree(entry)
    with pytest.raises(RacklessError, match=r"needs an image that is not there any more.*system-1/data"):
        thaw.restore(settings, "r", "one")
    image(settings, b"another image")
    with pytest.raises(RacklessError, match="needs an image that is not there any more"):
        thaw.restore(settings, "r", "one")
    shutil.rmtree(entry)
    image(settings)
    assert snapshot.find(settings, "r", "one").missing() == []


@needs_root
def test_one_of_another_qemu_or_damaged_is_refused(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    make(settings, "old", emulator="QEMU emulator version 6.0")
    with pytest.raises(RacklessError, match=r"made with QEMU emulator version 6\.0, and here is"):
        thaw.restore(settings, "r", "old")
    made = make(settings)
    with pytest.raises(RacklessError, match="there is a rack r already"):
        thaw.clone(settings, "r", "one", "r")
    made.memory("mb0").unlink()
    with pytest.raises(RacklessError, match="damaged: files of mb0 are missing"):
        thaw.restore(settings, "r", "one")
    monkeypatch.setenv("RACKLESS_LIBVIRT_URI", "qemu:///system")
    with pytest.raises(RacklessError, match="would have the addresses of r on this host"):
        thaw.clone(Settings.from_environment(), "r", "one", "other")
    assert not RackPaths(settings, "r").root.exists()


@needs_root
def test_a_clone_that_waited_leaves_a_rack_alone_that_was_made_meanwhile(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(settings)
    other, hold = RackPaths(settings, "other"), lock.hold

    def wait(paths: RackPaths) -> AbstractContextManager[None]:
        if paths.name == other.name:  # who had the lock made the rack, and let go
            other.root.mkdir(parents=True)
            (other.root / "theirs").touch()
        return hold(paths)

    monkeypatch.setattr(lock, "hold", wait)
    with pytest.raises(RacklessError, match="there is a rack other already"):
        thaw.clone(settings, "r", "one", other.name)
    assert (other.root / "theirs").exists()


@needs_root
def test_a_clone_takes_nothing_down_when_it_does_not_get_the_lock(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(settings)
    for end in ("down", "take_down"):
        monkeypatch.setattr(engine, end, lambda *_: pytest.fail("it was not ours"))
    settings = replace(settings, lock_seconds=0.1)
    with (lock.hold(RackPaths(settings, "other")),
          pytest.raises(RacklessError, match="rack other is being changed by process")):  # fmt: skip
        thaw.clone(settings, "r", "one", "other")


def test_no_room_is_told_before(settings: Settings) -> None:
    with pytest.raises(RacklessError, match=r"no room for it: it may take \d+ .iB, and .* has") as caught:
        freeze.check_room(settings, 1 << 60, "it")
    assert caught.value.hint
    freeze.check_room(settings, 1, "it")


def test_a_busy_rack_keeps_its_snapshots(settings: Settings) -> None:
    make(settings)
    settings = replace(settings, lock_seconds=0.1)
    with lock.hold(RackPaths(settings, "r")), pytest.raises(RacklessError, match="is being changed by process"):
        snapshot.delete(settings, "r", "one")
    assert snapshot.find(settings, "r", "one")


def test_the_commands_list_and_delete(settings: Settings) -> None:
    run = CliRunner().invoke
    assert "no snapshots" in run(app, ["snapshot", "list", "--rack", "r"]).output
    made = make(settings)
    assert "gm0, mb0" in run(app, ["snapshot", "list", "--rack", "r"]).output
    (told,) = json.loads(run(app, ["snapshot", "list", "--rack", "r", "--json"]).output)
    assert (told["name"], told["blades"], told["missing"]) == ("one", ["gm0", "mb0"], [])
    assert told["bytes"] == made.size > 0
    gone = json.loads(run(app, ["snapshot", "delete", "one", "--rack", "r", "--json"]).output)
    assert gone == {"rack": "r", "snapshot": "one", "bytes": told["bytes"]}
    assert json.loads(run(app, ["snapshot", "list", "--rack", "r", "--json"]).output) == []


def test_a_saved_blade_gets_the_paths_of_another_rack() -> None:
    plugged = "".join(render(DEVICES[name][0], **DEVICES[name][1]) for name in ("interface", "disk", "pmem"))
    xml = domain_xml("tcg").replace("</devices>", f"{plugged}</devices>")
    guest = Guest("b.mb0", 1, 1, Path("/new/mb0.console"), Path("/new/log"), Path("/new/mb0.agent"), {"rack": "b"})
    root = ElementTree.fromstring(template.own_xml(xml, guest, Path("/new/blades/mb0")))
    sources = {disk.find("target").get("dev"): disk.find("source").get("file") for disk in root.findall("devices/disk")}  # type: ignore[union-attr]
    assert sources == {"vda": "/cache/images/system.sqfs", "vdb": "/cache/images/agents.sqfs",
                       "vdc": "/new/blades/mb0/disk.raw"}  # fmt: skip
    assert root.findtext("devices/memory/source/path") == "/new/blades/mb0/pmem.raw"
    assert root.findtext("name") == "b.mb0"
    assert root.find("devices/channel/source").get("path") == "/new/mb0.agent"  # type: ignore[union-attr]
    assert "/state" not in ElementTree.tostring(root, encoding="unicode")


def test_only_a_blade_of_the_same_name_keeps_its_uuid() -> None:
    xml = domain_xml("tcg")
    uuids = [ElementTree.fromstring(xml).findtext("uuid")]
    for name in ("t1.mb0", "other.mb0"):
        guest = Guest(name, 1, 1, Path("c"), Path("l"), Path("a"), {})
        uuids.append(ElementTree.fromstring(template.own_xml(xml, guest, Path("f"))).findtext("uuid"))
    assert uuids[0] == uuids[1] != uuids[2]


# A rack of domains of libvirt's test driver, with agents that answer


@pytest.fixture
def rack(monkeypatch: pytest.MonkeyPatch) -> Iterator[BrokenRack]:
    with broken_rack(monkeypatch) as made:
        keys.ensure_rack_keys(made.paths)
        for name in made.specs:
            keys.ensure_host_key(made.paths, name)
        monkeypatch.setattr(domain, "save_memory", lambda found, path: save(made, found, path))
        monkeypatch.setattr(domain, "restore_paused", restore_paused)
        yield made


def save(rack: BrokenRack, found: Any, path: Path) -> None:
    """As libvirt does; all blades must stand still."""
    assert {rack.state(name) for name in rack.specs} == {"paused"}
    blade = found.name().partition(".")[2]
    path.write_bytes(saved_by(rack.paths.settings, found.name(), rack.metadata(blade)))


def restore_paused(conn: Any, state: Path, xml: str | None = None) -> None:
    root = ElementTree.fromstring(xml or save_image.read_xml(state))
    metadata = root.findtext(f"metadata/{{{domain.NAMESPACE}}}blade")
    made = conn.createXML(DOMAIN.format(name=root.findtext("name"), namespace=domain.NAMESPACE, metadata=metadata))
    made.suspend()


def states(rack: BrokenRack) -> set[str]:
    return {rack.state(name) for name in rack.specs}


@needs_root
@pytest.mark.netns
class TestRacks:
    @pytest.mark.long
    def test_there_and_back(self, rack: BrokenRack) -> None:
        settings, name = rack.paths.settings, rack.name
        made = freeze.create(settings, name, "one")
        assert states(rack) == {"running"}
        assert set(rack.woken) == set(rack.specs)
        assert made.seconds >= made.paused >= made.apart
        secret = rack.paths.secret.read_text()

        inject.inject(settings, name, {"mb0": {"cpu": "10 %"}})
        rack.paths.secret.write_text("0" * 64)
        keys.host_key(rack.paths, "mb1").unlink()
        old = {blade: rack.metadata(blade) for blade in rack.specs}
        rack.paths.secret.write_text(secret)
        domain.destroy(domain.owned(rack.conn, name)["mb1"].domain)
        rack.woken.clear()
        seen: list[tuple[str, set[str]]] = []

        def emit(event: Any) -> None:
            if isinstance(event, Step) and event.phase == "resume" and event.state == "start":
                seen.append(("ready", {str(rack.metadata(blade)["ready"]) for blade in rack.specs}))
                seen.append(("state", states(rack)))

        told = thaw.restore(settings, name, "one", emit)
        assert seen == [("ready", {"False"}), ("state", {"paused"})]  # or `up` would take a half for a whole
        assert told.to_json()["blades"] == ["gm0", "mb0", "mb1", "pb0"]
        assert states(rack) == {"running"}
        assert set(rack.woken) == set(rack.specs)
        assert all(rack.metadata(blade)["ready"] for blade in rack.specs)
        assert "cpu" in old["mb0"]["faults"]
        assert not rack.metadata("mb0").get("faults")
        assert keys.host_key(rack.paths, "mb1").exists()

    @pytest.mark.long
    def test_what_is_outside_of_blades_is_made_again(self, rack: BrokenRack) -> None:
        settings = rack.paths.settings
        inject.partition(settings, rack.name, [["gm0", "pb0"], ["mb0", "mb1"]])
        inject.inject(settings, rack.name, {"mb0": {"bandwidth": "10 Mbit/s"}})
        freeze.create(settings, rack.name, "parted")
        inject.heal(settings, rack.name, [])
        assert len(rack.parts()) == 1
        thaw.restore(settings, rack.name, "parted")
        assert sorted(sorted(group) for group in rack.parts()) == [["gm0", "pb0"], ["mb0", "mb1"]]
        tap = place.of(rack.paths).tap(place.FABRIC, rack.specs["mb0"].index)
        words = ["tc", "-n", namespace.name_of(rack.name), "qdisc", "show", "dev", tap]
        assert "tbf" in subprocess.run(words, capture_output=True, text=True, check=True).stdout

    def test_blades_that_came_later_go(self, rack: BrokenRack) -> None:
        settings = rack.paths.settings
        freeze.create(settings, rack.name, "one")
        spec = replace(rack.specs["mb1"], name="mb2", index=9)
        metadata = {"rack": rack.name, "blade": "mb2", "ready": True, "spec": spec.to_json()}
        text = json.dumps(metadata)
        rack.conn.createXML(DOMAIN.format(name=f"{rack.name}.mb2", namespace=domain.NAMESPACE, metadata=text))
        rack.paths.blade("mb2").root.mkdir(parents=True)
        thaw.restore(settings, rack.name, "one")
        assert set(domain.owned(rack.conn, rack.name)) == set(rack.specs)
        assert not rack.paths.blade("mb2").root.exists()

    @pytest.mark.parametrize("fault", ["killed", "paused"])
    def test_a_blade_that_does_not_run_is_healed_first(self, rack: BrokenRack, fault: str) -> None:
        found = domain.owned(rack.conn, rack.name)["mb0"].domain
        domain.cut_power(found) if fault == "killed" else found.suspend()
        with pytest.raises(RacklessError, match=f"mb0 is {fault}") as caught:
            freeze.create(rack.paths.settings, rack.name, "one")
        assert "heal mb0" in str(caught.value.hint)
        assert not rack.paths.settings.snapshots.exists()

    def test_a_rack_that_is_not_up_or_half_made(self, rack: BrokenRack) -> None:
        with pytest.raises(RacklessError, match="not up"):
            freeze.create(rack.paths.settings, "none", "one")
        found = domain.owned(rack.conn, rack.name)["mb0"]
        domain.write_metadata(found.domain, {**found.metadata, "ready": False})
        with pytest.raises(RacklessError, match="mb0 is not whole"):
            freeze.create(rack.paths.settings, rack.name, "one")

    def test_the_rack_goes_on_when_a_blade_cannot_be_saved(
        self, rack: BrokenRack, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(found: Any, path: Path) -> None:
            if found.name().endswith("mb1"):
                raise libvirt.libvirtError("No space left on device")
            save(rack, found, path)

        monkeypatch.setattr(domain, "save_memory", refuse)
        with pytest.raises(RacklessError, match="cannot save mb1: No space left"):
            freeze.create(rack.paths.settings, rack.name, "one")
        assert states(rack) == {"running"}
        assert set(rack.woken) == set(rack.specs), "they stood still all the same"
        assert list(rack.paths.settings.snapshots.iterdir()) == []

    def test_a_blade_that_cannot_be_woken_is_no_reason_to_fail(self, rack: BrokenRack) -> None:
        rack.replies["mb1 agent.wake"] = RuntimeError("it sleeps")  # type: ignore[assignment]
        told: list[Any] = []
        freeze.create(rack.paths.settings, rack.name, "one", told.append)
        notes = [event.message for event in told if isinstance(event, Note)]
        assert any("clocks of blades may be late" in note and "mb1" in note for note in notes)
        assert snapshot.find(rack.paths.settings, rack.name, "one")

    def test_one_that_is_interrupted_lets_the_rack_go_on(
        self, rack: BrokenRack, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(freeze, "_save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            freeze.create(rack.paths.settings, rack.name, "one")
        assert states(rack) == {"running"}
        assert list(rack.paths.settings.snapshots.iterdir()) == []

    @pytest.mark.long
    def test_a_clone_is_a_rack_of_its_own(self, rack: BrokenRack, monkeypatch: pytest.MonkeyPatch) -> None:
        settings = rack.paths.settings
        freeze.create(settings, rack.name, "one")
        other = RackPaths(settings, f"{rack.name}c")
        with pytest.raises(RacklessError, match=r"gm0|pb0|mb0|mb1"):  # no agents are there
            thaw.clone(settings, rack.name, "one", other.name)
        assert domain.owned(rack.conn, other.name) == {}
        assert not other.root.exists()
        assert not place.of(other).exists()

        def wake(_paths: RackPaths, _specs: object, _emit: Emit) -> None:
            pass

        monkeypatch.setattr(freeze, "wake", wake)
        try:
            thaw.clone(settings, rack.name, "one", other.name)
            made = domain.owned(rack.conn, other.name)
            assert {name: found.metadata["spec"] for name, found in made.items()} == {
                name: {**spec.to_json(), "rack": other.name} for name, spec in rack.specs.items()
            }
            assert {found.state for found in made.values()} == {"running"}
            assert states(rack) == {"running"}
            assert other.secret.read_text() == rack.paths.secret.read_text()
            assert not list(other.blades.glob("*/clone.save"))
            with pytest.raises(RacklessError, match=r"there is a rack .* already"):
                thaw.clone(settings, rack.name, "one", other.name)
        finally:
            engine.down(settings, other.name, ignore)
