"""Memory blades that die in the middle of programs' runs, and what programs that are killed leave behind."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.corpus import english
from orchestrator.hypervisor import daemon, domain
from orchestrator.settings import RackPaths, Settings
from tests.rack.conftest import Bench, Rack
from tests.rack.test_main_job import COUNT_WORDS

pytestmark = [pytest.mark.rack, pytest.mark.timeout(900)]

SOURCE = Path(__file__).parent / "native" / "paging_stress.c"
PROGRAM = "/tmp/paging_stress"
SEED = int(os.environ.get("RACKLESS_SEED", "2026"))
KILLS = int(os.environ.get("RACKLESS_KILLED_PROGRAMS", "60"))
TEXT_BYTES = 1 << 20
LOST = 70
BLADES = {
    "gm0": {"kind": "manager", "memory": "256 MiB"},
    "pb0": {"kind": "processor", "memory": "320 MiB"},
    **{f"mb{number}": {"kind": "memory", "memory": "320 MiB"} for number in range(3)},
    "sb0": {"kind": "storage", "memory": "256 MiB", "disk": {"size": "1 GiB"}},
}
MEMORY = ("mb0", "mb1", "mb2")
BOOKS = """
import json
from guest_agents import control
mine = json.load(open("/run/rackless/identity.json"))
where = mine["management"]["address"], control.PORT
print(json.dumps(control.call(where, bytes.fromhex(mine["secret"]), "memory.stats")))
"""
PAGER = """
import json
from pathlib import Path
from guest_agents.splitkernel.process import counters
jobs = [counters.processes(job) for job in Path("/run/rackless/jobs").iterdir()]
print(json.dumps(counters.total(one for job in jobs for one in job.values())))
"""
KILLER = f"""
import glob, os, random, signal, subprocess
chance = random.Random({SEED})
ended = paging = 0
for number in range({KILLS}):
    words = ["split", "run", "--excache", "4194304", "--replicas", str(number % 2 + 1), "--", "{PROGRAM}", "sequential",
             "6"]
    run = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        run.wait(chance.uniform(0, 2))
        ended += 1
    except subprocess.TimeoutExpired:
        paging += bool(glob.glob("/run/rackless/jobs/*/*.counters"))
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
print(ended, paging)
"""


@pytest.fixture(scope="module")
def three(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rack]:
    """A rack with three memory blades, which notices death soon."""
    program = tmp_path_factory.mktemp("paging") / "paging_stress"
    subprocess.run(["cc", "-std=gnu17", "-O2", "-o", program, SOURCE, "-lpthread"], check=True)
    timing = {"heartbeat": "0.5 s", "dead_after": "6 s"}
    with bench.up("m", "pair", blades=BLADES, membership=timing) as rack:
        rack("cp", str(program), f"pb0:{PROGRAM}")
        rack.on("pb0", f"chmod +x {PROGRAM}")
        yield rack


@pytest.fixture(autouse=True)
def complete(three: Rack) -> None:
    """Every test begins with all blades."""
    three.bench.rackless("up", str(three.file))


def books(rack: Rack, blade: str) -> dict[str, int]:
    """What a memory blade has lent."""
    return dict(json.loads(rack.on(blade, f"python3 -c {shlex.quote(BOOKS)}")))


def assert_nothing_is_lent(rack: Rack, *blades: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while True:
        lent = {blade: books(rack, blade) for blade in blades}
        full = {
            blade: held for blade, held in lent.items()
            if held["regions"] or held["bytes_allocated"] or held["bytes_registered"] or held["connections"]
        }  # fmt: skip
        if not full:
            return
        assert time.monotonic() < deadline, f"still lent: {full}"
        time.sleep(1)


def destroy(rack: Rack, blade: str) -> None:
    """Cut a blade's power."""
    bench = rack.bench
    settings = Settings.from_environment({**os.environ, **bench.env()})
    with daemon.connection(RackPaths(settings, rack.name)) as conn:
        assert conn is not None
        domain.owned(conn, rack.name)[blade].domain.destroy()


def pager(rack: Rack) -> dict[str, Any]:
    """What the pager of the program on pb0 has counted until now."""
    return dict(json.loads(rack.on("pb0", f"python3 -c {shlex.quote(PAGER)}")))


