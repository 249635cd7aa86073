"""Traces that Perfetto opens: from files as pagers write them, and from the real pager through the real `split`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from guest_agents.splitkernel.process import trace
from guest_agents.splitkernel.process.programs import Program
from tests.unit.paging_counters import write_counters, write_trace
from tests.unit.paging_stage import NATIVE, SPLIT, Stage, missing
from tests.unit.split_blades import Rack, eventually

MS = 10**6
T0 = 10**12
"""When the process of these tests began, on a clock that began long before."""


def program(job: Path, pid: int = 7) -> Program:
    """One that began at T0 and ran for a second."""
    return Program(pid, "web", "app --fast", 1e9, -1, 1e9 + 1, 3, job, clock=T0, clock_ended=T0 + 1000 * MS)


def made(job: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(trace.write(job, program(job)).read_text())
    check(told)
    return told


def check(told: dict[str, Any]) -> None:
    """What Perfetto's importer asks of the format: fields by phase, and spans of a track inside one another."""
    tracks: dict[tuple[int, int], list[tuple[float, float, str]]] = {}
    for event in told["traceEvents"]:
        assert isinstance(event["pid"], int)
        assert "tid" not in event or 0 < event["tid"] < 1 << 32
        assert isinstance(event["name"], str)
        assert event["ph"] in "XCMi"
        if event["ph"] != "M":
            assert event["ts"] >= 0
        if event["ph"] == "X":
            assert event["dur"] >= 0
            tracks.setdefault((event["pid"], event["tid"]), []).append(
                (event["ts"], event["ts"] + event["dur"], event["name"]))
        if event["ph"] == "C":
            assert all(isinstance(value, int | float) for value in event["args"].values())
    for spans in tracks.values():
        around: list[tuple[float, float, str]] = []
        for span in sorted(spans, key=lambda span: (span[0], -span[1])):
            while around and around[-1][1] <= span[0]:
                around.pop()
            assert not around or span[1] <= around[-1][1] + 0.001, f"spans of one track cross: {around[-1]}, {span}"
            around.append(span)


