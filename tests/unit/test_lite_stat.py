"""`rackless lite stat` on all of LITE but the hardware: its figures against what programs did in the meantime."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from guest_agents import control, lite
from orchestrator import agents
from orchestrator.cli import lite as command
from tests.unit import lite_pair
from tests.unit.lite_blades import SECRET, Rack, eventually
from tests.unit.lite_stack import whole

pytestmark = pytest.mark.skipif(lite_pair.missing() is not None, reason=str(lite_pair.missing()))
Run = Callable[..., Any]


@pytest.fixture
def rack(tmp_path: Path, lite_core: Path) -> Iterator[Rack]:
    with whole(tmp_path, lite_core, "gm0", "pb0", "mb0") as made:
        yield made


@pytest.fixture
def run(rack: Rack, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command; `meanwhile` happens between its two looks."""
    specs = {name: SimpleNamespace(mgmt_address=blade.address) for name, blade in rack.blades.items()}
    paths = SimpleNamespace(
        settings=SimpleNamespace(status_seconds=5.0), blade=lambda name: SimpleNamespace(console=Path(name))
    )
    current = SimpleNamespace(
        paths=paths, select=lambda names: {name: specs[name] for name in names} if names else specs
    )
    monkeypatch.setattr(command, "current_rack", lambda _rack: current)
    monkeypatch.setattr(agents, "client", lambda _paths, address, timeout: control.ControlClient(
        (address, rack.port), SECRET, timeout))  # fmt: skip

    def run(*words: str, meanwhile: Callable[[], None] = lambda: None) -> Any:
        monkeypatch.setattr(command, "time", SimpleNamespace(sleep=lambda _seconds: meanwhile()))
        app = typer.Typer()
        command.register(app)
        done = CliRunner().invoke(app, ["lite", "stat", *words], catch_exceptions=False)
        assert done.exit_code == 0
        return done

    return run


def test_rates_are_what_programs_did_per_second(rack: Rack, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with lite.connect(str(rack["pb0"].tier.settings.socket)) as node:
        memory = node.malloc(1 << 20, on="mb0")
        memory.write(bytes(100))

        def work() -> None:
            for _ in range(40):
                memory.read(1000)
            for _ in range(20):
                memory.write(bytes(500))
            for _ in range(10):
                memory.fetch_add(0)

        call = agents.call
        looks: dict[str, int] = {}

        def on_time(paths: Any, blade: str, *rest: Any) -> dict[str, Any]:
            looks[blade] = looks.get(blade, 0) + 1
            return {**call(paths, blade, *rest), "monotonic": 4.0 * looks[blade]}

        monkeypatch.setattr(agents, "call", on_time)
        found = json.loads(run("--json", meanwhile=work).stdout)
        assert list(found) == ["gm0", "pb0", "mb0"]
        idle = dict.fromkeys(command.RATES, 0.0)
        assert found["mb0"]["rates"] == found["gm0"]["rates"] == idle, "the remote processor takes no part"
        assert found["pb0"]["rates"] == {
            **idle, "reads": 10.0, "writes": 5.0, "atomics": 2.5, "bytes_read": 10_000.0, "bytes_written": 2500.0
        }  # fmt: skip
        assert (found["pb0"]["lmrs"], found["pb0"]["handles"], len(found["pb0"]["clients"])) == (1, 1, 1)
        assert (found["mb0"]["lmrs"], found["mb0"]["handles"]) == (0, 0)
        assert (found["mb0"]["memory"]["blocks"], found["mb0"]["memory"]["bytes_allocated"]) == (1, 1 << 20)
        assert found["pb0"]["memory"]["blocks"] == 0
        assert found["pb0"]["core"]["queue_pairs"] == 4 * 3, "four to each blade, itself included"


def test_the_table(rack: Rack, run: Run) -> None:
    with lite.connect(str(rack["pb0"].tier.settings.socket)) as node:
        node.malloc(3 << 20, on="mb0")
        head, *rows = [line.split("  ") for line in run("pb0", "mb0").stdout.splitlines()]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in (head, *rows)]
    names = cells[0]
    pb0, mb0 = (dict(zip(names, row, strict=True)) for row in cells[1:])
    assert (pb0["blade"], pb0["lmrs"], pb0["handles"], pb0["clients"], pb0["qps"]) == ("pb0", "1", "1", "1", "12")
    assert (mb0["blade"], mb0["blocks"], mb0["MiB used"], mb0["MiB total"]) == ("mb0", "1", "3.0", "64.0")
    assert {mb0[name] for name in names if name.endswith("/s")} == {"0.0"}


def test_a_blade_that_does_not_answer_is_named_and_the_others_are_shown(rack: Rack, run: Run) -> None:
    rack["mb0"].kill()
    done = run()
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["blade", "gm0", "pb0", "mb0"]
    assert set(done.stdout.splitlines()[3].split()[1:]) == {"-"}
    assert done.stderr.startswith("mb0: ")
    found = json.loads(run("--json").stdout)
    assert set(found["mb0"]) == {"error"}
    assert found["pb0"]["rates"]["reads"] == 0.0


def test_an_agent_that_was_restarted_in_between_has_no_rates(rack: Rack, run: Run) -> None:
    def restart() -> None:
        rack.restart("mb0", 2)

    found = json.loads(run("--json", meanwhile=restart).stdout)
    assert found["mb0"]["rates"] == dict.fromkeys(command.RATES, None)
    assert found["pb0"]["rates"]["reads"] == 0.0
    rows = run(meanwhile=lambda: rack["mb0"].kill()).stdout.splitlines()
    assert rows[3].split()[0] == "mb0"


def test_the_figures_are_those_of_the_core(rack: Rack, run: Run) -> None:
    """What programs hold is shown as long as they hold it, and not longer."""
    with lite.connect(str(rack["mb0"].tier.settings.socket)) as server, server.register(7):
        with lite.connect(str(rack["pb0"].tier.settings.socket)) as node:
            held = [node.malloc(64, on="mb0") for _ in range(5)]
            held.pop().unmap()
            with node.buffer(1 << 16), node.lock("door"):
                found = json.loads(run("--json").stdout)
        core = found["pb0"]["core"]
        assert (core["handles"], core["lmrs"], core["clients"], core["channels"]) == (4, 4, 1, 1)
        assert (core["buffers"], core["bytes_buffers"], found["pb0"]["locks_held"]) == (1, 1 << 16, 1)
        assert found["mb0"]["core"]["ports"] == 1
        eventually(lambda: not rack["pb0"].tier.clients.all() and rack["mb0"].tier.blocks.stat()["blocks"] == 0)
        after = json.loads(run("--json").stdout)["pb0"]
        assert (after["core"]["handles"], after["core"]["lmrs"], after["handles"], after["lmrs"]) == (0, 0, 0, 0)
        assert (after["core"]["buffers"], after["clients"], after["locks_held"]) == (0, [], 0)