def run_and(rack: Rack, act: Callable[[], object], lender: str, seconds: float, *words: str,
            until: Callable[[dict[str, Any]], bool] = lambda counted: True) -> Any:  # fmt: skip
    """Run a program on pb0 and act so many seconds after it had pages on `lender`; what it printed, when it ended.

    Its standard input ends when its pager's counters are as `until` wants them.
    """
    command = rack.bench.command("run", "--rack", rack.name, "--on", "pb0", *words)
    process = subprocess.Popen(command, env=rack.bench.env(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)  # fmt: skip
    try:
        while not pager(rack)["blades"].get(lender, {}).get("flushes"):
            assert process.poll() is None, "it ended before it had outgrown its ExCache"
        time.sleep(seconds)
        assert process.poll() is None, "it ended too soon"
        act()
        while process.poll() is None and not until(pager(rack)):
            time.sleep(0.5)
        output, errors = process.communicate(timeout=600)
    finally:
        process.kill()
    return process.returncode, output, errors.decode()


def is_whole_again(counted: dict[str, Any]) -> bool:
    """The program has lost a blade, and all its pages are on two again."""
    return bool(counted["rereplicated_bytes"] and not counted["degraded_regions"])


def run_and_destroy(rack: Rack, victim: str, seconds: float, *words: str) -> Any:
    """Run a program on pb0 and cut the power of `victim` so many seconds after it had pages there."""
    return run_and(rack, lambda: destroy(rack, victim), victim, seconds, *words, until=is_whole_again)


def assert_it_went_on(stats: Path) -> None:
    counted = json.loads(stats.read_text())
    print({name: counted[name] for name in ("failovers", "replica_writes", "rereplicated_bytes", "degraded_regions",
                                            "regions", "misses", "flushes", "wall_seconds")})  # fmt: skip
    assert counted["failovers"] == 1
    assert counted["replica_writes"] > 100
    assert counted["rereplicated_bytes"] > 0
    assert counted["degraded_regions"] == 0


@pytest.mark.parametrize("victim", ["mb1", "mb2"])
def test_every_byte_survives_a_blade(three: Rack, victim: str, tmp_path: Path) -> None:
    stats = tmp_path / "stats.json"
    words = ("--replicas", "2", "--excache", "4MiB", "--stats", str(stats), "--", PROGRAM, "mixed", "16", "0")
    code, output, errors = run_and_destroy(three, victim, random.Random(f"{SEED}{victim}").uniform(0, 4), *words)
    assert (code, errors) == (0, ""), output
    assert_it_went_on(stats)
    assert_nothing_is_lent(three, *(set(MEMORY) - {victim}))


def test_gawk_counts_words_while_a_blade_dies(three: Rack, tmp_path: Path) -> None:
    with english(Settings.from_environment()).open("rb") as source:
        text = source.read(TEXT_BYTES)
    (tmp_path / "english.txt").write_bytes(text)
    three("cp", str(tmp_path / "english.txt"), "sb0:/vnode/english.txt")
    stats = tmp_path / "stats.json"
    words = ("--replicas", "2", "--excache", "4MiB", "--stats", str(stats), "--",
             "env", "LC_ALL=C", "gawk", COUNT_WORDS, "english.txt")  # fmt: skip
    code, output, errors = run_and_destroy(three, "mb0", 1, *words)
    assert (code, errors) == (0, "")
    counted = {word: int(count) for count, word in (line.split(b" ", 1) for line in output.splitlines())}
    assert counted == Counter(re.findall(rb"[a-z]+", text.lower()))
    assert_it_went_on(stats)


def test_without_replicas_a_program_ends_with_one_line(three: Rack) -> None:
    words = ("--excache", "4MiB", "--", PROGRAM, "mixed", "16", "0")
    code, _output, errors = run_and_destroy(three, "mb1", 1, *words)
    assert code == LOST
    assert re.fullmatch(
        r"rackless: memory blade mb1 is lost \(.*\): the program's memory is no longer whole, it ends here\n", errors
    )
    assert_nothing_is_lent(three, "mb0", "mb2")


@pytest.mark.parametrize("replicas", ["1", "2"])
def test_a_restart_of_the_manager_harms_no_program(three: Rack, replicas: str, tmp_path: Path) -> None:
    stats = tmp_path / "stats.json"
    words = ("--replicas", replicas, "--excache", "4MiB", "--stats", str(stats), "--", PROGRAM, "mixed", "16", "0")

    def restart() -> None:
        three.kill_agent("gm0")
        deadline = time.monotonic() + 120
        while three.bench.status(three.name)["gm0"]["state"] != "ready":
            assert time.monotonic() < deadline, "the manager does not come back"

    code, output, errors = run_and(three, restart, "mb0", 1, *words)
    assert (code, errors) == (0, ""), output
    assert json.loads(stats.read_text())["failovers"] == 0
    assert_nothing_is_lent(three, *MEMORY)


def test_killed_programs_leave_nothing_behind(three: Rack) -> None:
    said = three("ssh", "pb0", "--", f"python3 -c {shlex.quote(KILLER)}", seconds=880).stdout
    ended, paging = map(int, said.split())
    print(f"seed {SEED}: {KILLS - ended} of {KILLS} were killed before they ended, {paging} with memory on blades")
    assert ended < KILLS // 2
    assert paging > KILLS // 10
    assert_nothing_is_lent(three, *MEMORY)
    assert three.on("pb0", "ls /run/rackless/jobs").strip() == ""