def spans(told: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [event for event in told["traceEvents"] if event["ph"] == "X" and event["name"] == name]


def values(told: dict[str, Any], name: str) -> list[tuple[float, float]]:
    return [(round(event["ts"], 3), event["args"]["value"]) for event in told["traceEvents"]
            if event["ph"] == "C" and event["name"] == name]  # fmt: skip


def test_a_program_that_never_paged_has_its_life(tmp_path: Path) -> None:
    told = made(tmp_path)
    (one,) = spans(told, "app --fast")
    assert (one["pid"], one["ts"], one["dur"]) == (7, 0, pytest.approx(1e6))
    assert one["args"] == {"id": 7, "vnode": "web", "exit_code": 3}
    assert told["otherData"] == {"dropped_events": {}, "untraced_processes": []}


def test_events_and_counters_of_a_pager(tmp_path: Path) -> None:
    write_counters(tmp_path, 7, {"mb0": {}, "mb1": {}}, command="app")
    write_trace(tmp_path, 7, T0 + 100 * MS, T0 + 900 * MS, events=[
        (T0 + 110 * MS, 2 * MS, 0, 32, 0, 2, 0),
        (T0 + 109 * MS, 5 * MS, 77, 4, 0b10, 0, 1),
        (T0 + 111 * MS, 8 * MS, 0, 12, 0b11, 1, 3),
        (T0 + 120 * MS, 1 * MS, 0, 0, 0b01, 4, 0),
    ], snapshots=[
        (T0 + 100 * MS, {}),
        (T0 + 110 * MS, {"misses": 5, "pages_mapped": 9}),
        (T0 + 200 * MS, {"misses": 5, "pages_mapped": 9}),
        (T0 + 220 * MS, {"misses": 6, "pages_mapped": 8}),
    ])  # fmt: skip
    told = made(tmp_path)
    (miss,), (flush,), (lost,) = (spans(told, name) for name in ("miss", "flush", "failover"))
    assert (miss["tid"], miss["args"]) == (701, {"pages": 4, "blades": "mb1", "page": 77, "piggyback": True})
    assert miss["ts"] == pytest.approx(109_000, abs=0.01)
    assert (flush["tid"], flush["dur"], flush["args"]) == (713, 8000, {"pages": 12, "blades": "mb0,mb1"})
    assert lost["args"] == {"blades": "mb0"}
    assert [value for _, value in values(told, "misses/s")] == [500, 0, 50, 0]
    assert values(told, "misses/s")[1][0] == pytest.approx(110_000, abs=0.01), "a rate ends where its interval does"
    assert [value for _, value in values(told, "pages_mapped")] == [9, 8]
    names = {event["args"]["name"] for event in told["traceEvents"] if event["ph"] == "M"}
    assert names == {"app --fast", "life", "pager", "flush 3"}
    assert spans(told, "remote memory")[0]["args"] == {"ended": "exit"}


def test_what_was_overwritten_is_counted(tmp_path: Path) -> None:
    write_trace(tmp_path, 7, T0, 0, events=[(T0 + n * MS, 100, 0, 1, 1, 0, 0) for n in range(13)], most=8)
    told = made(tmp_path)
    assert told["otherData"]["dropped_events"] == {"7": 5}
    assert len(spans(told, "miss")) == 8
    assert spans(told, "miss")[0]["ts"] == pytest.approx(5000, abs=0.01), "the latest are kept, in order"
    assert spans(told, "remote memory")[0]["args"] == {"ended": "killed"}
    (note,) = [event for event in told["traceEvents"] if event["ph"] == "i"]
    assert note["name"] == "5 earlier events were dropped"


def test_a_link_in_the_jobs_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("as it was")
    (tmp_path / "trace.json").symlink_to(tmp_path / "precious")
    assert made(tmp_path)["traceEvents"]
    assert (tmp_path / "precious").read_text() == "as it was"


def test_files_that_are_none_and_processes_without_one(tmp_path: Path) -> None:
    write_counters(tmp_path, 8)
    write_counters(tmp_path, 9, managed=0)
    (tmp_path / "10.trace").write_bytes(b"")
    (tmp_path / "11.trace").write_bytes(bytes(100_000))
    assert made(tmp_path)["otherData"] == {"dropped_events": {}, "untraced_processes": [8]}


@pytest.fixture(scope="module")
def rack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rack]:
    made = Rack(tmp_path_factory.mktemp("trace"), ("gm0", "pb0"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def split(rack: Rack) -> Path:
    """`split` with the real shim and pager, over stand-in memory blades that are inside the program."""
    if missing() is not None:
        pytest.skip(missing() or "")
    Stage(rack.folder)
    binary = rack.folder / "split"
    places = [f'-DMONITOR_SOCKET="{rack.folder}/pb0.sock"', f'-DVNODE="{rack.folder}"']
    subprocess.run(["cc", "-std=gnu17", "-O1", "-Wall", "-Wextra", "-Werror", *places, "-o", binary,
                    *(NATIVE / name for name in SPLIT)], check=True)  # fmt: skip
    return binary


def run(
    split: Path, folder: Path, *words: str, options: Sequence[str] = (), code: int = 0, before: Sequence[str] = (),
    **more: str,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Counters and trace of a run of paging_stress with an ExCache of 4 MiB; `more` goes into its environment."""
    options = ["--trace", "trace.json", "--stats", "stats.json", "--excache", str(4 << 20), *options]
    command = [str(split), "run", *options, "--", *before, str(split.parent / "paging_stress"), *words]
    done = subprocess.run(command, cwd=folder, env={**os.environ, **more}, capture_output=True, text=True, timeout=200)
    assert done.returncode == code, done
    told = json.loads((folder / "trace.json").read_text())
    check(told)
    return json.loads((folder / "stats.json").read_text()), told


def life(split: Path, words: str) -> str:
    """What the program's own track is called."""
    return f"{split.parent}/paging_stress {words}"


@pytest.mark.long
def test_a_trace_has_what_was_counted(split: Path, tmp_path: Path) -> None:
    stats, told = run(split, tmp_path, "blocks", "16", "1", FAKE_EVENTS="")
    seen = Counter(event["name"] for event in told["traceEvents"] if event["ph"] == "X")
    dropped = sum(told["otherData"]["dropped_events"].values())
    assert dropped == 0
    assert seen["miss"] == stats["misses"] > 100
    assert sum(event["args"]["pages"] for event in spans(told, "flush")) == stats["flushes"] > 100
    assert sum(event["args"]["pages"] for event in spans(told, "evict")) == stats["evictions"]
    assert sum(event["args"]["pages"] for event in spans(told, "miss")) == stats["bytes_in"] // 4096
    assert sum(event["args"]["piggyback"] for event in spans(told, "miss")) == stats["piggybacks"]
    # What the tracks of rates add up to is what was counted.
    for name in ("misses", "bytes_out", "zero_fills"):
        points = values(told, f"{name}/s")
        total = sum(rate * (then - when) / 1e6 for (when, rate), (then, _) in pairwise(points))
        assert total == pytest.approx(stats[name], rel=0.02, abs=300), name
    assert stats["processes"][0]["command"] == "paging_stress"
    assert stats["requests"]["P2M_PCACHE_MISS"] == stats["misses"]


@pytest.mark.long
def test_forks_and_failovers_are_in_it(split: Path, tmp_path: Path) -> None:
    stats, told = run(split, tmp_path, "forks", "12", "1", FAKE_EVENTS="")
    assert len(spans(told, "fork")) == stats["forks"] > 0
    assert len(spans(told, "failover")) == stats["failovers"] == 0
    stats, told = run(split, tmp_path, "mixed", "16", "1", options=("--replicas", "2"), FAKE_EVENTS="1x800")
    assert stats["failovers"] == 1
    assert [event["args"] for event in spans(told, "failover")] == [{"blades": "mb1"}]
    assert sum(event["args"]["pages"] for event in spans(told, "re-replicate")) == stats["rereplicated_bytes"] // 4096
    # One that loses its memory has a trace until then.
    _, told = run(split, tmp_path, "mixed", "16", "9", code=70, FAKE_EVENTS="1x600")
    assert spans(told, "miss")
    assert [event["args"]["exit_code"] for event in spans(told, life(split, "mixed 16 9"))] == [70]


@pytest.mark.long
def test_a_process_that_was_killed_has_its_trace_until_then(split: Path, tmp_path: Path) -> None:
    kill = ("timeout", "-s", "KILL", "1")
    stats, told = run(split, tmp_path, "mixed", "16", "999", before=kill, code=137, FAKE_EVENTS="")
    (memory,) = spans(told, "remote memory")
    assert memory["args"] == {"ended": "killed"}
    assert [one["pid"] for one in stats["processes"]] == [memory["pid"]]
    dropped = told["otherData"]["dropped_events"][str(memory["pid"])]
    assert len(spans(told, "miss")) + dropped >= stats["misses"] - 1 > 100
    assert memory["pid"] != spans(told, f"timeout -s KILL 1 {life(split, 'mixed 16 999')}")[0]["pid"]


@pytest.mark.long
def test_a_running_program_is_seen_with_its_counters(rack: Rack, split: Path) -> None:
    stress = str(split.parent / "paging_stress")
    command = [str(split), "run", "--excache", str(4 << 20), "--", stress, "mixed", "16", "1000"]
    process = subprocess.Popen(command, cwd=rack.folder, stdout=subprocess.DEVNULL)

    def counted() -> dict[str, Any]:
        running = rack["pb0"].call("process.stats")["running"]
        return running[0]["counters"] if running else {}

    try:
        eventually(lambda: counted().get("misses", 0) > 100)
        first = counted()
        eventually(lambda: counted()["misses"] > first["misses"])
        assert first["excache_bytes"] == 4 << 20
        assert 0 < first["pages_mapped"] + first["pages_pooled"] <= 1024
        assert first["pages_held"] > 1024
        assert 0 < first["hit_ratio_of_faults"] < 1
        assert sum(blade["misses"] for blade in first["blades"].values()) == pytest.approx(first["misses"], abs=5)
        assert not list((rack.folder / "pb0.jobs").glob("*/*.trace")), "nobody asked for one"
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.long
def test_a_long_run_keeps_its_first_seconds(split: Path, tmp_path: Path) -> None:
    """The buffers fill: events are dropped and counted, snapshots thinned out, and the whole run is in it."""
    stats, told = run(split, tmp_path, "mixed", "16", "30", FAKE_EVENTS="")
    (dropped,) = told["otherData"]["dropped_events"].values()
    kept = sum(len(spans(told, name)) for name in trace.KINDS)
    assert kept == 16384
    assert dropped > 0
    points = values(told, "faults/s")
    assert points[0][0] == pytest.approx(spans(told, "remote memory")[0]["ts"], abs=0.01)
    total = sum(rate * (then - when) / 1e6 for (when, rate), (then, _) in pairwise(points))
    assert total == pytest.approx(stats["faults"], rel=0.02)


def test_split_says_what_is_wrong_with_a_trace(rack: Rack, tmp_path: Path) -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    binary = tmp_path / "split"
    places = [f'-DMONITOR_SOCKET="{rack.folder}/pb0.sock"', f'-DVNODE="{rack.folder}"']
    subprocess.run(["cc", "-std=gnu17", *places, "-o", binary, *(NATIVE / name for name in SPLIT)], check=True)
    (tmp_path / "excache_shim.so").touch()
    done = subprocess.run([binary, "run", "--trace", "no/such/folder", "--", "touch", "ran"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    assert (done.returncode, done.stderr) == (125, "rackless: cannot write no/such/folder: No such file or directory\n")
    assert not (tmp_path / "ran").exists()
    visitor = rack["pb0"].ask("job 4194304 default")
    assert "a trace of another job" in refusal(visitor, "trace /none")
    job = max((rack.folder / "pb0.jobs").iterdir(), key=lambda folder: folder.stat().st_mtime)
    assert "one that has not ended" in refusal(visitor, f"trace {job}")
    visitor.close()


def refusal(visitor: Any, text: str) -> str:
    visitor.socket.send(text.encode())
    reply: str = visitor.socket.recv(1 << 16).decode()
    assert reply.startswith("error "), reply
    return reply
