"""vNodes on real blades: programs are placed, seen and ended; the manager goes and comes back; a processor dies."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator import agents
from orchestrator.hypervisor import daemon, domain
from orchestrator.settings import RackPaths, Settings
from tests.rack.conftest import Bench, Rack

pytestmark = [pytest.mark.rack, pytest.mark.timeout(600)]

BLADES = {
    "gm0": {"kind": "manager", "memory": "256 MiB"},
    "pb0": {"kind": "processor", "memory": "320 MiB"},
    "pb1": {"kind": "processor", "memory": "320 MiB"},
    "mb0": {"kind": "memory", "memory": "320 MiB"},
    "mb1": {"kind": "memory", "memory": "320 MiB"},
    "sb0": {"kind": "storage", "memory": "256 MiB", "disk": {"size": "1 GiB"}},
}
TIMING = {"heartbeat": "0.5 s", "dead_after": "6 s"}
# Larger than its ExCache, and busy with it until it is told to end.
BUSY = """
import hashlib, sys, time
block = [bytes([i % 251]) * 4096 for i in range(2500)]
print("ready", flush=True)
while True:
    line = sys.stdin.readline()
    digest = hashlib.md5(b"".join(block)).hexdigest()
    if not line or line == "end\\n":
        break
    print("turn", flush=True)
