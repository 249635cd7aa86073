"""The native allocator, packed pages and the preloaded shim, on this machine: no VM, no userfaultfd, no RDMA."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from guest_agents.splitkernel.process import counters

HERE = Path(__file__).parent / "native"
NATIVE = Path(__file__).parents[2] / "guest_agents" / "native"
pytestmark = [pytest.mark.long, pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")]
FLAGS = ["-std=gnu17", "-O1", "-g", "-Wall", "-Wextra", f"-I{NATIVE}"]


@pytest.fixture(scope="session")
def stress(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("native") / "heap_stress"
    sources = [HERE / "heap_stress.c", NATIVE / "heap.c", NATIVE / "arena.c"]
    subprocess.run(["cc", *FLAGS, "-fsanitize=undefined", "-o", program, *sources, "-lpthread"], check=True)
    return program


@pytest.mark.parametrize("seed", range(4))
def test_heap(stress: Path, seed: int) -> None:
    done = subprocess.run([stress, "60000", str(seed)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr


@pytest.fixture(scope="session")
def pool_stress(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("pool") / "pool_stress"
    sources = [HERE / "pool_stress.c", *(NATIVE / name for name in ("pool.c", "codec.c", "arena.c"))]
    subprocess.run(["cc", *FLAGS, "-fsanitize=undefined", "-o", program, *sources], check=True)
    return program


@pytest.mark.parametrize("seed", range(4))
def test_packed_pages_come_back(pool_stress: Path, seed: int) -> None:
    done = subprocess.run([pool_stress, "30000", str(seed)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr


@pytest.fixture(scope="session")
def sets_stress(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("sets") / "sets_stress"
    sources = [HERE / "sets_stress.c", NATIVE / "sets.c", NATIVE / "arena.c"]
    subprocess.run(["cc", *FLAGS, "-fsanitize=undefined", "-o", program, *sources], check=True)
    return program


def test_lines_leave_their_set_in_the_order_of_the_policy(sets_stress: Path) -> None:
    seen = set()
    for seed in range(30):
        done = subprocess.run([sets_stress, "20000", str(seed)], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, ""), f"{seed}: {done.stdout}{done.stderr}"
        seen.add(done.stdout.split("policy ")[1][0])
    assert seen == {"0", "1", "2"}


@pytest.fixture(scope="session")
def streams_check(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("streams") / "streams_check"
    subprocess.run(["cc", *FLAGS, "-Werror", "-fsanitize=undefined", "-o", program, HERE / "streams_check.c",
                    NATIVE / "streams.c"], check=True)  # fmt: skip
    return program


def brought(check: Path, faults: list[int], most: int = 32) -> list[tuple[int, int]]:
    """For each fault the first page that comes, and how many do."""
    asked = "".join(f"{page} {most}\n" for page in faults)
    done = subprocess.run([check], input=asked, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    numbers = [int(word) for word in done.stdout.split()]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def faulted(check: Path, touched: list[int], most: int = 32) -> list[int]:
    """Those of the touched pages that fault, if what has come once stays."""
    faults: list[int] = []
    there: set[int] = set()
    for page in touched:
        if page not in there:
            faults.append(page)
            first, count = brought(check, faults, most)[-1]
            there |= set(range(first, first + count))
    return faults


@pytest.mark.parametrize("step", [1, -1])
def test_who_goes_in_order_faults_less_and_less_often(streams_check: Path, step: int) -> None:
    faults = faulted(streams_check, [5000 + step * i for i in range(200)])
    assert [abs(page - 5000) for page in faults[:6]] == [0, 1, 3, 7, 15, 31]
    assert len(faults) == 11  # then 32 at a time


def test_streams_are_known_apart_and_from_random_faults(streams_check: Path) -> None:
    """A merge: two inputs and the output, from their ends downwards, and five random pages between."""
    chance = random.Random(1)
    others = [100_000 + 10 * page for page in chance.sample(range(10_000), 3000)]
    touched = [page for i in range(200) for page in (9000 - i, 19000 - i, 29000 - i, *others[5 * i : 5 * i + 5])]
    faults = faulted(streams_check, touched)
    assert sum(page >= 100_000 for page in faults) == 1000  # random ones bring nobody
    assert sum(page < 100_000 for page in faults) == 3 * 11


def test_random_faults_bring_one_page(streams_check: Path) -> None:
    chance = random.Random(2)
    runs = brought(streams_check, chance.sample(range(0, 1 << 20), 500))
    assert sum(count for _, count in runs) < 520
    assert brought(streams_check, [7, 7, 900, 7]) == [(7, 1), (7, 1), (900, 1), (7, 1)]


def test_a_stream_ends_at_the_first_page_and_brings_no_more_than_it_may(streams_check: Path) -> None:
    assert brought(streams_check, [3, 2, 0]) == [(3, 1), (1, 2), (0, 1)]
    assert brought(streams_check, [10, 11, 13, 17], most=3) == [(10, 1), (11, 2), (13, 3), (17, 3)]


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("shim") / "excache_shim.so"
    sources = [NATIVE / name for name in ("shim.c", "malloc.c", "mappings.c", "descriptors.c", "heap.c", "arena.c")]
    builtin = [f"-fno-builtin-{name}" for name in ("malloc", "calloc", "realloc", "free")]
    subprocess.run(["cc", *FLAGS, "-Werror", *builtin, "-fPIC", "-shared", "-o", library, *sources], check=True)
    return library


@pytest.mark.parametrize(
    "command",
    [
        "seq 200000 | shuf --random-source=/dev/zero | sort -n | md5sum",
        "seq 100000 | sort --parallel=3 -S 1M -r | md5sum",
        "seq 20000 | awk '{ n[$1 % 977] += $1 } END { for (i in n) s += n[i]; print s; system(\"echo child\") }'",
        "python3 -c 'import json, re, hashlib; x = [str(i) * (i % 50) for i in range(20000)];"
        " print(hashlib.md5(json.dumps(x).encode()).hexdigest())'",
        "python3 -c 'import mmap; m = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS);"
        " m[5] = 7; m.resize(1 << 21); print(m[5], m[-1])'",
        "python3 -c 'import os; p = os.fork(); p or os._exit(3); print(os.waitpid(p, 0)[1] >> 8)'",
        "bash -c 'for i in 1 2 3; do x=$(echo $i | tr 1-3 a-c); echo $x; done; exit 5'",
    ],
)
def test_programs_run_the_same_under_the_shim(shim: Path, command: str, tmp_path: Path) -> None:
    environment = {**os.environ, "LC_ALL": "C"}
    plain = subprocess.run(["bash", "-c", command], capture_output=True, env=environment, timeout=60)
    environment |= {"LD_PRELOAD": str(shim), "RACKLESS_EXCACHE": str(1 << 30), "RACKLESS_JOB": str(tmp_path)}
    preloaded = subprocess.run(["bash", "-c", command], capture_output=True, env=environment, timeout=60)
    assert (preloaded.returncode, preloaded.stdout) == (plain.returncode, plain.stdout)
    assert preloaded.stderr == plain.stderr
    counted = counters.processes(tmp_path)
    assert len(counted) == len(list(tmp_path.glob("*.counters"))) > 0
    assert all(one["pages_touched"] and not one["managed"] and not one["blades"] for one in counted.values())
    assert all(one["command"].isprintable() and one["command"] for one in counted.values())


def test_what_a_program_touched_counts_also_when_it_was_freed(shim: Path, tmp_path: Path) -> None:
    own = {"LD_PRELOAD": str(shim), "RACKLESS_EXCACHE": str(1 << 30), "RACKLESS_JOB": str(tmp_path)}
    script = "x = bytearray(b'x') * (8 << 20); del x; x = bytearray(1 << 20); x[0] = 1"
    subprocess.run(["python3", "-c", script], check=True, env=os.environ | own, timeout=60)
    most = max(one["pages_touched"] for one in counters.processes(tmp_path).values())
    assert 8 << 20 <= most * 4096 < 32 << 20


def test_without_a_pager_a_program_gets_no_more_than_its_excache(shim: Path, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "LD_PRELOAD": str(shim),
        "RACKLESS_EXCACHE": str(16 << 20),
        "RACKLESS_JOB": str(tmp_path),
    }
    done = subprocess.run(
        ["python3", "-c", "x = bytearray(64 << 20)"], capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.returncode == 1
    assert "MemoryError" in done.stderr
    assert "rackless: no remote memory" in done.stderr
