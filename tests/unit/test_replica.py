"""Programs whose memory blades die: the real shim, pager and userfaultfd, over stand-in verbs and memory blades."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from guest_agents.splitkernel.process import counters

HERE = Path(__file__).parent / "native"
NATIVE = Path(__file__).parents[2] / "guest_agents" / "native"
STRESS = Path(__file__).parents[1] / "rack/native/paging_stress.c"
SHIM = ("shim.c", "malloc.c", "mappings.c", "descriptors.c", "heap.c", "arena.c")
PAGER = ("pager.c", "family.c", "lines.c", "evict.c", "pool.c", "codec.c", "wire.c", "replica.c", "fabric.c")
FLAGS = ["-std=gnu17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", f"-I{NATIVE}"]
SECONDS = 30
LOST = 70
"""Exit code of a program that lost the only copy of some memory."""


def missing() -> str | None:
    """Why these tests cannot run here, or None."""
    if shutil.which("cc") is None:
        return "no C compiler"
    probe = ["cc", "-E", "-include", "infiniband/verbs.h", "-x", "c", "/dev/null"]
    if subprocess.run(probe, capture_output=True).returncode:
        return "no headers of libibverbs"
    allowed = Path("/proc/sys/vm/unprivileged_userfaultfd")
    if not allowed.exists() or (os.geteuid() != 0 and allowed.read_text().strip() != "1"):
        return "userfaultfd is not allowed here"
    return None


pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")


@dataclass(frozen=True)
class Done:
    """How a program ended."""

    code: int
    stdout: str
    stderr: str
    counted: dict[str, Any]


class Stage:
    """Where programs run with stand-in memory blades (native/fake_monitor.c says what `events` are)."""

    def __init__(self, folder: Path) -> None:
        self.stress = str(folder / "paging_stress")
        self._folder = folder
        builtin = [f"-fno-builtin-{name}" for name in ("malloc", "calloc", "realloc", "free")]
        shared = [*FLAGS, "-fPIC", "-shared"]
        fakes = [HERE / "fake_monitor.c", HERE / "fake_verbs.c"]
        for target, flags, sources in (
            ("excache_shim.so", [*shared, *builtin], [NATIVE / name for name in SHIM]),
            ("excache_pager.so", shared, [*(NATIVE / name for name in PAGER), *fakes]),
            ("paging_stress", ["-O2"], [STRESS]),
        ):
            subprocess.run(["cc", *flags, "-o", folder / target, *sources, "-lpthread"], check=True)

    def run(
        self, *command: str, replicas: int = 2, events: str = "", excache: int = 4 << 20, stdin: str = "", **settings: int
    ) -> Done:
        """Run a program to its end."""
        job = self._folder / "job"
        shutil.rmtree(job, ignore_errors=True)
        job.mkdir()
        environment = {
            **os.environ, "LC_ALL": "C", "LD_PRELOAD": str(self._folder / "excache_shim.so"),
            "RACKLESS_EXCACHE": str(excache), "RACKLESS_JOB": str(job), "RACKLESS_REPLICAS": str(replicas),
            "FAKE_EVENTS": events, **{f"FAKE_{name.upper()}": str(value) for name, value in settings.items()},
        }  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=SECONDS, input=stdin)
        return Done(done.returncode, done.stdout, done.stderr, counters.total(job))


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage(tmp_path_factory.mktemp("replica"))


MODES = [("mixed", 16, 1), ("skewed", 16, 2), ("blocks", 16, 1), ("maps", 16, 1), ("threads", 16, 1), ("forks", 12, 1)]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("mode", "mebibytes", "rounds"), MODES)
def test_every_byte_survives_a_death(stage: Stage, mode: str, mebibytes: int, rounds: int, seed: int) -> None:
    chance = random.Random(f"{mode}{seed}")
    events = f"{chance.randrange(3)}{chance.choice('xsl')}{chance.randrange(1, 1500)}"
    done = stage.run(stage.stress, mode, str(mebibytes), str(rounds), events=events)
    assert (done.code, done.stderr) == (0, ""), f"{events}: {done}"
    assert done.counted["failovers"] == 1, f"{events}: {done}"
