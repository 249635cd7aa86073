"""`rackless top` on real agents' parts in one process: its figures against what programs did between two looks."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from guest_agents import control
from guest_agents.splitkernel.storage import wire
from guest_agents.splitkernel.storage.wire import Op
from orchestrator import agents
from orchestrator.cli import top as command
from orchestrator.errors import RacklessError
from orchestrator.rates import BUFFER_RATES, view
from tests.unit.paging_counters import write_counters
from tests.unit.split_blades import SECRET, Rack, Visitor, eventually

ROOT = Path(__file__).parents[2]
PAGE = 4096
MIB = 1 << 20
GIDHEX = "00000000000000000000ffff0a4d0001"
Run = Callable[..., Any]


@pytest.fixture
def rack(tmp_path: Path) -> Iterator[Rack]:
    made = Rack(tmp_path, ("gm0", "pb0", "mb0", "mb1", "sb0"))
    yield made
    made.close()


@pytest.fixture
def run(rack: Rack, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command; `meanwhile` is called between its looks, and the rack's clock goes on by 4 s then."""
    blades = {b.name: SimpleNamespace(kind=b.kind, mgmt_address=b.address) for b in rack.blades.values()}
    seen = {name: SimpleNamespace(state="running", spec=spec) for name, spec in blades.items()}
    paths = SimpleNamespace(settings=SimpleNamespace(status_seconds=5.0, max_workers=16))
    current = SimpleNamespace(name="demo", paths=paths, blades=seen, must_be_up=lambda: None, running=lambda: blades)
    monkeypatch.setattr(command, "current_rack", lambda _rack: current)
    clock = [100.0]

    class Client(control.ControlClient):
        def call(self, op: str, timeout: float | None = None, **fields: Any) -> control.Message:
            reply = super().call(op, timeout, **fields)
            return {**reply, "monotonic": clock[0]} if op == "agent.load" else reply

    def client(_paths: object, address: str, timeout: float) -> Client:
        return Client((address, rack.port), SECRET, timeout)

    monkeypatch.setattr(agents, "client", client)

    def run(*words: str, meanwhile: Callable[[], None] = lambda: None) -> Any:
        def sleep(_seconds: float) -> None:
            clock[0] += 4.0
            meanwhile()

        time = SimpleNamespace(sleep=sleep, time=lambda: 0.0, strftime=lambda *_: "12:00:00", localtime=lambda _t: None)
        monkeypatch.setattr(command, "time", time)
        app = typer.Typer()
        command.register(app)
        app.callback()(lambda: None)
        return CliRunner().invoke(app, ["top", *words], catch_exceptions=False)

    return run


class Program:
    """One that `split` has started on pb0: this process, with counters that a test writes."""

    def __init__(self, rack: Rack, excache: int = 4 * MIB) -> None:
        self.split = rack["pb0"].ask(f"job {excache} default")
        self.job = next(iter((rack.folder / "pb0.jobs").iterdir()))
        self.split.ask(f"began {os.getpid()} sort big.txt")
        self.pager = Visitor(rack["pb0"].desk_path)
        self.pager.ask(f"attach {os.getpid()} {self.job}")

    def counts(self, blades: dict[str, dict[str, int]], **values: int) -> None:
        write_counters(self.job, os.getpid(), blades, "sort", excache_bytes=4 * MIB, **values)

    def close(self) -> None:
        self.split.close()
        self.pager.close()


@pytest.fixture
def program(rack: Rack) -> Iterator[Program]:
    made = Program(rack)
    yield made
    made.close()


