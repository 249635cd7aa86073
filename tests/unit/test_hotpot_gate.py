"""Hotpot as an agent offers it: started when it is needed, on all blades that must have it."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from guest_agents import control, pmem
from guest_agents.hotpot import media
from guest_agents.hotpot.gate import Gate
from guest_agents.hotpot.service import BOOK, BOOK_BYTES
from orchestrator import agents
from orchestrator.cli import hotpot as cli
from tests.unit import lite_pair
from tests.unit.hotpot_rack import Place, plug, shells
from tests.unit.lite_blades import SECRET, Rack, eventually
from tests.unit.lite_stack import whole

pytestmark = pytest.mark.skipif(lite_pair.missing() is not None, reason=str(lite_pair.missing()))
Gates = dict[str, Gate]


@pytest.fixture
def rack(tmp_path: Path, lite_core: Path) -> Iterator[Rack]:
    with whole(tmp_path, lite_core, "gm0", "mb0", "mb1") as made:
        yield made


@pytest.fixture
def gates(rack: Rack, tmp_path: Path) -> Iterator[Gates]:
    made = {name: Gate(blade.tier, tmp_path / f"media-{name}", tmp_path / f"{name}.hotpot")
            for name, blade in rack.blades.items()}  # fmt: skip
    for name, gate in made.items():
        rack[name].server._handlers.update(gate.handlers())  # type: ignore[attr-defined]
        gate.start()
    yield made
    for gate in made.values():
        gate.close()


def started(gates: Gates) -> list[str]:
    return [name for name, gate in gates.items() if gate._service is not None]


def test_it_starts_where_it_is_needed(rack: Rack, gates: Gates, tmp_path: Path) -> None:
    address = (rack["mb0"].address, rack.port)
    assert started(gates) == []
    assert control.call(address, SECRET, "hotpot.stat") == {}
    with shells(Place(tmp_path / "mb0.hotpot")) as [shell]:
        assert shell.do("session.name") == "mb0"
        assert started(gates) == ["gm0", "mb0"]
        shell.do("d = session.create('set', 3 * 4096, chunk=4096)")
        assert started(gates) == ["gm0", "mb0", "mb1"]
        shell.do("d.memory[8192] = 7\nd.commit((8192, 1), replicas=3)")
        stat = control.call(address, SECRET, "hotpot.stat")
        assert (stat["node"], stat["datasets"]["set"]["committed"]) == ("mb0", 1)
        shell.do("d.close()")


def test_where_media_are_old_it_says_so_to_programs(gates: Gates, tmp_path: Path) -> None:
    """And other blades do without that one."""
    (tmp_path / "media-mb0").mkdir()
    (tmp_path / "media-mb0" / "home-1").write_bytes(b"precious")
    refused = Place(tmp_path / "mb0.hotpot").start("")
    _out, errors = refused.communicate(timeout=60)
    assert "OldMedia" in errors
    with shells(Place(tmp_path / "mb1.hotpot")) as [shell]:
        shell.do("d = session.create('set', 3 * 4096, chunk=4096)")
        assert shell.do("session.datasets()[0]['owners']") == [1, 3]
        shell.do("d.close()")


@pytest.mark.long
def test_an_agent_that_restarts_has_its_datasets_again(rack: Rack, gates: Gates, tmp_path: Path) -> None:
    """Without anybody on that blade asking."""
    with shells(Place(tmp_path / "mb0.hotpot")) as [shell]:
        shell.do("d = session.create('set', 3 * 4096, chunk=4096)")
        shell.do("d.memory[8192] = 7\nd.commit((8192, 1))")  # of the third blade
        gates["mb1"].close()
        again = gates["mb1"] = Gate(rack["mb1"].tier, tmp_path / "media-mb1", tmp_path / "mb1.hotpot")
        again.start()
        eventually(lambda: again._service is not None and all(home.ready for home in again._service.owner.homes()))
        shell.do("d.memory[8193] = 8\nd.commit((8193, 1))")
        with shells(Place(tmp_path / "mb1.hotpot")) as [other]:
            assert other.do("bytes(session.open('set').memory[8192:8194])") == b"\7\10"
        shell.do("d.close()")


@pytest.mark.long
@pytest.mark.parametrize("damage", ["Corrupt", "OldMedia"])
def test_what_cannot_be_taken_over_is_tried_once(
    rack: Rack, gates: Gates, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    """It would be the same each time. Nothing of it is touched."""
    folder = tmp_path / "media-mb1"
    gates["mb1"].close()
    folder.mkdir()
    (folder / BOOK).write_bytes((b"x" if damage == "Corrupt" else b"\0") * BOOK_BYTES)
    (folder / "home-1").write_bytes(b"precious")
    again = gates["mb1"] = Gate(rack["mb1"].tier, folder, tmp_path / "mb1.hotpot")
    recovery = threading.Thread(target=again._come_back, daemon=True)
    recovery.start()
    recovery.join(30)
    assert not recovery.is_alive()
    [said] = [record for record in caplog.records if "not in reach" in record.message]
    assert said.levelno == logging.ERROR
    assert ("corrupt" if damage == "Corrupt" else "no book of them") in said.message
    assert again._service is None
    assert (folder / "home-1").read_bytes() == b"precious"


def power_cycle(rack: Rack, gates: Gates, tmp_path: Path, name: str) -> Gate:
    """A new agent, which finds of what Hotpot had on its blade only what is on its device, if there is one."""
    folder = tmp_path / f"media-{name}"
    gates[name].close()
    shutil.rmtree(folder, ignore_errors=True)
    if (tmp_path / f"device-{name}").exists():
        plug(tmp_path / f"device-{name}")
        media.use_pmem(folder)
    rack.restart(name, list(gates).index(name))
    gate = gates[name] = Gate(rack[name].tier, folder, tmp_path / f"{name}.hotpot")
    rack[name].server._handlers.update(gate.handlers())  # type: ignore[attr-defined]
    gate.start()
    return gate


@pytest.mark.long
def test_after_a_power_failure_a_blade_with_pmem_has_its_datasets_again(
    rack: Rack, gates: Gates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without anybody on that blade asking, though its folder is empty."""
    (tmp_path / "device-mb1").mkdir()
    monkeypatch.setattr(pmem, "FILE", tmp_path / "device-mb1" / media.DEVICE)
    power_cycle(rack, gates, tmp_path, "mb1")  # this one finds a device that was never used
    with shells(Place(tmp_path / "mb0.hotpot")) as [shell]:
        shell.do("d = session.create('set', 3 * 4096, chunk=4096)")
        shell.do("d.memory[8192] = 7\nd.commit((8192, 1))")  # of the third blade, and nowhere else
        assert media.backing(tmp_path / "media-mb1") == "pmem"
        again = power_cycle(rack, gates, tmp_path, "mb1")
        eventually(lambda: again._service is not None and all(home.ready for home in again._service.owner.homes()))
        with shells(Place(tmp_path / "mb1.hotpot")) as [other]:
            assert other.do("session.open('set').memory[8192]") == 7
        shell.do("d.close()")


