"""Whose a rack's files on another host are. `rackless on-host` is the real one; a script stands for ssh.

Home and host are one machine here, so the folders are the host's; who the home is, the tests say.
"""

from __future__ import annotations

import io
import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from orchestrator import deeds, engine, guests, leftovers
from orchestrator.cli.main import app
from orchestrator.errors import RacklessError
from orchestrator.events import ignore
from orchestrator.hypervisor import far, hosts
from orchestrator.hypervisor.far import Far, Worker
from orchestrator.model import Host, Rack
from orchestrator.settings import RackPaths, Settings

PROJECT = Path(__file__).parent.parent.parent


@pytest.fixture
def paths(tmp_path: Path) -> RackPaths:
    """Of a rack on the host."""
    return RackPaths(Settings(tmp_path / "cache", tmp_path / "state", tmp_path / "run"), "wide")


@pytest.fixture
def call(paths: RackPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Worker]]:
    """Reaches the host from a home of this name."""
    for name, last in (("ssh", 'eval "$last"'),
                       ("rackless", f'PYTHONPATH={PROJECT} exec {sys.executable} -m orchestrator.cli.main "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\nfor last; do :; done\n{last}\n")
        (tmp_path / name).chmod(0o755)
    host = Host.model_validate({"address": "192.168.70.2", "rackless": str(tmp_path / "rackless"),
                                "uri": f"qemu+ssh://root@far/system?command={tmp_path}/ssh"})  # fmt: skip
    with ExitStack() as stack:

        def reach(home: str) -> Worker:
            monkeypatch.setattr(guests, "identity", lambda _paths: home)
            return stack.enter_context(closing(Worker(paths, "far", host)))

        yield reach


def test_a_rack_of_the_same_name_there_is_neither_used_nor_removed(
    paths: RackPaths, call: Callable[[str], Worker]
) -> None:
    files = (paths.blade("mb0").disk, paths.settings.run_dir / paths.name / "mb0.agent")
    for file in files:
        file.parent.mkdir(parents=True)
        file.touch()
    worker = call("home")
    wanted: list[tuple[str, dict[str, Any]]] = [
        ("vacant", {}), ("make_folder", {"name": "mb0"}), ("remove_files", {"name": "mb0"}), ("leave", {"end": True}),
        ("forget", {}),
    ]  # fmt: skip
    for deed, fields in wanted:
        with pytest.raises(RacklessError, match=r"there is a rack wide already, somebody else's: .* \(on host far\)"):
            worker.ask(deed, fields)
    assert all(file.exists() for file in files)


def test_a_rack_of_another_home_there_is_its_own(paths: RackPaths, call: Callable[[str], Worker]) -> None:
    call("one").ask("make_folder", {"name": "mb0"})
    other = call("other")
    for deed in ("vacant", "forget"):
        with pytest.raises(RacklessError, match="there is a rack wide already, a rack of one: "):
            other.ask(deed, {})
    again = call("one")
    again.ask("make_folder", {"name": "mb1"})
    assert paths.blade("mb0").root.exists()
    again.ask("forget", {})
    assert not paths.root.exists()
    again.ask("forget", {})  # nothing is there: nobody's
    assert not paths.root.exists()


def test_a_host_says_whose_disks_it_has(paths: RackPaths, tmp_path: Path, call: Callable[[str], Worker]) -> None:
    worker = call("home")
    for name, file in (("sb0", "disk.raw"), ("mb0", "pmem.raw"), ("mb1", "console.log"), ("mb2", "disk.new")):
        worker.ask("make_folder", {"name": name})
        (paths.blade(name).root / file).touch()
    assert worker.ask("kept", {}) == ["mb0", "sb0"]
    here = RackPaths(Settings(tmp_path, tmp_path / "here", tmp_path), paths.name)
    here.blade("sb1").root.mkdir(parents=True)
    here.blade("sb1").disk.touch()
    by_ssh = Host.model_validate({"address": "192.168.70.2", "uri": "qemu+ssh://root@far/system"})
    by_socket = Host.model_validate({"address": "192.168.70.3", "uri": "qemu:///system?socket=/s"})
    made = Rack.model_validate({
        "name": paths.name, "blades": {"gm0": {"kind": "manager", "memory": "256 MiB"}},
        "hosts": {"here": {"address": "192.168.70.1"}, "far": by_ssh, "near": by_socket}})  # fmt: skip
    nothing: Any = None
    other = {"far": Far("far", by_ssh, nothing, worker)}
    assert hosts.kept(here, made, other) == {"mb0": "far", "sb0": "far", "sb1": "here"}
    shared = {**other, "near": Far("near", by_socket, nothing, nothing)}
    assert hosts.kept(here, made, shared) == {"mb0": "far", "sb0": "far"}, "near has what is here, too"


def test_on_the_host_itself_it_is_a_guest(
    paths: RackPaths, call: Callable[[str], Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    call("home").ask("make_folder", {"name": "mb0"})
    (paths.blade("mb0").root / "clone.save").touch()
    assert leftovers.find(paths.settings) == []
    assert leftovers.left_alone(paths.settings) == {"wide": "home"}
    for name in ("CACHE", "STATE", "RUN"):
        monkeypatch.setenv(f"RACKLESS_{name}", str(getattr(paths.settings, f"{name.lower()}_dir")))
    said = CliRunner().invoke(app, ["gc"]).output
    assert "left alone: rack wide, which is part of one of home" in said
    with pytest.raises(RacklessError, match="rack wide on this machine is part of one of home"):
        engine.down(paths.settings, paths.name, ignore)
    assert paths.blade("mb0").root.exists()


def test_a_home_is_a_machine_and_its_folders(paths: RackPaths, tmp_path: Path) -> None:
    other = RackPaths(Settings(tmp_path / "cache", tmp_path / "state", tmp_path / "run2"), "wide")
    assert guests.identity(paths) == guests.identity(RackPaths(paths.settings, "other"))
    assert guests.identity(paths) != guests.identity(other)
    guests.claim(paths, guests.identity(paths))
    guests.claim(paths, guests.identity(paths))
    assert guests.of(paths) == guests.identity(paths)


def test_a_host_that_says_nothing_any_more_is_gone_after_a_while() -> None:
    host = Host.model_validate({"address": "192.168.70.2", "uri": "qemu+ssh://root@far/system"})
    words = far.command("far", host, ["true"])
    options = dict(word.split("=") for word in words if "=" in word)
    assert int(options["ServerAliveInterval"]) * int(options["ServerAliveCountMax"]) == far.REACH_SECONDS


def test_what_is_not_begun_when_nobody_asks_any_more_is_not_done(
    paths: RackPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended, done = threading.Event(), []

    def slow(_paths: RackPaths, number: int) -> None:
        ended.wait(10)
        done.append(number)

    monkeypatch.setattr(deeds, "DEEDS", {"slow": slow})
    first = {"rack": paths.name, "home": None, **{key: str(getattr(paths.settings, key))
                                                  for key in ("cache_dir", "state_dir", "run_dir")}}  # fmt: skip
    lines = [first, *({"id": number, "deed": "slow", "fields": {"number": number}} for number in range(100))]

    class Reader(io.StringIO):
        def __next__(self) -> Any:
            try:
                return super().__next__()
            except StopIteration:
                threading.Timer(0.2, ended.set).start()  # after the end was seen
                raise

    deeds.serve(Reader("".join(json.dumps(line) + "\n" for line in lines)), io.StringIO())
    assert len(done) == paths.settings.max_workers


@pytest.mark.parametrize("typed", ["", "hello\n", "{}\n", "[]\n"])
def test_who_types_on_host_is_told_what_it_is(typed: str) -> None:
    with pytest.raises(RacklessError, match="on-host is for another host's rackless"):
        deeds.serve(io.StringIO(typed), io.StringIO())
