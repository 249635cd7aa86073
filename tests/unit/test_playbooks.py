"""The playbooks by ansible-playbook on a rack that is not up, and their modules on one that is, without VMs."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.module_utils.testing import patch_module_args

from orchestrator import journal
from orchestrator.faults import inject
from orchestrator.image import build as image_build
from tests.unit.broken_racks import BrokenRack, broken_rack
from tests.unit.netns_racks import needs_root
from tests.unit.test_inventory import BIN, ROOT, make_ansible
from tests.unit.test_topology import DEFAULT, IDLE, TEXT

PLAYBOOKS = sorted(file for file in (ROOT / "playbooks").glob("*.yml") if file.name != "rackless.yml")

Play = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rack.yml"
    path.write_text(TEXT.format(name="demo"))
    return path


@pytest.fixture
def play(file: Path, tmp_path: Path) -> Play:
    """Runs a playbook from the project's root, on the file of a rack that is not up."""
    ansible = make_ansible(tmp_path, str(file), {"specs": [], "paused": []}, tmp_path / "state", tmp_path / "run")
    (tmp_path / "sitecustomize.py").unlink()  # the real engine, to find that nothing is up

    def run(playbook: str, *words: str) -> subprocess.CompletedProcess[str]:
        return ansible("ansible-playbook", f"playbooks/{playbook}.yml", *words)

    return run


def changed(done: subprocess.CompletedProcess[str]) -> bool:
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("changed=0" in done.stdout) != ("changed=1" in done.stdout), done.stdout
    return "changed=1" in done.stdout


@pytest.mark.long
def test_a_blade_comes_and_goes(play: Play, file: Path) -> None:
    before = file.read_text()
    words = ("add_blade", "-e", "kind=memory", "-e", "name=mb2")
    dry = play(*words, "--check", "--diff")
    assert changed(dry)
    assert "+  mb2: {kind: memory, cpus: 1, memory: 256 MiB}" in dry.stdout
    assert file.read_text() == before
    assert changed(play(*words))
    assert "mb2: {kind: memory" in file.read_text()
    assert not changed(play(*words))
    link = ("set_link", "-e", "name=mb2", "-e", "latency='1 ms'")
    assert changed(play(*link))
    assert not changed(play(*link))
    resize = ("resize_blade", "-e", "name=mb2", "-e", "cpu_quota='20 %'")
    assert changed(play(*resize))
    assert not changed(play(*resize))
    assert changed(play("remove_blade", "-e", "name=mb2"))
    assert file.read_text() == before
    assert not changed(play("remove_blade", "-e", "name=mb2"))


@pytest.mark.long
def test_an_error_is_one_line(play: Play) -> None:
    done = play("remove_blade", "-e", "name=gm0")
    assert done.returncode == 2
    assert "gm0 is the last manager: a rack needs one (`rackless down` removes the rack)" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    done = play("heal")
    assert "is not up" in done.stdout + done.stderr


@pytest.mark.parametrize("playbook", PLAYBOOKS, ids=lambda file: file.stem)
def test_every_playbook_tells_how_it_is_used_and_has_names(playbook: Path) -> None:
    text = playbook.read_text()
    assert text.startswith(f"# ansible-playbook playbooks/{playbook.name}")
    (whole,) = yaml.safe_load(text)
    assert all("name" in task for task in [whole, *whole["tasks"]])


def test_the_playbooks_of_the_house_are_there() -> None:
    wanted = {"site", "add_blade", "remove_blade", "resize_blade", "replace_blade", "set_link", "partition", "heal",
              "power", "rolling_restart", "run_workload", "collect"}  # fmt: skip
    assert wanted <= {playbook.stem for playbook in PLAYBOOKS}


# Modules on a rack that is up


@pytest.fixture
def rack(monkeypatch: pytest.MonkeyPatch) -> Iterator[BrokenRack]:
    monkeypatch.setattr(image_build, "image_key", lambda _recipe, _flavour: "0" * 64)
    with broken_rack(monkeypatch) as made:
        for name in ("cache", "state", "run"):
            monkeypatch.setenv(f"RACKLESS_{name.upper()}", str(getattr(made.paths.settings, f"{name}_dir")))
        made.replies.update({f"{name} memory.stats": IDLE for name in ("mb0", "mb1")})
        made.replies["pb0 process.stats"] = {"programs": 0}
        made.replies["gm0 vnode.list"] = {"vnodes": [DEFAULT]}
        health = {"joined": True, "rdma": "ACTIVE", "uptime_seconds": 400}
        made.replies.update({f"{name} agent.status": health for name in made.specs})
        yield made


