"""`rackless vnode`, `ps`, `kill` and `run --vnode`: stand-in blades, and real managers behind the agents' port."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from guest_agents import control
from orchestrator.network.namespace import inside
from orchestrator.ssh.keys import ensure_secret
from tests.unit.split_blades import Rack, eventually
from tests.unit.stand_in import StandInRack
from tests.unit.stand_in_rackless import Rackless

pytestmark = [pytest.mark.long, pytest.mark.netns]
OPS = ("vnode.create", "vnode.delete", "vnode.list", "program.place", "program.list", "process.kill")


@pytest.fixture(scope="module")
def managers(stand_in_rack: StandInRack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rack]:
    """Agents with the names of the stand-in blades, which hand them what the host asks of theirs."""
    rack = Rack(tmp_path_factory.mktemp("managers"), list(stand_in_rack.blades))
    servers = []

    def handed(blade: str, op: str) -> control.Handler:
        return lambda request: rack[blade].call(op, **{key: value for key, value in request.items() if key != "op"})

    for blade in ("gm0", "pb0"):
        address = (stand_in_rack.blades[blade], stand_in_rack.paths.settings.control_port)
        handlers = {op: handed(blade, op) for op in OPS}
        make = partial(control.Server, address, ensure_secret(stand_in_rack.paths), handlers)
        servers.append(inside(stand_in_rack.paths.name, make))
        servers[-1].start()
    yield rack
    for server in servers:
        server.close()
    rack.close()


@pytest.fixture
def vnode(rackless: Rackless) -> Callable[..., Any]:
    """Runs `rackless vnode WORD ... --rack RACK`."""

    def run(word: str, *words: str, check: bool = True) -> Any:
        command = [*rackless.command("vnode")[:-2], word, "--rack", rackless.rack.paths.name, *words]
        done = subprocess.run(command, env=rackless.environment, cwd=rackless.folder, capture_output=True, text=True,
                              timeout=60, check=False)  # fmt: skip
        assert not check or done.returncode == 0, done.stderr
        return done

    return run


def test_a_vnodes_life(managers: Rack, rackless: Rackless, vnode: Callable[..., Any]) -> None:
    made = json.loads(vnode("create", "web", "--processors", "pb0", "--memory", "mb0,mb1", "--placement", "most-free",
                            "--json").stdout)  # fmt: skip
    assert (made["id"], made["memory"], made["placement"], made["storage"]) == (1, ["mb0", "mb1"], "most-free", None)
    assert "run programs in it: rackless run --vnode db -- CMD" in vnode("create", "db").stdout
    assert [line.split()[0] for line in vnode("list").stdout.splitlines()] == ["vnode", "default", "web", "db"]
    assert [v["name"] for v in json.loads(vnode("list", "--json").stdout)] == ["default", "web", "db"]
    assert "memory:     mb0, mb1\n" in vnode("show", "web").stdout
    assert json.loads(vnode("show", "web", "--json").stdout)["programs"] == 0
    done = rackless("run", "--vnode", "web", "--env", "A=b c", "--", "sh", "-c", "pwd; echo $RACKLESS_VNODE $A; exit 5")
    assert (done.returncode, done.stdout) == (5, f"{rackless.vnode}\nweb b c\n")
    (rackless.vnode / "sub").mkdir()
    assert rackless("run", "--vnode", "web", "--cwd", "sub", "pwd").stdout == f"{rackless.vnode}/sub\n"
    assert rackless("run", "--cwd", "sub", "pwd").stdout == f"{rackless.vnode}/sub\n"  # placed, in the default vNode
    assert "deleted; its files are kept" in vnode("delete", "web").stdout
    assert json.loads(vnode("delete", "db", "--json").stdout) == {"deleted": "db"}


def test_ps_and_kill(managers: Rack, rackless: Rackless) -> None:
    process = subprocess.Popen(["sleep", "600"])
    split = managers["pb0"].ask("job - default")
    split.ask(f"began {process.pid} sleep 600")
    name = f"pb0.{process.pid}"
    eventually(lambda: name in managers.programs())
    shown = rackless("ps").stdout.splitlines()
    assert shown[0].split() == ["id", "vnode", "state", "code", "seconds", "command"]
    assert shown[1].split()[:4] == [name, "default", "running", "-"]
    assert rackless("kill", name, "INT").returncode == 0
    assert process.wait(10) == -2
    split.close()
    eventually(lambda: managers.programs()[name] == "exited")
    assert json.loads(rackless("ps", "--json").stdout) == []
    assert [p["id"] for p in json.loads(rackless("ps", "--all", "--json").stdout)] == [name]


@pytest.mark.parametrize(
    ("words", "error", "hint"),
    [
        (("run", "--vnode", "wen", "true"), "there is no vNode 'wen'", "there are: "),
        (("run", "--vnode", "default", "--on", "mb0", "true"), "mb0 is a memory blade", "processor blades: pb0"),
        (("run", "--env", "A", "true"), "--env: 'A' is not NAME=VALUE", "LC_ALL=C"),
        (("ps", "--vnode", "wen"), "there is no vNode 'wen'", "there are: "),
        (("kill", "1234"), "1234 is not the ID of a program", "rackless ps"),
        (("kill", "pb0.1"), "no program pb0.1 runs on pb0", "rackless ps"),
        (("kill", "pb0.1", "BANG"), "there is no signal 'BANG'", "KILL"),
        (("kill", "pb9.1"), "no blade pb9 in rack", "did you mean"),
    ],
)  # fmt: skip
def test_bad_input_is_a_line_and_a_hint(
    managers: Rack, rackless: Rackless, words: tuple[str, ...], error: str, hint: str
) -> None:
    assert_refused(rackless(*words), error, hint)


@pytest.mark.parametrize(
    ("words", "error", "hint"),
    [
        (("create", "web", "--memory", "mb7"), "there is no blade mb7", "did you mean mb"),
        (("create", "web", "--memory", "mb0,,mb1"), "has an empty name in it", "mb0,mb1"),
        (("create", "web", "--processors", "gm0"), "gm0 is a manager blade, not a processor blade", "pb0"),
        (("create", "Web!"), "'Web!' cannot name a vNode", "a-z"),
        (("create", "web", "--placement", "best"), "there is no placement 'best'", "most-free"),
        (("delete", "wen"), "there is no vNode 'wen'", "the default one"),
        (("show", "wen"), "there is no vNode 'wen'", "the default one"),
    ],
)  # fmt: skip
def test_a_vnode_that_makes_no_sense(
    managers: Rack, vnode: Callable[..., Any], words: tuple[str, ...], error: str, hint: str
) -> None:
    assert_refused(vnode(*words, check=False), error, hint)


def assert_refused(done: Any, error: str, hint: str) -> None:
    assert done.returncode == 1
    first, second, *more = done.stderr.splitlines()
    assert first.startswith("error: ")
    assert error in first
    assert second.startswith("hint: ")
    assert hint in second
    assert "Traceback" not in str(more)