def test_rates_are_what_happened_per_second(rack: Rack, run: Run, program: Program) -> None:
    before = {"misses": 100, "reads": 100, "bytes_in": 1000 * PAGE, "evictions": 50, "faults": 400}
    program.counts({"mb0": {"misses": 100, "bytes_in": 1000 * PAGE}, "mb1": {}}, **before, pages_held=900)
    files = rack["sb0"].files
    out = memoryview(bytearray(1 << 16))

    def work() -> None:
        after = {"misses": 140, "reads": 140, "bytes_in": 1400 * PAGE, "evictions": 250, "faults": 800, "flushes": 20,
                 "writes": 4, "zero_fills": 8, "piggybacks": 2}  # fmt: skip
        program.counts({"mb0": {"misses": 120, "bytes_in": 1100 * PAGE}, "mb1": {"misses": 20, "flushes": 20}}, **after,
                       pages_held=800, pages_mapped=300, pages_pooled=100)  # fmt: skip
        for _ in range(12):
            files.handle(Op.GETATTR, memoryview(wire.encode("")), memoryview(b""), out)
        program.pager.ask(f"connect mb1 1 2 {GIDHEX}")
        for _ in range(3):
            program.pager.ask(f"region {4 * MIB} 1")

    look = json.loads(run("--json", meanwhile=work).stdout)
    (shown,) = look["programs"]
    assert (shown["id"], shown["command"], shown["excache"]) == (f"pb0.{os.getpid()}", "sort big.txt", 4 * MIB)
    assert (shown["excache_pages"], shown["bytes_held"]) == (400, 800 * PAGE)
    assert shown["working_set_at_most"] == (300 + 200) * PAGE, "mapped now, or evicted meanwhile"
    assert shown["rates"] == {"faults": 100.0, "misses": 10.0, "flushes": 5.0, "zero_fills": 2.0, "piggybacks": 0.5,
                              "evictions": 50.0, "bytes_in": 100.0 * PAGE, "bytes_out": 0.0}  # fmt: skip
    assert shown["request_rates"]["P2M_PCACHE_MISS"] == 10.0
    assert shown["counters"]["hit_ratio_of_faults"] == 0.825
    mb0, mb1 = look["memory"]
    assert (mb0["rates"]["misses"], mb0["rates"]["bytes_in"], mb0["regions"]) == (5.0, 25.0 * PAGE, 0)
    assert (mb1["rates"]["misses"], mb1["rates"]["flushes"], mb1["regions"]) == (5.0, 5.0, 3)
    assert (mb1["bytes_allocated"], mb1["requests"]["P2M_MMAP"]) == (12 * MIB, 3)
    assert (look["storage"][0]["rates"]["requests"], look["storage"][0]["request_rates"]) == (3.0, {"P2S_STAT": 3.0})
    assert [blade["error"] for blade in look["blades"]] == [None] * 5
    assert all(0 < blade["memory_used"] < blade["memory_total"] for blade in look["blades"])


def test_a_program_that_does_not_page_is_shown_without_figures(run: Run, program: Program) -> None:
    (shown,) = json.loads(run("--json").stdout)["programs"]
    names = ("excache_pages", "bytes_held", "working_set_at_most")
    assert [shown[name] for name in names] == [None] * 3
    assert shown["counters"]["managed"] == 0
    row = next(line for line in run("--once").stdout.splitlines() if line.startswith("pb0."))
    assert row.split()[1:4] == ["4.0", "-", "-"]


def test_the_managers_and_what_they_were_asked(rack: Rack, run: Run, program: Program) -> None:
    rack.host("vnode.create", name="web")
    eventually(lambda: rack.programs())
    books = rack["gm0"].line.books
    assert books is not None
    eventually(lambda: set(books.memory.loads()) == {"mb0", "mb1"})
    managers = json.loads(run("--json").stdout)["managers"]
    assert (managers["ready"], managers["process"]) == (True, {"pb0": {"programs": 1}})
    assert managers["storage"] == {"sb0": {"vnodes": 1}}
    assert {blade: known["free"] for blade, known in managers["memory"].items()} == {"mb0": 256 * MIB, "mb1": 256 * MIB}
    assert managers["requests"]["P2PM_REQUEST_VNODE"] == 1
    assert managers["requests"]["PM2P_BROADCAST_VNODE"] >= 5
    assert managers["requests"]["M2MM_STATUS_REPORT"] >= 2
    del program


def test_lines_with_nothing_running(run: Run) -> None:
    done = run("--once")
    assert done.exit_code == 0
    title, _, *rest = done.stdout.splitlines()
    assert title == "demo  12:00:00  no programs, in 2 s"
    assert [line.split()[0] for line in rest[1:6]] == ["gm0", "pb0", "mb0", "mb1", "sb0"]
    assert not any(line.startswith("program") for line in rest)
    assert "\x1b" not in done.stdout


def test_a_blade_that_does_not_answer_is_shown_with_the_reason(rack: Rack, run: Run) -> None:
    rack["mb0"].kill()
    look = json.loads(run("--json").stdout)
    errors = {blade["name"]: blade["error"] for blade in look["blades"]}
    assert {name for name, error in errors.items() if error} == {"mb0"}
    assert "no agent answers" in errors["mb0"]
    assert [blade["name"] for blade in look["memory"]] == ["mb1"]
    assert any("no agent answers" in line for line in run("--once").stdout.splitlines() if line.startswith("mb0"))


def test_a_blade_that_dies_between_two_looks_and_one_that_was_restarted(rack: Rack, run: Run) -> None:
    look = json.loads(run("--json", meanwhile=rack["mb0"].kill).stdout)
    assert {blade["name"] for blade in look["blades"] if blade["error"]} == {"mb0"}
    look = json.loads(run("--json", meanwhile=lambda: rack.restart("mb0", "sb0")).stdout)
    rates = {blade["name"]: blade["rates"]["misses"] for blade in look["memory"]}
    assert rates == {"mb0": None, "mb1": 0.0}
    assert look["storage"][0]["rates"]["requests"] is None


