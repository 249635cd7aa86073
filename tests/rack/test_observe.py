"""What a running program does, as `top`, `run --stats` and `run --trace` tell it, on real blades."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.rack.conftest import Rack

pytestmark = [pytest.mark.rack, pytest.mark.timeout(600)]

SOURCE = Path(__file__).parent / "native" / "paging_stress.c"
PROGRAM = "/tmp/paging_stress"


def test_top_stats_and_trace_tell_the_same(rack: Rack, tmp_path: Path) -> None:
    program = tmp_path / "paging_stress"
    subprocess.run(["cc", "-std=gnu17", "-O2", "-o", program, SOURCE, "-lpthread"], check=True)
    rack("cp", str(program), f"pb0:{PROGRAM}")
    rack.on("pb0", f"chmod +x {PROGRAM}")
    stats_file, trace_file = tmp_path / "stats.json", tmp_path / "trace.json"
    words = ["run", "--rack", rack.name, "--on", "pb0", "--excache", "4MiB", "--stats", str(stats_file),
             "--trace", str(trace_file), "--", "sh", "-c", f"ls > list; exec {PROGRAM} mixed 16 8"]  # fmt: skip
    running = subprocess.Popen(rack.bench.command(*words), env=rack.bench.env())
    looks = []
    while running.poll() is None:
        looks.append(json.loads(rack("top", "--json", "--seconds", "1").stdout))
        time.sleep(1)
    assert running.returncode == 0
    stats, trace = json.loads(stats_file.read_text()), json.loads(trace_file.read_text())

    paging: list[dict[str, Any]] = [p for look in looks for p in look["programs"] if p["counters"]["managed"]]
    assert paging, f"it was never seen: {looks}"
    assert max(program["rates"]["misses"] or 0 for program in paging) > 0
    assert all(program["excache_pages"] <= 1024 for program in paging)
    traffic = [blade["rates"]["bytes_in"] or 0 for look in looks for blade in look["memory"]]
    assert max(traffic) > 0
    blades = looks[-1]["blades"]
    assert {blade["name"]: blade["error"] for blade in blades} == dict.fromkeys(["gm0", "pb0", "mb0", "mb1", "sb0"])
    assert max(blade["cpu_percent"] for look in looks for blade in look["blades"] if blade["name"] == "pb0") > 10
    assert looks[-1]["managers"]["requests"]["M2MM_STATUS_REPORT"] > 1
    assert looks[-1]["memory"][0]["requests"]["P2M_MMAP"] > 0

    assert stats["requests"]["P2M_PCACHE_MISS"] >= stats["misses"] > 0
    assert stats["storage"]["sb0"]["by_opcode"]["P2S_OPEN"] > 0
    assert stats["model"]["slowdown"] > 1
    seen = Counter(event["name"] for event in trace["traceEvents"] if event["ph"] == "X")
    dropped = sum(trace["otherData"]["dropped_events"].values())
    assert seen["miss"] == stats["misses"] or dropped
    assert seen["flush"] > 0
    print(f"{len(looks)} looks; {seen}; dropped {dropped}; {trace_file.stat().st_size} bytes of trace; {stats}")


def test_plain_lines_until_ctrl_c(rack: Rack) -> None:
    command = rack.bench.command("top", "--rack", rack.name, "--seconds", "0.5")
    process = subprocess.Popen(command, env=rack.bench.env(), stdout=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))  # fmt: skip
    assert process.stdout is not None
    titles = 0
    while titles < 2:
        titles += "in 0.5 s" in process.stdout.readline()
    os.kill(process.pid, signal.SIGINT)
    rest, _ = process.communicate(timeout=30)
    assert process.returncode == 0, rest
