"""Topology changes and faults on real blades, by playbook and by command, while a program runs and stays right."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.rack.conftest import PROJECT, Bench, Rack
from tests.rack.program import Program, end_all

pytestmark = [pytest.mark.rack, pytest.mark.timeout(900)]

BLADES = {
    "gm0": {"kind": "manager", "memory": "256 MiB"},
    "pb0": {"kind": "processor", "memory": "320 MiB", "excache": "16 MiB"},
    "mb0": {"kind": "memory", "memory": "320 MiB"},
    "mb1": {"kind": "memory", "memory": "320 MiB"},
    "sb0": {"kind": "storage", "memory": "256 MiB", "disk": {"size": "64 MiB"}},
}
TIMING = {"heartbeat": "0.5 s", "dead_after": "6 s"}
PAGES = 9000  # 35 MiB: more than twice the ExCache
BUSY = f"""
import hashlib, sys
block = [bytes([i % 251]) * 4096 for i in range({PAGES})]
print("ready", flush=True)
for line in sys.stdin:
    print(hashlib.md5(b"".join(block)).hexdigest(), flush=True)
"""
RIGHT = hashlib.md5(b"".join(bytes([i % 251]) * 4096 for i in range(PAGES))).hexdigest()

Play = Callable[..., bool]
Fault = Callable[..., Any]


@pytest.fixture(scope="module")
def rack(bench: Bench) -> Iterator[Rack]:
    with bench.up("p", "pair", blades=BLADES, membership=TIMING) as made:
        yield made
    assert json.loads(bench.rackless("gc", "--json").stdout) == []


@pytest.fixture
def play(rack: Rack) -> Play:
    """Runs a playbook from the project's root; did it change anything?"""

    def run(playbook: str, **variables: str) -> bool:
        words = [word for key, value in variables.items() for word in ("-e", f"{key}={value}")]
        command = [str(Path(sys.executable).with_name("ansible-playbook")), f"playbooks/{playbook}.yml", *words]
        done = subprocess.run(command, cwd=PROJECT, env={**rack.bench.env(), "RACKLESS_RACK": str(rack.file)},
                              stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return "changed=1" in done.stdout

    return run


@pytest.fixture
def rackless(rack: Rack) -> Iterator[Fault]:
    """Runs a command of `rackless` with the rack's file; heals all afterwards."""
    yield lambda *words: rack.bench.rackless(*words, "--rack", str(rack.file))
    rack.bench.rackless("heal", "--all", "--rack", rack.name)


def address(rack: Rack, blade: str) -> str:
    return str(rack.bench.status(rack.name)[blade]["fabric_address"])


def ping(rack: Rack, source: str, target: str) -> float | None:
    """Least milliseconds of three pings over the fabric; None when none comes back."""
    told = rack.on(source, f"ping -n -c 3 -i 0.3 -W 2 {address(rack, target)} 2>&1; true")
    found = re.search(r"= ([\d.]+)/", told)
    return float(found[1]) if found else None


def states(rack: Rack) -> dict[str, tuple[str, list[str]]]:
    return {name: (blade["state"], blade["faults"]) for name, blade in rack.bench.status(rack.name).items()}


@contextmanager
def program(rack: Rack) -> Iterator[Callable[[], str]]:
    """A program whose memory is mostly on other blades; each call has it read all of that, and gives its digest."""
    words = ("run", "--rack", rack.name, "--on", "pb0", "--", "python3", "-c", BUSY)
    command = rack.bench.command(*words)
    with subprocess.Popen(command, env=rack.bench.env(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout
        assert stdout.readline() == "ready\n"

        def digest() -> str:
            stdin.write("again\n")
            stdin.flush()
            return stdout.readline().strip()

        yield digest
        stdin.close()
        assert process.wait(120) == 0


def test_a_blade_comes_and_goes_under_a_program(rack: Rack, play: Play) -> None:
    before = rack.file.read_text()
    with program(rack) as digest:
        assert digest() == RIGHT
        assert play("add_blade", kind="memory", name="mb2")
        assert states(rack)["mb2"] == ("ready", [])
        assert not play("add_blade", kind="memory", name="mb2")
        assert digest() == RIGHT
        tried = [rack.bench.rackless("blade", "remove", name, "--dry-run", "--rack", str(rack.file), check=False)
                 for name in ("mb0", "mb1")]  # fmt: skip
        assert all("moved to other blades" in done.stdout for done in tried)
        assert play("remove_blade", name="mb2")
        assert "mb2" not in states(rack)
        assert not play("remove_blade", name="mb2")
        assert digest() == RIGHT
    assert rack.file.read_text() == before
    assert rack.bench.rackless("plan", str(rack.file)).returncode == 0


def test_memory_of_a_program_moves_before_its_blade_goes(rack: Rack, play: Play) -> None:
    assert play("add_blade", kind="memory", name="mb2")
    with program(rack) as digest:
        assert digest() == RIGHT
        dry = rack.bench.rackless("blade", "remove", "mb2", "--dry-run", "--rack", str(rack.file))
        assert "moved to other blades" in dry.stdout
        assert play("remove_blade", name="mb2")
        assert "mb2" not in states(rack)
        assert digest() == RIGHT


def leaves_a_user(rack: Rack, play: Play, user: Program, moved: str) -> None:
    """mb2 is removed while a program is between two things that it does there."""
    assert user.hear() == "ready"
    dry = rack.bench.rackless("blade", "remove", "mb2", "--dry-run", "--rack", str(rack.file))
    assert f"{moved} moved" in dry.stdout
    assert play("remove_blade", name="mb2")
    assert "mb2" not in states(rack)
    user.tell()


def test_a_blade_is_drained_of_lmrs_that_are_used(rack: Rack, play: Play) -> None:
    assert play("add_blade", kind="memory", name="mb2")
    user = Program(rack, "pb0", """
        box = node.malloc(8 << 20, "mb2", name="box")
        box.write(b"first", 4 << 20)
        say("ready")
        input()
        box.write(b"later", 0)
        say(box.read(5, 4 << 20).decode(), box.read(5, 0).decode())
    """)
    try:
        leaves_a_user(rack, play, user, "8 MiB")
        assert user.hear() == "first later"
        user.end()
    finally:
        end_all()


def test_chunks_of_hotpot_get_another_owner(rack: Rack, play: Play) -> None:
    """Hotpot is started on all blades, and stays: the LMRs of its own are no reason to keep a blade."""
    assert play("add_blade", kind="memory", name="mb2")
    user = Program(rack, "pb0", """
        from guest_agents import hotpot
        ids = {other.name: other.node_id for other in node.nodes()}
        with hotpot.connect() as session, session.create("notes", 1 << 20, owners=[ids["mb2"]]) as notes:
            with notes.transaction(replicas=2) as t:
                t.acquire(4096, 5)[:] = b"hello"
            say("ready")
            input()
            with notes.transaction(replicas=2) as t:
                t.acquire(8192, 5)[:] = b"again"
            say(bytes(notes.memory[4096:4101]).decode(), bytes(notes.memory[8192:8197]).decode())
    """)
    try:
        leaves_a_user(rack, play, user, "4 MiB")  # a chunk
        assert user.hear() == "hello again"
        user.end()
    finally:
        end_all()


def test_memory_by_balloon(rack: Rack, play: Play) -> None:
    def total() -> int:
        return int(rack.on("mb1", "awk '/MemTotal/ {print $2}' /proc/meminfo")) >> 10

    before = total()
    assert play("resize_blade", name="mb1", memory="256MiB")
    assert not play("resize_blade", name="mb1", memory="256MiB")
    assert total() == before - 64
    assert play("resize_blade", name="mb1", memory="320MiB")
    assert total() == before
    assert states(rack)["mb1"] == ("ready", [])


def test_a_slow_link_is_seen_by_ping_and_healed(rack: Rack, rackless: Fault) -> None:
    before = ping(rack, "pb0", "mb1")
    assert before is not None
    rackless("fault", "link", "mb1", "--latency", "300 ms")
    assert states(rack)["mb1"] == ("ready", ["latency 300 ms"])
    slow = ping(rack, "pb0", "mb1")
    assert slow is not None
    assert slow >= 300
    rackless("heal", "--all")
    healed = ping(rack, "pb0", "mb1")
    assert healed is not None
    assert healed < 300
    assert states(rack)["mb1"] == ("ready", [])


def test_a_cable_and_one_way(rack: Rack, rackless: Fault) -> None:
    rackless("fault", "link", "mb1", "--down")
    assert ping(rack, "pb0", "mb1") is None
    assert rack.on("mb1", "cat /sys/class/net/fabric/carrier").strip() == "0"
    rackless("heal", "mb1")
    assert ping(rack, "pb0", "mb1") is not None
    rackless("fault", "one-way", "mb1", "pb0")
    assert ping(rack, "pb0", "mb1") is None
    assert ping(rack, "mb0", "mb1") is not None
    rackless("heal", "pb0", "--only", "deaf_to")
    assert ping(rack, "pb0", "mb1") is not None


def test_a_partition_and_its_healing(rack: Rack, rackless: Fault, play: Play) -> None:
    assert play("partition", sides="gm0,pb0,mb0/mb1")
    assert ping(rack, "pb0", "mb1") is None
    assert ping(rack, "pb0", "mb0") is not None
    assert states(rack)["mb1"][1] == ["side 2"]
    assert play("heal")
    assert ping(rack, "pb0", "mb1") is not None
    assert not play("heal")


def test_processor_time_and_memory(rack: Rack, rackless: Fault) -> None:
    def agent() -> int:
        """MiB of the largest process on mb1, which is its agent."""
        sizes = rack.on("mb1", "cat /proc/[0-9]*/status 2>/dev/null | awk '/VmRSS/ {print $2}'")
        return max(map(int, sizes.split())) >> 10

    before = agent()
    rackless("fault", "pressure", "mb1", "32 MiB")
    rackless("fault", "slow", "mb1", "40 %")
    assert 28 <= agent() - before < 48
    assert states(rack)["mb1"][1] == ["cpu 40 %", "memory 32 MiB"]
    rackless("heal", "mb1")
    assert agent() - before < 16
    assert states(rack)["mb1"] == ("ready", [])


def test_a_disk_that_is_slow_full_or_fails_and_a_clock_that_jumps(rack: Rack, rackless: Fault) -> None:
    file = "/srv/vnode/disk-test"

    def written(mib: int) -> str:
        """What dd says of so many MiB of direct writes to the disk."""
        return rack.on("sb0", f"dd if=/dev/zero of={file} bs=1M count={mib} oflag=direct 2>&1; true")

    def seconds(told: str) -> float:
        return float(re.findall(r", ([\d.e-]+) s,", told)[0])

    rackless("fault", "disk", "sb0", "--latency", "300 ms")
    assert states(rack)["sb0"] == ("ready", ["disk latency 300 ms"])
    assert seconds(written(4)) >= 1.2
    rackless("heal", "sb0")
    rackless("fault", "disk", "sb0", "--full")
    assert "No space left" in written(8)
    assert "disk-test" in rack.on("sb0", "ls -A /srv/vnode")
    rackless("heal", "sb0")
    assert "8+0 records out" in written(8)
    digest = rack.on("sb0", f"sync; md5sum {file}")
    rackless("fault", "disk", "sb0", "--errors", "all")
    assert "Input/output error" in rack.on("sb0", f"cat {file} 2>&1 >/dev/null; true")
    rackless("fault", "clock", "mb1", "+1 h")
    ahead = int(rack.on("mb1", "date +%s")) - int(rack.on("mb0", "date +%s"))
    assert 3500 < ahead < 3700
    rackless("heal", "--all")
    assert abs(int(rack.on("mb1", "date +%s")) - int(rack.on("mb0", "date +%s"))) < 100
    assert states(rack)["sb0"] == ("ready", [])
    assert rack.on("sb0", f"md5sum {file}") == digest
    assert "8+0 records out" in written(8)
    rack.on("sb0", f"rm {file}")


def test_a_blade_is_killed_and_replaced(rack: Rack, rackless: Fault, play: Play) -> None:
    with program(rack) as digest:
        assert digest() == RIGHT
        rackless("fault", "pause", "gm0")
        assert states(rack)["gm0"] == ("paused", ["paused"])
        rackless("fault", "resume", "gm0")
        assert digest() == RIGHT
    rackless("fault", "kill", "mb1")
    assert states(rack)["mb1"] == ("off", ["killed"])
    assert play("replace_blade", name="mb1")
    assert states(rack)["mb1"] == ("ready", [])
    assert not play("replace_blade", name="mb1")
    rackless("fault", "kill", "mb1")
    rackless("heal", "--all")
    assert states(rack)["mb1"] == ("ready", [])
    with program(rack) as digest:
        assert digest() == RIGHT


def test_a_scenario(rack: Rack, rackless: Fault, tmp_path: Path) -> None:
    story = tmp_path / "story.yml"
    story.write_text("steps: at 0 s partition mb1; at 2 s heal; at 3 s reset any memory\nseed: 1\n")
    told = json.loads(rackless("scenario", str(story), "--json").stdout)
    assert [step["step"].split()[0] for step in told["steps"]] == ["partition", "heal", "reset"]
    assert states(rack) == dict.fromkeys(BLADES, ("ready", []))


def test_other_faults_outlive_a_power_cycle_and_memory_does_not(rack: Rack, rackless: Fault) -> None:
    rackless("fault", "link", "mb1", "--latency", "200 ms")
    rackless("fault", "partition", "mb1")
    rackless("fault", "reset", "mb1")
    assert states(rack)["mb1"] == ("ready", ["side 1", "latency 200 ms"])
    assert ping(rack, "pb0", "mb1") is None
    rackless("heal", "--all", "--only", "side")
    slow = ping(rack, "pb0", "mb1")
    assert slow is not None
    assert slow >= 200
    rackless("heal", "--all")
    assert states(rack)["mb1"] == ("ready", [])


def test_a_workload_a_restart_and_what_is_collected(rack: Rack, play: Play, tmp_path: Path) -> None:
    output = tmp_path / "out.txt"
    assert play("run_workload", command="'expr 6 + 36'", output=str(output))
    assert not play("run_workload", command="'expr 6 + 36'", output=str(output))
    assert output.read_text() == "42\n"
    assert play("rolling_restart", blades="mb1", older_than="0")
    assert not play("rolling_restart", blades="mb1")
    assert states(rack)["mb1"] == ("ready", [])
    folder = tmp_path / "collected"
    assert play("collect", dest=str(folder))
    assert not play("collect", dest=str(folder))
    assert set(json.loads((folder / "faults.json").read_text())) == set(BLADES)
    assert "regions" in json.loads((folder / "mb1/stats.json").read_text())["memory.stats"]
    assert "networks are up" in (folder / "mb1/agents.log").read_text()
    assert (folder / "mb1/console.log").exists()
