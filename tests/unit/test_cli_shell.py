"""ssh, exec, cp, console, logs, ssh-config and run, as a user meets them, on stand-in blades."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.cli.common import CurrentRack
from orchestrator.cli.console import relay
from orchestrator.cli.copy import Place
from orchestrator.errors import RacklessError
from orchestrator.plan import Observed
from orchestrator.settings import RackPaths, Settings
from tests.unit.stand_in import blade_specs
from tests.unit.stand_in_rackless import ROOT, Rackless

pytestmark = pytest.mark.long


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


# ssh


@pytest.mark.netns
def test_ssh_runs_a_command_with_its_streams_and_exit_code(rackless: Rackless) -> None:
    done = rackless("ssh", "pb0", "--", "cat; echo err >&2; exit 9", input="in\n")
    assert (done.stdout, done.stderr, done.returncode) == ("in\n", "err\n", 9)


@pytest.mark.netns
def test_ssh_needs_no_dashes_and_keeps_arguments_apart(rackless: Rackless) -> None:
    done = rackless("ssh", "pb0", "printf", "%s|", "a b", "-c", "$HOME")
    assert done.stdout == "a b|-c|$HOME|"


@pytest.mark.netns
@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["pb1"], "no blade pb1 in rack", "did you mean pb0?"),
        (["nothing"], "no blade nothing in rack", "there are: gm0, mb0, mb1, pb0"),
        (["--rack", "other", "pb0"], "rack other is not up", "rackless up"),
        (["--rack", "no/such.yml", "pb0"], "no/such.yml", ""),
    ],
)
def test_errors_are_one_line_with_a_hint(rackless: Rackless, arguments: list[str], message: str, hint: str) -> None:
    done = rackless("ssh", *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert hint in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.netns
def test_a_paused_blade_is_named_as_such(rackless: Rackless) -> None:
    rackless.set_paused("mb0")
    assert "blade mb0 is paused" in rackless("ssh", "mb0").stderr


# exec


@pytest.mark.netns
def test_exec_prefixes_output_and_returns_the_worst_exit_code(rackless: Rackless) -> None:
    done = rackless("exec", "-k", "memory", "--", "echo one; echo $BLADE >&2; [ $BLADE = mb0 ] || exit 5")
    assert sorted(done.stdout.splitlines()) == ["mb0 | one", "mb1 | one"]
    assert sorted(done.stderr.splitlines()) == ["mb0 | mb0", "mb1 | mb1"]
    assert done.returncode == 5


@pytest.mark.netns
def test_exec_chooses_by_pattern_and_all_by_default(rackless: Rackless) -> None:
    chosen = rackless("exec", "mb*", "gm0", "--json", "--", "printf", "%s", "a  b")
    results = json.loads(chosen.stdout)["results"]
    assert [(result["blade"], result["stdout"]) for result in results] == [
        ("gm0", "a  b"), ("mb0", "a  b"), ("mb1", "a  b"),
    ]  # fmt: skip
    assert len(rackless("exec", "--", "echo").stdout.splitlines()) == 4


@pytest.mark.netns
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mb0"], "no command to run"),
        (["xx*", "--", "true"], "no blade xx* in rack"),
        (["-k", "storage", "--", "true"], "no such storage blade runs in rack"),
    ],
)
def test_exec_errors(rackless: Rackless, arguments: list[str], message: str) -> None:
    done = rackless("exec", *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr


@pytest.mark.netns
def test_exec_that_is_interrupted_ends_at_once(rackless: Rackless) -> None:
    process = rackless.start("exec", "mb*", "--", "echo ready; exec sleep 600")
    assert process.stdout is not None
    assert process.stdout.readline().endswith(b"ready\n")
    assert process.stdout.readline().endswith(b"ready\n")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert process.stderr is not None
    assert b"Traceback" not in process.stderr.read()


# cp


@pytest.mark.netns
def test_cp_there_across_and_back(rackless: Rackless) -> None:
    folder, data = rackless.folder, os.urandom(200_000)
    (folder / "a file").write_bytes(data)
    assert rackless("cp", "a file", f"pb0:{folder}/on pb0").returncode == 0
    assert rackless("cp", f"pb0:{folder}/on pb0", f"mb0:{folder}/on mb0").returncode == 0
    done = rackless("cp", "--json", f"mb0:{folder}/on mb0", "back")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["destination"] == "back"
    assert (folder / "back").read_bytes() == data


@pytest.mark.netns
def test_cp_copies_folders_and_several_files(rackless: Rackless) -> None:
    folder = rackless.folder
    (folder / "tree" / "deep").mkdir(parents=True)
    (folder / "tree" / "deep" / "leaf").write_text("leaf")
    (folder / "x:y").write_text("colon")
    (folder / "there").mkdir()
    done = rackless("cp", "-r", "tree", "./x:y", f"pb0:{folder}/there")
    assert done.returncode == 0, done.stderr
    assert (folder / "there" / "tree" / "deep" / "leaf").read_text() == "leaf"
    assert (folder / "there" / "x:y").read_text() == "colon"


@pytest.mark.netns
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["only"], "cp needs a source and a destination"),
        (["missing", "pb0:/tmp/"], "there is no file missing on this host"),
        (["pb0:/missing", "."], "/missing: No such file or directory"),
        (["facts.json", "pb9:/tmp/"], "no blade pb9 in rack"),
        (["facts.json", "copy"], "cp needs a blade on one side"),
        (["vnode", "pb0:/tmp/"], "vnode is a folder"),
        (["x:y", "pb0:/tmp/"], "for the file on this host write ./x:y"),
    ],
)
def test_cp_errors(rackless: Rackless, arguments: list[str], message: str) -> None:
    (rackless.folder / "x:y").write_text("")
    done = rackless("cp", *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "place", "for_scp"),
    [
        ("file", Place("file"), "./file"),
        ("-x", Place("-x"), "./-x"),
        ("/a:b", Place("/a:b"), "/a:b"),
        ("./a:b", Place("./a:b"), "./a:b"),
        ("pb0:/a:b", Place("/a:b", "pb0"), "pb0:/a:b"),
        ("pb0:", Place("", "pb0"), "pb0:"),
    ],
)
def test_places_of_files(text: str, place: Place, for_scp: str) -> None:
    assert Place.parse(text) == place
    assert place.for_scp() == for_scp


# console, logs, ssh-config


@pytest.mark.netns
def test_console_log(rackless: Rackless) -> None:
    log = rackless.rack.paths.blade("mb1").console
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"booting\r\nready \xff\r\n")
    assert rackless("console", "--log", "mb1").stdout == "booting\nready \N{REPLACEMENT CHARACTER}\n"
    assert "has not written to its console" in rackless("console", "--log", "mb0").stderr
    assert "no blade mb7" in rackless("console", "--log", "mb7").stderr
    assert "console needs a terminal" in rackless("console", "mb1").stderr


def test_the_console_joins_keyboard_and_screen_until_it_is_left() -> None:
    ours, blades = socket.socketpair()
    keyboard, typing = os.pipe()
    screen, shown = os.pipe()
    with ours, blades:
        thread = threading.Thread(target=relay, args=(ours, keyboard, shown))
        thread.start()
        blades.sendall(b"login: ")
        assert os.read(screen, 100) == b"login: "
        os.write(typing, b"root\r\x1dnot sent")
        thread.join(10)
        assert blades.recv(100) == b"root\r"
    for descriptor in (keyboard, typing, screen, shown):
        os.close(descriptor)


def write_logs(rackless: Rackless) -> Path:
    """Every blade sees these: stand-in blades share the host's files."""
    for agent, lines in {
        "agent": "2026-01-01_10:00:00.00001 up\n2026-01-01_10:00:02.00001 joined\n\ntraceback\n",
        "sshd": "2026-01-01_10:00:01.00001 listening\n",
    }.items():
        (rackless.logs / agent).mkdir(parents=True)
        (rackless.logs / agent / "current").write_text(lines)
    return rackless.logs / "agent" / "current"


