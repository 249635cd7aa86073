"""What `rackless` says when something is wrong: one clear line, a hint, an exit code, never a traceback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator.cli.main import main

ROOT = Path(__file__).parents[2]
COMMAND = Path(sys.executable).with_name("rackless")
RACK = """
name: tcli
blades:
  gm0: {kind: manager, memory: 256 MiB}
"""


@dataclass
class Done:
    """What a command did: as subprocess.CompletedProcess has it."""

    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Done]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    folders = {f"RACKLESS_{name}": str(tmp_path / name.lower()) for name in ("CACHE", "STATE", "RUN")}
    return {**os.environ, **folders, "RACKLESS_ACCEL": "tcg"}


@pytest.fixture
def process(environment: dict[str, str], tmp_path: Path) -> Run:
    """Runs the command as a process, in an empty folder, where no rack and no state is."""
    (tmp_path / "work").mkdir(exist_ok=True)

    def run(*arguments: str) -> Done:
        done = subprocess.run(
            [COMMAND, *arguments], cwd=tmp_path / "work", env=environment,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        return Done(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def rackless(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """The same in this process: half a second less for each command."""
    (tmp_path / "work").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "work")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def run(*arguments: str, **changes: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["rackless", *arguments])
        for name, value in changes.items():
            monkeypatch.setenv(name, value)
        try:
            code = main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        return Done(code, *capsys.readouterr())

    return run


@pytest.fixture
def rack(tmp_path: Path, rackless: Run) -> Path:
    file = tmp_path / "work/tcli.yml"
    file.write_text(RACK)
    return file


def errors(done: Done) -> list[str]:
    """The lines of an error, after checking that it is one."""
    assert done.returncode not in (0, 2), done
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert lines[0].startswith("error: ")
    assert len(lines) <= 3
    return lines


@pytest.mark.parametrize("command", ["plan", "up", "status", "down"])
def test_a_file_that_is_not_there(rackless: Run, command: str) -> None:
    assert "none.yml: there is no such file" in errors(rackless(command, "none.yml"))[0]


def test_the_command_itself(process: Run, rack: Path, tmp_path: Path) -> None:
    assert "none.yml: there is no such file" in errors(process("up", "none.yml"))[0]
    assert process("plan", "tcli.yml").returncode == 2
    (tmp_path / "state/racks/other").mkdir(parents=True)
    assert errors(process("down", "."))[0].startswith('error: "." cannot name a rack')
    assert (tmp_path / "state/racks/other").is_dir()


@pytest.mark.parametrize("command", ["plan", "up", "status", "down"])
def test_a_file_that_is_no_rack(rackless: Run, rack: Path, command: str) -> None:
    rack.write_text(RACK.replace("manager", "managr"))
    (line, *_) = errors(rackless(command, "./tcli.yml"))
    assert "tcli.yml:4: blades.gm0.kind" in line


@pytest.mark.parametrize("command", ["plan", "up"])
def test_a_recipe_that_is_not_there(rackless: Run, rack: Path, command: str) -> None:
    rack.write_text(RACK + "image: plan9\n")
    line, hint = errors(rackless(command, "tcli.yml"))
    assert "there is no image recipe called 'plan9'" in line
    assert "debian13" in hint


def test_memory_larger_than_the_host(rackless: Run, rack: Path, tmp_path: Path) -> None:
    rack.write_text(RACK.replace("256 MiB", "900 GiB"))
    assert "memory larger than the host" in errors(rackless("up", "tcli.yml"))[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["work"]  # nothing half made


def test_a_plan_of_a_rack_that_is_not_up(rackless: Run, rack: Path, tmp_path: Path) -> None:
    done = rackless("plan", "tcli.yml")
    assert (done.returncode, done.stderr) == (2, "")
    assert done.stdout.splitlines()[-1] == "1 to create"
    plan = json.loads(rackless("plan", "--json", "tcli.yml").stdout)
    assert [action["action"] for action in plan["actions"]] == ["create"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["work"]  # planning makes nothing


def test_the_status_of_a_rack_that_is_not_up(rackless: Run, rack: Path) -> None:
    done = rackless("status", "tcli.yml")
    assert (done.returncode, done.stderr) == (0, "")
    assert "tcli is not up" in done.stdout
    assert json.loads(rackless("status", "--json", "tcli.yml").stdout)["blades"] == []
    assert json.loads(rackless("status", "--json", "tcli").stdout)["rack"] == "tcli"  # by its name


def test_taking_down_what_is_not_up(rackless: Run, rack: Path) -> None:
    for _ in range(2):
        done = rackless("down", "tcli.yml", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == {"rack": "tcli", "removed": []}


@pytest.mark.parametrize("name", ["..", ".", "", "Up", "a b", "x" * 200])
@pytest.mark.parametrize("command", ["status", "down"])
def test_what_cannot_be_the_name_of_a_rack(rackless: Run, tmp_path: Path, command: str, name: str) -> None:
    (tmp_path / "state/racks/other").mkdir(parents=True)
    errors(rackless(command, name))
    assert (tmp_path / "state/racks/other").is_dir()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [(["plna"], "plna"), (["plan", "--jsn"], "--jsn"), (["up", "a.yml", "b.yml"], "b.yml"), (["image"], "Usage")],
)
def test_wrong_usage(rackless: Run, arguments: list[str], text: str) -> None:
    done = rackless(*arguments)
    assert done.returncode == 2
    assert text in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("variable", "text"), [("RACKLESS_ACCEL", "xen")])
def test_a_bad_setting(rackless: Run, rack: Path, variable: str, text: str) -> None:
    assert text in errors(rackless("plan", "tcli.yml", **{variable: text}))[0]


@pytest.mark.parametrize("command", ["up", "down"])
def test_a_state_folder_that_is_a_file(rackless: Run, rack: Path, tmp_path: Path, command: str) -> None:
    (tmp_path / "state").touch()
    assert str(tmp_path / "state") in errors(rackless(command, "tcli.yml"))[0]


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root, to give it up")
@pytest.mark.parametrize(("words", "told"), [(["down", "tcli"], "ermission"), (["up", "work/tcli.yml"], "needs root")])
def test_without_root(environment: dict[str, str], rack: Path, tmp_path: Path, words: list[str], told: str) -> None:
    (tmp_path / "state").mkdir(mode=0o755)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_mode & 0o005 != 0o005 and folder.is_relative_to("/tmp") and folder != Path("/tmp"):
            folder.chmod(0o755)
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", COMMAND, *words],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    if "Permission denied" in done.stderr and str(ROOT) in done.stderr:
        pytest.skip("this checkout is not readable for others")
    assert told in errors(Done(done.returncode, done.stdout, done.stderr))[0]


def test_images_in_an_empty_cache(rackless: Run) -> None:
    done = rackless("image", "list", "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, [])
    assert "there is no image recipe called 'plan9'" in errors(rackless("image", "build", "plan9"))[0]
    assert "no flavour 'big'" in errors(rackless("image", "build", "--flavour", "big"))[0]
    assert rackless("image", "clean").returncode == 0


def test_damaged_entries_of_the_cache_are_shown(rackless: Run, tmp_path: Path) -> None:
    entry = tmp_path / "cache/images/system-0123"
    entry.mkdir(parents=True)
    (entry / "vmlinux").write_bytes(b"x" * 9)
    shown = json.loads(rackless("image", "list", "--json").stdout)
    assert shown == [{"name": "system-0123", "bytes": 9, "state": "corrupt"}]


def test_nothing_is_left_over(rackless: Run) -> None:
    """Although other racks may run on this host, whose namespaces have names like ours."""
    done = rackless("gc")
    assert (done.returncode, done.stdout, done.stderr) == (0, "nothing is left over\n", "")
    assert json.loads(rackless("gc", "--json").stdout) == []


# Stands for an `up` in which all blades are being made when the user presses Ctrl-C.
INTERRUPTED = """
import os, signal, sys, threading, time
from orchestrator import engine
from orchestrator.cli.main import main
from orchestrator.parallel import together

def up(settings, rack, emit, cold):
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    together({"mb0": 30, "mb1": 30}, time.sleep)

engine.up = up
sys.argv = ["rackless", "up", "tcli.yml"]
sys.exit(main())
"""


def test_ctrl_c_is_prompt_and_says_how_to_go_on(environment: dict[str, str], rack: Path) -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], cwd=rack.parent,
                          env={**environment, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=20, check=False)  # fmt: skip
    assert done.returncode == 128 + signal.SIGINT
    assert "interrupted; `rackless up` goes on from here" in done.stderr
    assert "Traceback" not in done.stderr
