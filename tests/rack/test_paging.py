"""Memory larger than the ExCache, checked byte for byte: random use, threads, fork, mmap, a blade that dies."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

from tests.rack.conftest import Rack

pytestmark = [pytest.mark.rack, pytest.mark.timeout(600)]

SOURCE = Path(__file__).parent / "native" / "paging_stress.c"
PROGRAM = "/tmp/paging_stress"


@pytest.fixture(scope="module")
def stress(rack: Rack, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The stress program, compiled here (its C library may be older than the blade's, not newer)."""
    program = tmp_path_factory.mktemp("paging") / "paging_stress"
    subprocess.run(["cc", "-std=gnu17", "-O2", "-o", program, SOURCE, "-lpthread"], check=True)
    rack("cp", str(program), f"pb0:{PROGRAM}")
    rack.on("pb0", f"chmod +x {PROGRAM}")
    return PROGRAM


@pytest.mark.parametrize(
    ("mode", "mebibytes", "rounds"),
    [
        ("sequential", 16, 2),
        ("mixed", 16, 1),
        ("skewed", 16, 2),
        ("blocks", 16, 1),
        ("maps", 16, 1),
        ("threads", 16, 1),
        ("forks", 12, 1),
        ("orphan", 8, 1),
    ],
)
def test_every_byte_comes_back(
    rack: Rack, stress: str, mode: str, mebibytes: int, rounds: int, tmp_path: Path
) -> None:
    stats = tmp_path / "stats.json"
    words = ["--on", "pb0", "--excache", "4MiB", "--stats", str(stats), "--", stress, mode, str(mebibytes), str(rounds)]
    done = rack("run", *words, check=False, seconds=400)
    assert done.returncode == 0, done.stdout + done.stderr
    counted = json.loads(stats.read_text())
    assert counted["managed"] == 1
    assert counted["flushes"] > 100
    assert 0 < counted["pool_bytes"] <= counted["excache_bytes"] * 3 // 4


@pytest.mark.parametrize(
    "options",
    [
        ("--ways", "8", "--policy", "lru"),
        ("--ways", "64", "--policy", "random", "--victim", "8", "--prefetch", "1"),
        ("--no-pool", "--policy", "lru"),
    ],
)
def test_every_byte_comes_back_however_the_excache_is_organised(
    rack: Rack, stress: str, options: tuple[str, ...], tmp_path: Path
) -> None:
    stats = tmp_path / "stats.json"
    words = ["--on", "pb0", "--excache", "4MiB", "--stats", str(stats), *options, "--", stress, "mixed", "8"]
    done = rack("run", *words, check=False, seconds=400)
    assert done.returncode == 0, done.stdout + done.stderr
    counted = json.loads(stats.read_text())
    assert (counted["sets"] > 1) == ("--ways" in options)
    assert (counted["dozes"] > 0) == ("lru" in options)
    assert counted["packed"] == 0


def test_children_of_a_killed_program_go_on(rack: Rack, stress: str) -> None:
    """Its child, that one's child and so on; and one more of each, forked while its memory comes."""
    rack.on("pb0", "rm -f /tmp/killed")
    run = ["--on", "pb0", "--excache", "4MiB", "--", "sh", "-c", f"exec {stress} killed 8 3000 > /tmp/killed 2>&1"]
    assert rack("run", *run, check=False, seconds=400).returncode == 137
    fine = sorted(f"depth {depth}: fine" for depth in (0, 1, 2, 3, 10, 11, 12, 13))
    deadline = time.monotonic() + 120
    while len(said := rack.on("pb0", "cat /tmp/killed").splitlines()) < len(fine) and time.monotonic() < deadline:
        time.sleep(1)
    assert sorted(said) == fine


def test_all_remote_memory_is_returned(rack: Rack, stress: str) -> None:
    rack("run", "--on", "pb0", "--excache", "4MiB", "--", stress, "sequential", "16")
    killed = rack("run", "--on", "pb0", "--excache", "4MiB", "--", "timeout", "-s", "KILL", "4", stress, "mixed", "16",
                  "99", check=False)  # fmt: skip
    assert killed.returncode != 0
    blade = rack.on("pb0", "ls /run/rackless/jobs")
    assert blade.strip() == ""


def test_a_program_that_wants_too_much_is_told(rack: Rack) -> None:
    script = "x = []\ntry:\n  while True: x.append(bytearray(64 << 20))\nexcept MemoryError: print('refused')"
    done = rack("run", "--on", "pb0", "--excache", "4MiB", "--", "python3", "-c", script, seconds=500)
    assert done.stdout == "refused\n"