@pytest.mark.netns
def test_logs_are_in_the_order_of_time_with_blade_and_agent(rackless: Rackless) -> None:
    write_logs(rackless)
    assert rackless("logs", "pb0").stdout.splitlines() == [
        "pb0 | agent: 2026-01-01_10:00:00.00001 up",
        "pb0 | sshd: 2026-01-01_10:00:01.00001 listening",
        "pb0 | agent: 2026-01-01_10:00:02.00001 joined",
        "pb0 | agent: ",
        "pb0 | agent: traceback",
    ]
    last = rackless("logs", "mb*", "--agent", "agent", "-n", "1", "--json").stdout.splitlines()
    assert sorted(json.loads(line)["blade"] for line in last) == ["mb0", "mb1"]
    assert {json.loads(line)["text"] for line in last} == {"traceback"}


@pytest.mark.netns
def test_logs_with_consoles_and_of_an_unknown_agent(rackless: Rackless) -> None:
    write_logs(rackless)
    log = rackless.rack.paths.blade("pb0").console
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("kernel: hello\n")
    assert "pb0 | console: kernel: hello\n" in rackless("logs", "--console", "pb0").stdout
    done = rackless("logs", "pb0", "--agent", "lite")
    assert done.returncode == 1
    assert done.stderr == "pb0 | no log of agent lite here: there are: agent sshd\n"


