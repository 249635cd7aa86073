"""What is printed: plain lines, the live board, errors and tables. And the settings."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator import ui
from orchestrator.board import Board, LiveBoard
from orchestrator.errors import RacklessError
from orchestrator.events import Event, Note, Step, step
from orchestrator.settings import RackPaths, Settings


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (Step("demo", "restore", "done", "mb0", seconds=0.84), "[  3.2s] mb0 restore done (0.8 s)"),
        (Step("demo", "network", "start"), "[  3.2s] demo network start"),
        (Step("demo", "image", "progress", fraction=0.5), None),
        (Step("demo", "image", "progress", message="unpack"), "[  3.2s] demo image: unpack"),
        (
            Step("demo", "ready", "fail", "pb0", None, "no answer", 20.0),
            "[  3.2s] pb0 ready fail (20.0 s): no answer",
        ),
        (Note("accelerator: tcg"), "[  3.2s] accelerator: tcg"),
    ],
)
def test_plain_lines(event: Event, line: str | None) -> None:
    assert ui.plain_line(event, 3.21) == line


def test_a_step_tells_its_start_its_end_and_its_time() -> None:
    events: list[Event] = []
    with step(events.append, "demo", "restore", "mb0") as report:
        report(0.5, "half")
    with pytest.raises(RacklessError), step(events.append, "demo", "ready", "mb0"):
        raise RacklessError("no answer\nreally")
    states = [(event.phase, event.state, event.message) for event in events if isinstance(event, Step)]
    assert states == [
        ("restore", "start", None),
        ("restore", "progress", "half"),
        ("restore", "done", None),
        ("ready", "start", None),
        ("ready", "fail", "no answer"),
    ]
    assert isinstance(events[2], Step)
    assert events[2].seconds is not None


@pytest.mark.parametrize("json", [False, True])
def test_progress_without_a_terminal_is_lines(json: bool) -> None:
    stream = io.StringIO() if not json else Terminal()
    with ui.progress("demo", json=json, stream=stream) as emit:
        threads = [threading.Thread(target=emit, args=(Note(f"note {n}"),)) for n in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    lines = stream.getvalue().splitlines()
    assert sorted(line.split("] ")[1] for line in lines) == sorted(f"note {n}" for n in range(20))
    assert "\x1b" not in stream.getvalue()


def test_progress_on_a_terminal_is_a_board(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with ui.progress("demo", stream=stream) as emit:
        emit(Note("accelerator: [tcg]"))
        emit(Step("demo", "restore", "start", "mb0"))
    text = stream.getvalue()
    assert "accelerator: [tcg]" in text
    assert "mb0" in text
    assert text.endswith("\x1b[?25h")  # the cursor is back


def test_the_cursor_comes_back_after_an_error() -> None:
    stream = Terminal()
    with pytest.raises(KeyboardInterrupt), LiveBoard("demo", stream):
        raise KeyboardInterrupt
    assert stream.getvalue().endswith("\x1b[?25h")


def test_the_rows_of_a_board(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    board = Board("demo")
    board.apply(Step("demo", "restore", "start", "mb0"))
    clock[0] = 101.5
    board.apply(Step("demo", "agent", "done", "mb0", 1.0, None, 1.5))
    board.apply(Step("demo", "network", "start"))
    clock[0] = 103.0
    board.apply(Step("demo", "ready", "fail", "pb0", None, "no [answer]", 20.0))
    stream = io.StringIO()
    Console(file=stream, width=100).print(board)
    lines = stream.getvalue().splitlines()
    assert lines[0].split()[:2] == ["✓", "mb0"]
    assert lines[0].split()[3:] == ["1.5", "s", "agent"]
    assert lines[1].split()[3:] == ["1.5", "s", "network"]
    assert lines[2].split()[:2] == ["✗", "pb0"]
    assert "no [answer]" in lines[2]


def test_errors() -> None:
    plain, terminal = io.StringIO(), Terminal()
    error = RacklessError("no tun\nno kvm", hint="load the module", log=Path("/var/log/x"))
    ui.print_error(error, plain)
    assert plain.getvalue() == "error: no tun\nerror: no kvm\nhint: load the module\nlog: /var/log/x\n"
    ui.print_error(RacklessError("no tun"), terminal)
    assert terminal.getvalue() == "\x1b[31merror:\x1b[0m no tun\n"


def test_tables() -> None:
    stream = io.StringIO()
    ui.table(["name", "cpus", "address"], [["gm0", 1, "10.78.0.10"], ["processor0", 12, None]], stream)
    assert stream.getvalue().splitlines() == [
        "name        cpus  address",
        "gm0            1  10.78.0.10",
        "processor0    12  -",
    ]
    ui.table(["name"], [], stream)
    assert stream.getvalue().endswith("\nname\n")


def test_rich_is_imported_only_for_a_terminal() -> None:
    code = (
        "import sys, orchestrator.ui, orchestrator.settings; print({'rich', 'pydantic'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["set()"]


def test_settings_from_the_environment(tmp_path: Path) -> None:
    usual = Settings.from_environment({"HOME": "/home/x"})
    assert (usual.libvirt_uri, usual.accelerator, usual.control_port) == ("private", "auto", 7070)
    chosen = Settings.from_environment(
        {"RACKLESS_CACHE": "here", "RACKLESS_STATE": str(tmp_path), "RACKLESS_ACCEL": "kvm"}
    )
    assert chosen.cache_dir == Path.cwd() / "here"
    assert chosen.accelerator == "kvm"
    with pytest.raises(RacklessError, match="not an accelerator"):
        Settings.from_environment({"RACKLESS_ACCEL": "warp"})
    blade = RackPaths(chosen, "demo").blade("mb1")
    assert blade.pmem == tmp_path / "racks/demo/blades/mb1/pmem.raw"


def test_waits_are_longer_under_tcg() -> None:
    kvm = Settings.from_environment({})
    tcg = kvm.scaled("tcg")
    assert kvm.scaled("kvm") == kvm
    assert tcg.boot_seconds > 4 * kvm.boot_seconds
    assert tcg.lock_seconds == kvm.lock_seconds