@pytest.mark.long
def test_after_a_power_failure_of_the_manager_others_wake_hotpot_there(
    rack: Rack, gates: Gates, tmp_path: Path
) -> None:
    """It has no media any more, and no program connects there; the book is on the other blades."""
    with shells(Place(tmp_path / "mb0.hotpot")) as [shell]:
        shell.do("d = session.create('set', 4096, owners=[2])")
        shell.do("d.memory[0] = 7\nd.commit((0, 1))")
        again = power_cycle(rack, gates, tmp_path, "gm0")
        for name in ("mb0", "mb1"):
            gates[name].service().lease._until = 0.0  # so that nobody has to wait until it ends by itself
        eventually(lambda: again._service is not None and all(gates[name].service().lease.valid for name in gates))
        shell.do("d.memory[0] = 8\nd.commit((0, 1))")
        assert shell.do("[one['name'] for one in session.datasets()]") == ["set"]
        shell.do("d.close()")


def test_a_dataset_can_be_made_after_a_power_failure_of_a_blade_that_had_hotpot(
    rack: Rack, gates: Gates, tmp_path: Path
) -> None:
    """It has nothing that it could come back for, but it can own chunks again."""
    with shells(Place(tmp_path / "mb0.hotpot")) as [shell]:
        shell.do("session.create('first', 3 * 4096, chunk=4096).close()")
        power_cycle(rack, gates, tmp_path, "mb1")
        dispatcher = gates["gm0"].service()._dispatcher
        assert dispatcher is not None
        dispatcher.heard[3] = float("-inf")  # as if it had been off for long
        shell.do("session.create('second', 3 * 4096, chunk=4096).close()")
        owners = shell.do("{one['name']: one['owners'] for one in session.datasets()}")
        assert owners["second"] == [1, 2, 3]