print(digest)
"""


@pytest.fixture(scope="module")
def rack(bench: Bench) -> Iterator[Rack]:
    """Two processor blades, and a manager that notices death soon."""
    with bench.up("v", "pair", blades=BLADES, membership=TIMING) as made:
        words = ("create", "web", "--processors", "pb0,pb1", "--memory", "mb1", "--storage", "sb0")
        bench.rackless("vnode", *words, "--rack", made.name)
        yield made


def vnode(rack: Rack, *words: str, **more: Any) -> Any:
    return rack.bench.rackless("vnode", *words, "--rack", rack.name, **more)


def programs(rack: Rack) -> dict[str, str]:
    """States by id, of programs that run or were lost."""
    return {program["id"]: program["state"] for program in json.loads(rack("ps", "--json").stdout)}


def regions(rack: Rack) -> dict[str, int]:
    """How many each memory blade has given out."""
    settings = Settings.from_environment({**os.environ, **rack.bench.env()})
    paths = RackPaths(settings, rack.name)
    blades = {name: blade["mgmt_address"] for name, blade in rack.bench.status(rack.name).items()}
    return {name: agents.call(paths, name, blades[name], "memory.stats", 30.0)["regions"] for name in ("mb0", "mb1")}


def eventually(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.5)


class Busy:
    """A program with remote memory that runs until it is told to end."""

    def __init__(self, rack: Rack, *where: str) -> None:
        words = ("run", "--rack", rack.name, *where, "--excache", "4MiB", "--", "python3", "-c", BUSY)
        command = rack.bench.command(*words)
        self.process = subprocess.Popen(command, env=rack.bench.env(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True)  # fmt: skip
        self.hear("ready")

    def hear(self, expected: str) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line == expected, line + str(self.process.communicate(timeout=60))

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def end(self) -> str:
        """What it says at its end, when it has ended well."""
        self.tell("end")
        out, error = self.process.communicate(timeout=300)
        assert self.process.returncode == 0, error
        return out.strip()

    def leave(self) -> None:
        self.process.kill()
        self.process.communicate()


def digest() -> str:
    code = "import hashlib; print(hashlib.md5(b''.join(bytes([i % 251]) * 4096 for i in range(2500))).hexdigest())"
    return subprocess.run(["python3", "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_a_program_has_its_vnodes_memory_files_and_a_shells_manners(rack: Rack, tmp_path: Path) -> None:
    stats = tmp_path / "stats.json"
    script = "pwd; echo $A > f; ls; exit 3"
    done = rack("run", "--vnode", "web", "--env", "A=b c", "--", "sh", "-c", script, check=False)
    assert (done.returncode, done.stdout) == (3, "/vnode\nf\n"), done.stderr
    assert rack.on("sb0", "cat /vnode/web/f") == "b c\n"
    assert "web" in rack("run", "--on", "pb0", "--", "ls").stdout.split()
    script = "x = [bytes([i % 251]) * 4096 for i in range(3000)]; print(sum(map(len, x)), x[2999][0])"
    done = rack("run", "--vnode", "web", "--excache", "4MiB", "--stats", str(stats), "--", "python3", "-c", script)
    assert done.stdout == f"{3000 * 4096} {2999 % 251}\n"
    assert set(json.loads(stats.read_text())["blades"]) == {"mb1"}
    eventually(lambda: regions(rack) == {"mb0": 0, "mb1": 0})


def test_programs_are_placed_seen_and_ended(rack: Rack) -> None:
    running = [Busy(rack, "--vnode", "web") for _ in range(2)]
    try:
        eventually(lambda: len(programs(rack)) == 2)
        found = programs(rack)
        assert {name.partition(".")[0] for name in found} == {"pb0", "pb1"}
        assert regions(rack)["mb0"] == 0 < regions(rack)["mb1"]
        refused = vnode(rack, "delete", "web", check=False)
        assert "running programs" in refused.stderr
        on_blade = rack.on("pb0", "split ps")
        assert all(name in on_blade for name in found)
        first, second = sorted(found)
        rack.on("pb0", f"split kill {second} KILL")  # it runs on pb1
        rack("kill", first, "TERM")
        assert sorted(busy.process.wait(60) for busy in running) == [137, 143]
        eventually(lambda: not programs(rack))
        eventually(lambda: regions(rack) == {"mb0": 0, "mb1": 0})
    finally:
        for busy in running:
            busy.leave()


def test_a_vnode_can_be_reached_at_its_address(rack: Rack) -> None:
    address = json.loads(vnode(rack, "show", "web", "--json").stdout)["address"]
    rack.on("mb0", f"ping -c 1 -W 20 {address}")
    assert address in rack.on("pb0", "ip -4 addr show dev mgmt")
    assert address not in rack.on("pb1", "ip -4 addr show dev mgmt")


def test_split_run_on_a_blade_is_like_a_shell(rack: Rack) -> None:
    rack.on("pb0", "mkdir -p /tmp/here && printf '#!/bin/sh\\npwd; cat\\n' > /tmp/here/app && chmod +x /tmp/here/app")
    assert rack.on("pb0", "cd /tmp/here && echo in | split run ./app") == "/tmp/here\nin\n"
    assert rack.on("pb0", "cd /tmp/here && split run --vnode web --cwd /vnode cat f") == "b c\n"
    rack.on("pb0", "head -c 64 /bin/true > /tmp/here/arm && printf '\\267' | "
            "dd of=/tmp/here/arm bs=1 seek=18 conv=notrunc && chmod +x /tmp/here/arm")  # fmt: skip
    rack.on("pb0", "touch /tmp/here/plain")
    for words, code, said in (
        (("--cwd", "/tmp/here", "--", "./arm"), 126, "is a program for another machine (aarch64)"),
        (("--", "/tmp/here/plain"), 126, "chmod +x"),
        (("--", "no-such-program"), 127, "command not found"),
        (("--vnode", "wen", "--", "true"), 1, "there is no vNode 'wen'"),
    ):
        done = rack("run", *(words if "--vnode" in words else ("--on", "pb0", *words)), check=False)
        assert done.returncode == code, done.stderr
        assert said in done.stderr


def test_a_restarted_manager_disturbs_nobody(rack: Rack) -> None:
    busy = Busy(rack, "--vnode", "web")
    try:
        eventually(lambda: len(programs(rack)) == 1)
        before = programs(rack)
        rack.kill_agent("gm0")
        busy.tell("go on")
        busy.hear("turn")
        eventually(lambda: rack.bench.status(rack.name)["gm0"]["state"] == "ready")
        assert programs(rack) == before
        assert [v["name"] for v in json.loads(vnode(rack, "list", "--json").stdout)] == ["default", "web"]
        assert busy.end() == digest()
    finally:
        busy.leave()


def test_a_manager_made_anew_knows_the_vnodes(rack: Rack) -> None:
    busy = Busy(rack, "--on", "pb0")
    try:
        before = json.loads(vnode(rack, "show", "web", "--json").stdout)
        power(rack, "gm0", "destroy")
        rack.bench.rackless("up", str(rack.file))
        assert json.loads(vnode(rack, "show", "web", "--json").stdout) == before
        eventually(lambda: list(programs(rack).values()) == ["running"])
        assert busy.end() == digest()
    finally:
        busy.leave()


def test_a_dead_processor_blades_programs_are_reported_and_its_memory_returns(rack: Rack) -> None:
    vnode(rack, "create", "moves", "--processors", "pb1,pb0")
    address = json.loads(vnode(rack, "show", "moves", "--json").stdout)["address"]
    lost, stays = Busy(rack, "--vnode", "web", "--on", "pb1"), Busy(rack, "--on", "pb0")
    try:
        eventually(lambda: len(programs(rack)) == 2)
        held = regions(rack)
        power(rack, "pb1", "destroy")
        eventually(lambda: sorted(programs(rack).values()) == ["lost", "running"])
        assert next(name for name, state in programs(rack).items() if state == "lost").startswith("pb1.")
        eventually(lambda: 0 < sum(regions(rack).values()) < sum(held.values()))
        eventually(lambda: address in rack.on("pb0", "ip -4 addr show dev mgmt"))
        assert stays.end() == digest()
        eventually(lambda: regions(rack) == {"mb0": 0, "mb1": 0})
        done = rack("run", "--vnode", "web", "--on", "pb1", "--", "true", check=False)
        assert done.returncode == 1
        rack.bench.rackless("up", str(rack.file))
        assert rack("run", "--vnode", "web", "--on", "pb1", "--", "cat", "f").stdout == "b c\n"
        assert list(programs(rack).values()) == ["lost"]
    finally:
        lost.leave()
        stays.leave()


def power(rack: Rack, blade: str, action: str) -> None:
    """Destroy a blade, as libvirt does it."""
    settings = Settings.from_environment({**os.environ, **rack.bench.env()})
    with daemon.connection(RackPaths(settings, rack.name)) as conn:
        assert conn is not None
        getattr(domain.owned(conn, rack.name)[blade].domain, action)()