@pytest.mark.netns
def test_logs_that_are_followed_go_on_and_leave_nothing_behind(rackless: Rackless) -> None:
    current = write_logs(rackless)
    process = rackless.start("logs", "-f", "pb0", "--agent", "agent")
    assert process.stdout is not None
    lines = iter(process.stdout)
    assert next(lines) == b"pb0 | agent: 2026-01-01_10:00:00.00001 up\n"
    with current.open("a") as log:
        log.write("2026-01-01_10:00:09.00001 new\n")
    assert any(b" new\n" in line for line in lines)
    current.rename(current.with_name("@old"))  # as svlogd does
    current.write_text("2026-01-01_10:00:10.00001 newer\n")
    assert any(b" newer\n" in line for line in lines)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert process.stderr is not None
    assert process.stderr.read() == b""
    for stream in (process.stdout, process.stderr):
        stream.close()
    wait_until(lambda: not followers(current.parent.parent))


def followers(folder: Path) -> list[str]:
    """Command lines of tails that were started in `folder`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink() == folder and b"tail" in (process / "cmdline").read_bytes():
                found.append(process.name)
        except OSError:
            continue
    return found


@pytest.mark.netns
def test_ssh_config_prints_what_ssh_can_use(rackless: Rackless) -> None:
    text = rackless("ssh-config").stdout
    config = rackless.folder / "config"
    config.write_text(text)
    done = subprocess.run(
        ["ssh", "-F", config, "mb0", "echo $BLADE"], stdin=subprocess.DEVNULL, capture_output=True, check=True
    )
    assert done.stdout == b"mb0\n"
    about = json.loads(rackless("ssh-config", "--json").stdout)
    assert (about["text"], about["blades"]) == (text, ["gm0", "mb0", "mb1", "pb0"])


# completion


def test_selection_of_blades(tmp_path: Path) -> None:
    specs = blade_specs("demo", ("gm0", "pb0", "mb0", "mb1"))
    observed = {name: Observed(name, "running", spec) for name, spec in specs.items()}
    observed["mb1"] = Observed("mb1", "stopped", specs["mb1"])
    rack = CurrentRack("demo", RackPaths(Settings(tmp_path, tmp_path, tmp_path), "demo"), observed)
    assert list(rack.select()) == ["gm0", "pb0", "mb0"]
    assert list(rack.select(["mb*", "pb0"])) == ["pb0", "mb0"]
    assert list(rack.select(kind="memory")) == ["mb0"]
    with pytest.raises(RacklessError, match="blade mb1 is stopped"):
        rack.select(["mb1", "pb0"])


@pytest.mark.netns
def test_the_shell_completes_names_of_blades(rackless: Rackless) -> None:
    line = f"rackless ssh --rack {rackless.rack.paths.name} mb"
    typed = {"_RACKLESS_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": "4"}
    done = subprocess.run(
        rackless.command("ssh")[:4],
        env=rackless.environment | typed,
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["mb0", "mb1"], done.stderr
