"""What happened to a rack: the journal with real files and processes, libvirt's logs, the manager's memory."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from guest_agents import control
from guest_agents.membership import Manager, Timing
from orchestrator import agents, engine, history, journal
from orchestrator.cli.events import line
from orchestrator.errors import RacklessError
from orchestrator.events import Broken, Changed, Event, Note, Step, step
from orchestrator.hypervisor.daemon import Daemon
from orchestrator.settings import RackPaths, Settings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RackPaths:
    monkeypatch.setattr(engine, "observe", lambda _settings, _rack: {})
    made = RackPaths(Settings(tmp_path / "cache", tmp_path / "state", tmp_path / "run"), "demo")
    made.root.mkdir(parents=True)
    return made


def test_every_event_but_progress_is_recorded_and_passed_on(paths: RackPaths) -> None:
    seen: list[Event] = []
    emit = journal.recording(paths, seen.append)
    with step(emit, "demo", "restore", "mb0") as report:
        report(0.5)
    emit(Note("accelerator: tcg"))
    emit(Changed("demo", "mb0", "recreate", ("memory 1 -> 2",)))
    emit(Broken("demo", "mb0", ("paused",)))
    assert len(seen) == 6
    events = history.recorded(paths)
    told = [(e["event"], e.get("blade"), e.get("state")) for e in events]
    assert told == [("step", "mb0", "start"), ("step", "mb0", "done"), ("note", None, None), ("change", "mb0", None),
                    ("faults", "mb0", None)]  # fmt: skip
    assert [line(event)[10:].strip() for event in events[2:]] == [
        "accelerator: tcg", "mb0       to recreate: memory 1 -> 2", "mb0       broken: paused"]  # fmt: skip


def test_a_rack_without_a_folder_records_nothing_and_is_said_to_have_none(paths: RackPaths) -> None:
    paths.root.rmdir()
    journal.record(paths, {"event": "note"})
    assert not paths.root.exists()
    with pytest.raises(RacklessError, match="has no events"):
        history.recorded(paths)


def test_tail_sees_what_came_before_and_after_renaming_removal_and_a_new_beginning(
    paths: RackPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "MOST_BYTES", 200)
    tail = journal.Tail(paths.events)
    numbers = []
    for number in range(40):
        journal.record(paths, {"event": "note", "number": number})
        if number % 3 == 0:
            numbers += [event["number"] for event in tail.new()]
    numbers += [event["number"] for event in tail.new()]
    assert numbers == list(range(40))
    assert paths.events.stat().st_size <= 200
    assert journal.older(paths.events).stat().st_size <= 200

    journal.record(paths, {"event": "note", "number": 40})
    paths.events.unlink()
    assert [event["number"] for event in tail.new()] == [40]
    assert tail.new() == []
    journal.record(paths, {"event": "note", "number": 41})
    assert [event["number"] for event in tail.new()] == [41]
    tail.close()


def test_half_a_line_is_left_for_the_next_time_and_a_broken_one_is_left_out(paths: RackPaths) -> None:
    tail = journal.Tail(paths.events)
    with paths.events.open("ab", buffering=0) as file:
        file.write(b'{"time": 1, "event": "no')
        assert tail.new() == []
        file.write(b'te"}\n{"time": \n{"time": 2}\n[]\n')
    assert [event["time"] for event in tail.new()] == [1, 2]
    tail.close()


WRITER = """
import sys
from pathlib import Path
from orchestrator import journal
from orchestrator.settings import RackPaths, Settings
folder = Path(sys.argv[1])
journal.MOST_BYTES = 20_000
paths = RackPaths(Settings(folder / "cache", folder / "state", folder / "run"), "demo")
for number in range(300):
    journal.record(paths, {"event": "note", "number": number, "who": sys.argv[2]})