@pytest.fixture
def run(rack: BrokenRack, file: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Runs a module as Ansible would, in this process; its result."""
    file.write_text(TEXT.format(name=rack.name))

    def module(name: str, /, check: bool = False, **options: Any) -> dict[str, Any]:
        spec = importlib.util.spec_from_file_location(name, ROOT / f"playbooks/library/{name}.py")
        assert spec is not None
        assert spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        capsys.readouterr()
        arguments = {"rack": str(file), **options, "_ansible_check_mode": check}
        with patch_module_args(arguments), pytest.raises(SystemExit):
            loaded.main()
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        return result

    return module


@pytest.mark.netns
@needs_root
class TestModules:
    @pytest.mark.long
    def test_faults(self, rack: BrokenRack, run: Callable[..., Any]) -> None:
        slow = {"blades": ["mb0", "mb1"], "faults": {"latency": "20 ms"}}
        dry = run("rackless_fault", check=True, **slow)
        assert dry["changed"]
        assert dry["diff"]["after"] == "mb0: latency 20 ms\nmb1: latency 20 ms\n"
        assert not any(inject.faults(rack.paths.settings, rack.name).values())
        assert run("rackless_fault", **slow)["blades"] == ["mb0", "mb1"]
        assert not run("rackless_fault", **slow)["changed"]
        assert run("rackless_fault", partition=["gm0, pb0", "mb0,mb1"])["changed"]
        assert not run("rackless_fault", partition=["gm0,pb0", "mb0,mb1"])["changed"]
        assert rack.parts() == [{"gm0", "pb0"}, {"mb0", "mb1"}]
        assert run("rackless_fault", state="absent", blades=["mb0"], only=["latency"])["faults"]["mb0"] == {"side": 2}
        assert run("rackless_fault", state="absent")["changed"]
        assert not run("rackless_fault", state="absent")["changed"]
        told = run("rackless_fault", blades=["mb9"], faults={"paused": True})
        assert told["failed"]
        assert "no blade mb9" in told["msg"]

    def test_power(self, rack: BrokenRack, run: Callable[..., Any]) -> None:
        for state, after in (("paused", "paused"), ("running", "running"), ("killed", "off")):
            assert run("rackless_power", name="mb0", state=state, check=True)["changed"]
            assert run("rackless_power", name="mb0", state=state)["changed"]
            assert rack.state("mb0") == after
            assert not run("rackless_power", name="mb0", state=state)["changed"]
        assert run("rackless_power", name="mb1", state="reset")["changed"]
        assert [only for _, only in rack.ups] == [{"mb1"}]

    def test_a_blade(self, rack: BrokenRack, run: Callable[..., Any], file: Path) -> None:
        assert run("rackless_blade", kind="storage", disk={"iops": "100"})["blade"] == "sb0"
        assert "sb0: {kind: storage, cpus: 1, memory: 256 MiB, disk: {size: 1 GiB, iops: 100}}" in file.read_text()
        assert not run("rackless_blade", state="replaced", name="mb0")["changed"]
        assert run("rackless_blade", state="replaced", name="mb0", anew=True, check=True)["changed"]
        assert rack.state("mb0") == "running"
        assert run("rackless_blade", state="replaced", name="mb0", anew=True)["changed"]
        rack.replies["mb1 memory.stats"] = {**IDLE, "bytes_allocated": 5 << 20}
        told = run("rackless_blade", state="absent", name="mb1", check=True)
        assert told["failed"]
        assert "memory of programs" in told["msg"]
        assert run("rackless_blade", state="absent", name="mb1", force=True, check=True)["changed"]

    def test_a_rolling_restart_is_refused_before_it_begins(self, rack: BrokenRack, run: Callable[..., Any]) -> None:
        assert run("rackless_restart", check=True)["restarted"] == ["gm0", "pb0", "mb0", "mb1"]
        assert not run("rackless_restart", older_than=500)["changed"]
        rack.replies["mb1 memory.stats"] = {**IDLE, "bytes_allocated": 5 << 20}
        assert "restarting mb1 would lose memory" in run("rackless_restart")["msg"]
        run("rackless_power", name="mb0", state="paused")
        assert "mb0 is paused: no other blade is restarted" in run("rackless_restart", blades=["gm0"])["msg"]

    def test_a_rolling_restart_is_in_the_journal(self, rack: BrokenRack, run: Callable[..., Any]) -> None:
        assert run("rackless_restart", blades=["mb0"])["failed"], "there is no SSH server"
        steps = [(event["phase"], event["blade"], event["state"]) for event in journal.Tail(rack.paths.events).new()]
        assert steps == [("restart", "mb0", "start"), ("restart", "mb0", "fail")]

    def test_a_rack(self, rack: BrokenRack, run: Callable[..., Any]) -> None:
        assert not run("rackless_rack")["changed"]
        assert rack.ups == []
        run("rackless_power", name="mb0", state="killed")
        told = run("rackless_rack", check=True)
        assert told["changed"]
        assert "! mb0  recreate  memory     it is not running" in told["diff"]["prepared"]


# The collection


@pytest.mark.long
def test_an_installed_rackless_brings_a_collection(tmp_path: Path, file: Path) -> None:
    """Built as a wheel and unpacked, as pip would; run far from the tree, on a file named from there."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "wheel")]
    subprocess.run(build, cwd=ROOT, capture_output=True, check=True)
    (wheel,) = (tmp_path / "wheel").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "ANSIBLE_HOME": str(tmp_path / "ansible"),
                   "RACKLESS_STATE": str(tmp_path / "state"), "RACKLESS_RUN": str(tmp_path / "run")}  # fmt: skip
    words = ["rackless.rack.add_blade", "-e", "kind=memory", "-e", "name=mb2", "-e", f"rack=./{file.name}"]
    for change in (1, 0):
        done = subprocess.run([BIN / "ansible-playbook", *words], cwd=tmp_path, env=environment, check=False,
                              stdin=subprocess.DEVNULL, capture_output=True, text=True)  # fmt: skip
        assert f"changed={change}" in done.stdout, done.stdout + done.stderr
    assert "mb2: {kind: memory" in file.read_text()
    (tmp_path / "my.rackless.yml").write_text("plugin: rackless.rack.rackless\n")
    listed = subprocess.run([BIN / "ansible-inventory", "-i", "my.rackless.yml", "--list"], cwd=tmp_path,
                            env={**environment, "RACKLESS_RACK": str(file)}, capture_output=True, text=True,
                            check=True)  # fmt: skip
    assert "rack demo is not up" in listed.stderr