def test_a_blade_that_is_away_gets_no_chunks(rack: Rack, gates: Gates, tmp_path: Path) -> None:
    with shells(Place(tmp_path / "mb0.hotpot")) as [shell]:
        shell.do("session.create('first', 3 * 4096, chunk=4096).close()")
        gates["mb1"].close()
        rack["mb1"].server._handlers["hotpot.start"] = lambda _request: {}  # type: ignore[index]
        dispatcher = gates["gm0"].service()._dispatcher
        assert dispatcher is not None
        dispatcher.heard[3] = float("-inf")
        shell.do("session.create('second', 3 * 4096, chunk=4096).close()")
        owners = shell.do("{one['name']: one['owners'] for one in session.datasets()}")
        assert owners["second"] == [1, 2]


def command(rack: Rack, monkeypatch: pytest.MonkeyPatch, *words: str) -> Any:
    """What `rackless hotpot ...` does."""
    specs = {name: SimpleNamespace(mgmt_address=blade.address) for name, blade in rack.blades.items()}
    paths = SimpleNamespace(
        settings=SimpleNamespace(status_seconds=5.0), blade=lambda name: SimpleNamespace(console=Path(name))
    )
    current = SimpleNamespace(
        paths=paths, select=lambda names: {name: specs[name] for name in names} if names else specs
    )
    monkeypatch.setattr(cli, "current_rack", lambda _rack: current)
    monkeypatch.setattr(agents, "client", lambda _paths, address, timeout: control.ControlClient(
        (address, rack.port), SECRET, timeout))  # fmt: skip
    app = typer.Typer()
    cli.register(app)
    done = CliRunner().invoke(app, ["hotpot", *words], catch_exceptions=False)
    assert done.exit_code == 0
    return done


def test_the_command_shows_what_blades_have(
    rack: Rack, gates: Gates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = command(rack, monkeypatch, "stat").stdout.splitlines()[1:]
    assert [row.split()[1:] for row in rows] == [["-"] * 17] * 3
    assert json.loads(command(rack, monkeypatch, "list", "--json").stdout) == []
    with shells(Place(tmp_path / "mb0.hotpot")) as [shell]:
        shell.do("d = session.create('set', 3 * 4096, chunk=4096)")
        shell.do("d.memory[0] = d.memory[8192] = 7\nd.commit((8192, 1), replicas=3)")
        head, *rows = (line.split() for line in command(rack, monkeypatch, "stat", "mb0", "mb1").stdout.splitlines())
        mb0, mb1 = (dict(zip(head, row, strict=False)) for row in rows)
        assert [mb0[name] for name in ("dataset", "dirty", "committed", "fetches", "cow", "commits", "retries")] == [
            "set", "1", "1", "2", "2", "1", "0"]  # fmt: skip
        shown = [mb1[name] for name in ("dataset", "dirty", "committed", "faults", "commits")]
        assert shown == ["set", "0", "0", "-", "0"]
        [listed] = json.loads(command(rack, monkeypatch, "list", "--json").stdout)
        assert (listed["name"], listed["owners"], listed["open"]) == ("set", ["gm0", "mb0", "mb1"], ["mb0"])
        assert "gm0 mb0 mb1" in command(rack, monkeypatch, "list").stdout
        shell.do("d.close()")
    rack["mb1"].server.kill()
    done = command(rack, monkeypatch, "stat")
    assert done.stderr.startswith("mb1: ")
    assert done.stdout.splitlines()[-1].split()[0] == "mb1"