"""


def test_processes_that_write_at_once_lose_and_mix_nothing(paths: RackPaths, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    stop = threading.Event()

    def watch() -> None:
        tail = journal.Tail(paths.events)
        while not stop.is_set():
            seen.extend(tail.new())
        seen.extend(tail.new())
        tail.close()

    reader = threading.Thread(target=watch)
    reader.start()
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), who], cwd=ROOT) for who in "abc"]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    stop.set()
    reader.join()
    kept = [json.loads(text) for file in (journal.older(paths.events), paths.events) for text in file.open()]
    assert 200 < len(kept) < 900, "it was renamed more than once"
    for who in "abc":
        numbers = [event["number"] for event in kept if event["who"] == who]
        assert numbers == list(range(300 - len(numbers), 300))
        watched = [event["number"] for event in seen if event["who"] == who]
        assert watched == sorted(set(watched))
    assert seen[-1] == kept[-1]


LOG = """2026-11-23 02:00:00.000+0000: starting up libvirt version: 9.0.0, package: 9.0.0-4, qemu version: 7.2.22
LC_ALL=C \\
2026-11-23T02:00:11.5Z qemu-system-x86_64: terminating on signal 15 from pid 7
2026-11-23 02:00:12.250+0000: shutting down, reason=destroyed
2026-11-23 02:01:12.500+0000: shutting down, reason=crashed
"""


def test_libvirts_logs_tell_when_and_why_a_blade_ended(paths: RackPaths) -> None:
    folder = Daemon.of(paths).log / "qemu"
    folder.mkdir(parents=True)
    for name in ("demo.mb0", "demo.template-01ab", "other.mb0"):
        (folder / f"{name}.log").write_text(LOG)
    watch = history.Watch(paths)
    first, second = watch.new()
    assert (first["event"], first["blade"], first["reason"]) == ("ended", "mb0", "destroyed")
    assert (second["reason"], second["time"] - first["time"]) == ("crashed", 60.25)
    assert watch.new() == []
    with (folder / "demo.mb0.log").open("a") as file:
        file.write("2026-11-23 02:02:12.500+0000: shutting ")
        file.flush()
        assert watch.new() == []
        file.write("down, reason=shutdown\n")
    assert [event["reason"] for event in watch.new()] == ["shutdown"]
    watch.close()


def about(name: str, node: int) -> dict[str, Any]:
    return {"name": name, "node_id": node, "kind": "memory", "address": f"10.0.0.{node}", "management": "10.1.0.1"}


def test_a_manager_remembers_who_came_and_went_and_why() -> None:
    manager = Manager("gm0", Timing(0.1, 1.0))
    life = manager.join(about("mb0", 2))
    manager.join(about("mb1", 3))
    manager.leave({"node_id": 2, "incarnation": life["incarnation"]})
    manager.join(about("mb1", 3))
    told = manager.events({})
    assert [(e["blade"], e["state"]) for e in told["events"]] == [
        ("mb0", "joined"), ("mb1", "joined"), ("mb0", "left"), ("mb1", "dead"), ("mb1", "joined")]  # fmt: skip
    assert told["events"][3]["why"] == "mb1 joins in its place"
    assert manager.events({"since": told["next"] - 1})["events"] == told["events"][-1:]
    assert manager.events({"since": told["next"]})["events"] == []


def test_lines_for_people() -> None:
    done = Step("demo", "restore", "fail", "mb0", None, "no answer", 1.26).to_json()
    assert line({"time": 0.0, **done})[8:] == "  mb0       restore fail (1.3 s): no answer"
    ended = {"time": 0.0, "event": "ended", "rack": "demo", "blade": "mb0", "reason": "crashed"}
    assert line(ended)[8:] == "  mb0       QEMU ended: crashed"
    member = {"time": 0.0, "event": "member", "blade": "mb0", "state": "dead", "why": "silent for 10.1 s"}
    assert line(member)[8:] == "  mb0       dead: silent for 10.1 s"


def test_the_managers_memory_is_heard_once_also_after_it_was_restarted(
    paths: RackPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [Manager("gm0", Timing(0.1, 60.0))]

    def told(request: control.Message) -> control.Message:
        reply = now[0].events(request)  # of a blade whose clock is an hour behind
        events = [{**event, "time": event["time"] - 3600} for event in reply["events"]]
        return {**reply, "events": events, "now": reply["now"] - 3600}

    with control.Server(("127.0.0.1", 0), b"s" * 32, {"member.events": told}).start() as server:
        monkeypatch.setattr(agents, "client", lambda _paths, address, timeout: control.ControlClient(
            (address, server.address[1]), b"s" * 32, timeout))  # fmt: skip
        monkeypatch.setattr(history._Members, "_manager", lambda _self: "127.0.0.1")
        now[0].join(about("mb0", 2))
        watch = history.Watch(paths)
        (first,) = watch.new()
        assert (first["event"], first["blade"], first["state"]) == ("member", "mb0", "joined")
        assert abs(first["time"] - time.time()) < 60
        assert watch.new() == []
        now[0].join(about("mb1", 3))
        assert [event["blade"] for event in watch.new()] == ["mb1"]
        now[0] = Manager("gm0", Timing(0.1, 60.0))
        now[0].join(about("mb2", 4))
        assert [event["blade"] for event in watch.new()] == ["mb2"]
        watch.close()


def test_while_no_manager_can_be_asked_other_events_are_told(paths: RackPaths) -> None:
    watch = history.Watch(paths)
    journal.record(paths, {"event": "note", "message": "one"})
    assert [event["message"] for event in watch.new()] == ["one"]
    watch.close()
