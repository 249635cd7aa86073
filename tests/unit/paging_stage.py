"""Where programs page without blades: the real shim, pager and userfaultfd, over stand-in verbs and memory blades."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guest_agents.splitkernel.process import counters

HERE = Path(__file__).parent / "native"
NATIVE = Path(__file__).parents[2] / "guest_agents" / "native"
STRESS = Path(__file__).parents[1] / "rack/native/paging_stress.c"
CALLS = STRESS.with_name("memory_calls.c")
SHIM = ("shim.c", "malloc.c", "mappings.c", "descriptors.c", "heap.c", "arena.c")
PAGER = ("pager.c", "attach.c", "park.c", "family.c", "lines.c", "streams.c", "sets.c", "evict.c", "pool.c", "codec.c",
         "wire.c", "replica.c", "trace.c", "fabric.c")  # fmt: skip
SPLIT = ("split.c", "desk.c", "results.c", "tier.c", "freeze.c", "refuse.c", "thaw.c", "shelved.c", "tracee.c",
         "image.c")  # fmt: skip
FLAGS = ["-std=gnu17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", f"-I{NATIVE}"]
SECONDS = 200


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


@dataclass(frozen=True)
class Done:
    """How a program ended."""

    code: int
    stdout: str
    stderr: str
    counted: dict[str, Any]


class Stage:
    """Where programs run with stand-in memory blades (native/fake_monitor.c says what `events` are).

    checked -- after every few faults the pager's books are looked into (native/lines_check.c)
    """

    def __init__(self, folder: Path, checked: bool = False) -> None:
        self.stress = str(folder / "paging_stress")
        self.calls = str(folder / "memory_calls")
        self._folder = folder
        wrap = "-Wl,--wrap=lines_miss,--wrap=lines_write,--wrap=lines_drop"
        check = [HERE / "lines_check.c", wrap] if checked else []
        builtin = [f"-fno-builtin-{name}" for name in ("malloc", "calloc", "realloc", "free")]
        shared = [*FLAGS, "-fPIC", "-shared"]
        fakes = [HERE / "fake_monitor.c", HERE / "fake_verbs.c"]
        for target, flags, sources in (
            ("excache_shim.so", [*shared, *builtin], [NATIVE / name for name in SHIM]),
            ("excache_pager.so", shared, [*(NATIVE / name for name in PAGER), *fakes, *check]),
            ("paging_stress", ["-O2"], [STRESS]),
            ("memory_calls", ["-O2"], [CALLS]),
        ):
            subprocess.run(["cc", *flags, "-o", folder / target, *sources, "-lpthread"], check=True)

    def run(
        self,
        *command: str,
        replicas: int = 2,
        events: str = "",
        excache: int = 4 << 20,
        stdin: str = "",
        organisation: Mapping[str, str | int] = {},
        **more: int | str,
    ) -> Done:
        """Run a program to its end; `more` are other settings of fake_monitor.c, `organisation` options of `split`."""
        job = self._folder / "job"
        shutil.rmtree(job, ignore_errors=True)
        job.mkdir()
        environment = {
            **os.environ, "LC_ALL": "C", "LD_PRELOAD": str(self._folder / "excache_shim.so"),
            "RACKLESS_EXCACHE": str(excache), "RACKLESS_JOB": str(job), "RACKLESS_REPLICAS": str(replicas),
            "FAKE_EVENTS": events, **{f"FAKE_{name.upper()}": str(value) for name, value in more.items()},
            **{f"RACKLESS_{name.upper()}": str(value) for name, value in organisation.items()},
        }  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=SECONDS, input=stdin)
        return Done(done.returncode, done.stdout, done.stderr, counters.total(counters.processes(job).values()))
