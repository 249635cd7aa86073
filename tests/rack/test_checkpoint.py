"""Programs that go on on another processor blade, with their memory left where it is; also when their own has died."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.rack.conftest import Bench, Rack
from tests.rack.test_vnode import power, programs, regions

pytestmark = [pytest.mark.rack, pytest.mark.timeout(600)]

SOURCE = Path(__file__).parent / "native" / "wander.c"
BLADES = {
    "gm0": {"kind": "manager", "memory": "256 MiB"},
    "pb0": {"kind": "processor", "memory": "320 MiB"},
    "pb1": {"kind": "processor", "memory": "320 MiB"},
    "mb0": {"kind": "memory", "memory": "256 MiB"},
    "mb1": {"kind": "memory", "memory": "256 MiB"},
    "sb0": {"kind": "storage", "memory": "256 MiB", "disk": {"size": "1 GiB"}},
}
TIMING = {"heartbeat": "0.5 s", "dead_after": "6 s"}
COUNT = """
BEGIN {
    for (i = 0; i < 30000; i++) a[i] = i * 7919 " " i ^ 3
    for (turn = 1; turn <= 4; turn++) {
        for (i = 0; i < 30000; i++) { a[i] = (a[i] + turn) " " i ^ 3; sum += a[i] }
        print "turn", turn, sum; fflush()
    }
}
"""


@pytest.fixture(scope="module")
def rack(bench: Bench) -> Iterator[Rack]:
    """Two processor blades, and a manager that notices death soon."""
    with bench.up("c", "pair", blades=BLADES, membership=TIMING) as made:
        yield made


@dataclass
class Started:
    """`rackless run` of a program, whose output goes to a file."""

    rack: Rack
    process: subprocess.Popen[bytes]
    out: Path

    def until(self, text: str) -> str:
        """Until it has printed that; its ID."""
        wait_for(lambda: text in self.out.read_text())
        return next(name for name, state in programs(self.rack).items() if state == "running")


def start(rack: Rack, out: Path, *command: str) -> Started:
    words = rack.bench.command("run", "--rack", rack.name, "--on", "pb0", "--excache", "4MiB", "--", *command)
    with out.open("wb") as stdout, out.with_suffix(".err").open("wb") as stderr:
        process = subprocess.Popen(words, env=rack.bench.env(), stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)
    return Started(rack, process, out)


def wait_for(condition: object, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.2)


def test_a_program_moves_in_the_middle(rack: Rack, tmp_path: Path) -> None:
    """With two threads, a timer, an open file; its memory is larger than its ExCache."""
    program, stats = tmp_path / "wander", tmp_path / "stats.json"
    subprocess.run(["cc", "-std=gnu17", "-O2", "-o", program, SOURCE, "-lpthread", "-lm"], check=True)
    words = ["6", "8"]
    whole = subprocess.run([program, *words, tmp_path / "w", "2"], capture_output=True, text=True, check=True).stdout
    rack("cp", str(program), "pb0:/vnode/wander")
    rack.on("pb0", "chmod +x /vnode/wander")
    started = start(rack, tmp_path / "out", "/vnode/wander", *words, "/vnode/out", "2")
    name = started.until("step 2\n")
    moved = rack("migrate", name, "--on", "pb1", "--stats", str(stats))
    assert started.process.wait(60) == 75
    said = re.fullmatch(f"rackless: checkpointed as ({name}-....): .*\n", started.out.with_suffix(".err").read_text())
    assert said
    assert started.out.read_text() + moved.stdout == whole
    assert rack.on("pb0", "cat /vnode/out") == "begin\nend\n"
    counted = json.loads(stats.read_text())
    assert counted["misses"] > 100
    assert counted["regions"] > 0
    wait_for(lambda: sum(regions(rack).values()) == 0)
    again = rack("restart", said[1], "--on", "pb1", check=False)
    assert (again.returncode, again.stdout) == (125, "")
    assert f"there is no checkpoint {said[1]} (restarted already?)" in again.stderr


def test_bad_input_is_a_line_and_harms_nobody(rack: Rack, tmp_path: Path) -> None:
    code = "import socket, time; s = socket.socket(); " \
           "print('ready', s.fileno(), flush=True); time.sleep(8); print('well')"
    started = start(rack, tmp_path / "out", "python3", "-c", code)
    name = started.until("\n")
    number = started.out.read_text().split()[1]
    for words, said in (
        (("checkpoint", name), f"{name} cannot be checkpointed: it has a socket open (descriptor {number})"),
        (("migrate", name, "--on", "mb0"), "mb0 is a memory blade: it runs no programs"),
        (("checkpoint", "pb0.1"), "no program pb0.1 runs on pb0"),
        (("checkpoint", "1"), "1 is not the ID of a program"),
        (("restart", "pb0.1-abcd", "--on", "pb1"), "there is no checkpoint pb0.1-abcd (restarted already?)"),
        (("checkpoint", "--discard", "pb0.1-abcd"), "there is no checkpoint pb0.1-abcd"),
    ):
        done = rack(*words, check=False)
        assert done.returncode != 0, done
        assert said in done.stderr
    assert started.process.wait(60) == 0
    assert started.out.read_text() == f"ready {number}\nwell\n"


def test_a_checkpoint_outlives_its_blade(rack: Rack, tmp_path: Path) -> None:
    """gawk is checkpointed, its blade dies and is declared dead; it goes on on the other one."""
    script = tmp_path / "count.awk"
    script.write_text(COUNT)
    rack("cp", str(script), "pb0:/vnode/count.awk")
    whole = rack.on("pb1", "gawk -f /vnode/count.awk")
    started = start(rack, tmp_path / "out", "gawk", "-f", "/vnode/count.awk")
    name = rack("checkpoint", started.until("turn 1 ")).stdout.strip()
    assert started.process.wait(60) == 75
    held = regions(rack)
    assert sum(held.values()) > 0
    power(rack, "pb0", "destroy")
    time.sleep(8)  # longer than `dead_after`: the memory blades have taken back all that was pb0's
    assert regions(rack) == held
    assert name in rack("checkpoint", "--list").stdout
    done = rack("restart", name, "--on", "pb1")
    assert started.out.read_text() + done.stdout == whole
    wait_for(lambda: sum(regions(rack).values()) == 0)