def test_an_older_agent_that_lacks_an_operation(rack: Rack, run: Run) -> None:
    del rack["sb0"].server._handlers["storage.stats"]  # type: ignore[attr-defined]
    look = json.loads(run("--json").stdout)
    assert look["storage"] == []
    assert "unknown operation" in next(blade["error"] for blade in look["blades"] if blade["name"] == "sb0")


def test_a_program_that_came_in_between_has_no_rates() -> None:
    load = {"life": "1", "monotonic": 1.0, "cpu_seconds": {"busy": 0.0, "all": 0.0}, "agent_cpu_seconds": 0.0,
            "cpus": 1, "memory_total": 2, "memory_free": 1}  # fmt: skip
    later = {**load, "monotonic": 3.0, "cpu_seconds": {"busy": 1.0, "all": 4.0}, "agent_cpu_seconds": 0.5}
    counted = {"requests": {"P2M_MMAP": 4}, "managed": 1, "pages_mapped": 5, "pages_pooled": 1, "pages_held": 9,
               "evictions": 3, "blades": {"mb0": {"misses": 7}}, "misses": 7}  # fmt: skip
    running = [{"id": "pb0.1", "started": 1.5, "counters": counted}]
    memory = {"kind": "memory", "load": load, "stats": {"requests": {}, "buffers": dict.fromkeys(BUFFER_RATES, 0)}}
    before = {"pb0": {"kind": "processor", "load": load, "stats": {"running": []}}, "mb0": memory}
    now = {"pb0": {"kind": "processor", "load": later, "stats": {"running": running}}, "mb0": {**memory, "load": later}}
    look = view(before, now)
    (shown,) = look["programs"]
    assert set(shown["rates"].values()) == {None}
    assert (shown["request_rates"], shown["working_set_at_most"]) == ({"P2M_MMAP": None}, None)
    assert look["memory"][0]["rates"]["misses"] == 0.0
    assert (look["blades"][0]["cpu_percent"], look["blades"][0]["agent_cpu_percent"]) == (25.0, 25.0)


def test_plain_lines_go_on_until_ctrl_c(run: Run) -> None:
    looks = []

    def meanwhile() -> None:
        looks.append(1)
        if len(looks) == 4:
            raise KeyboardInterrupt

    done = run(meanwhile=meanwhile)
    assert done.exit_code == 0
    assert done.stdout.count("programs, in 2 s") == 3
    assert "interrupted" not in done.output


def test_a_rack_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing() -> None:
        raise RacklessError("rack demo is not up", hint="bring it up with `rackless up`")

    monkeypatch.setattr(command, "current_rack", lambda _rack: SimpleNamespace(must_be_up=nothing))
    app = typer.Typer()
    command.register(app)
    with pytest.raises(RacklessError, match="is not up"):
        CliRunner().invoke(app, ["--once"], catch_exceptions=False)


def test_an_unknown_rack_is_one_line(tmp_path: Path) -> None:
    environment = {**os.environ, **{f"RACKLESS_{name}": str(tmp_path / name) for name in ("CACHE", "STATE", "RUN")}}
    for rack, said in (("nowhere", "error: rack nowhere is not up"), ("./no.yml", "no.yml"), ("../x", "error: ")):
        words = [sys.executable, "-m", "orchestrator.cli.main", "top", "--once", "--rack", rack]
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (1, "")
        assert said in done.stderr
        assert "Traceback" not in done.stderr


ON_A_TERMINAL = """
import json, sys, time
from types import SimpleNamespace
from orchestrator.cli import main, top
look = json.loads(sys.argv.pop(1))
def looks(rack, current, seconds):
    while True:
        yield look
        time.sleep(0.05)
top._looks = looks
top.current_rack = lambda rack: SimpleNamespace(must_be_up=lambda: None)
sys.exit(main.main())
"""


def test_the_live_view_leaves_the_terminal_as_it_was(run: Run, program: Program) -> None:
    program.counts({"mb0": {"misses": 3}}, misses=3, faults=9, pages_mapped=77)
    look = run("--json").stdout
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200", "LINES": "50"}
    process = subprocess.Popen([sys.executable, "-c", ON_A_TERMINAL, look, "top"], cwd=ROOT, env=environment,
                               stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)  # fmt: skip
    os.close(theirs)
    shown = b""
    while shown.count(b"sort big.txt") < 2:
        shown += os.read(ours, 1 << 16)
    process.send_signal(signal.SIGINT)
    while True:
        try:
            shown += os.read(ours, 1 << 16)
        except OSError:  # the terminal's other end is closed
            break
    assert process.wait(20) == 0
    os.close(ours)
    text = shown.decode()
    assert all(word in text for word in ("blade", "pb0", "mb1", "77", "hits of faults"))
    assert text.rindex("\x1b[?1049l") > text.rindex("\x1b[?1049h"), "back from the other screen"
    assert "Traceback" not in text
    assert "interrupted" not in text
