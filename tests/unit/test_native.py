"""The native allocator, packed pages and the preloaded shim, on this machine: no VM, no userfaultfd, no RDMA."""

from __future__ import annotations

import os
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
