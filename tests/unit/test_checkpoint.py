"""Checkpoint and restart of real programs under the real shim and pager, over stand-in verbs and memory blades. No VM."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.unit.paging_stage import FLAGS, HERE, NATIVE, PAGER, SHIM, SPLIT, STRESS, missing
from tests.unit.split_blades import Rack, eventually

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(missing() is not None, reason=missing() or ""),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, as on a blade"),
]
WANDER = STRESS.with_name("wander.c")
SECONDS = 60


@dataclass
class Started:
    """A program that runs."""

    process: subprocess.Popen[bytes]
    stdout: Path
    stderr: Path

    def until(self, line: str) -> None:
        """Until it has printed that."""
        eventually(lambda: line in self.stdout.read_text().splitlines(), SECONDS)


class Stage:
    """`split` of a blade pb0, whose memory blades are in the programs themselves."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.vnode = folder, folder / "vnode"
        self.vnode.mkdir()
        self.split, self.wander = folder / "split", str(folder / "wander")
        places = [f'-DMONITOR_SOCKET="{folder}/pb0.sock"', f'-DVNODE="{self.vnode}"']
        builtin = [f"-fno-builtin-{name}" for name in ("malloc", "calloc", "realloc", "free")]
        shared = [*FLAGS, "-fPIC", "-shared"]
        fakes = [HERE / "fake_monitor.c", HERE / "fake_verbs.c"]
        for target, flags, sources in (
            ("split", [*FLAGS, *places], [NATIVE / name for name in SPLIT]),
            ("excache_shim.so", [*shared, *builtin], [NATIVE / name for name in SHIM]),
            ("excache_pager.so", shared, [*(NATIVE / name for name in PAGER), *fakes]),
            ("wander", ["-O2"], [WANDER]),
        ):
            subprocess.run(["cc", *flags, "-o", folder / target, *sources, "-lpthread", "-lm"], check=True)
        self.rack = Rack(folder, ("gm0", "pb0", "mb0", "sb0"))

    def __call__(self, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([self.split, *words], capture_output=True, text=True, timeout=SECONDS, cwd=self.vnode,
                              stdin=subprocess.DEVNULL)  # fmt: skip
        assert done.returncode == code, done
        return done

    def start(self, *command: str, excache: int = 4 << 20, **env: str) -> Started:
        words = [str(self.split), "run", "--excache", str(excache), "--", *command]
        files = self.folder / "stdout", self.folder / "stderr"
        with files[0].open("w") as out, files[1].open("w") as error:
            process = subprocess.Popen(words, cwd=self.vnode, stdout=out, stderr=error, stdin=subprocess.DEVNULL,
                                       env={**os.environ, "FAKE_ALONE": "1", **env})  # fmt: skip
        return Started(process, *files)

    def program(self) -> str:
        """The one that runs."""
        eventually(lambda: len(self.rack["pb0"].belonging.programs.running()) == 1)
        return next(iter(self.rack["pb0"].belonging.programs.running()))

    def alone(self) -> None:
        """Until the desk has heard of the end of all programs."""
        eventually(lambda: not list((self.folder / "pb0.jobs").iterdir()))


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    made = Stage(tmp_path_factory.mktemp("checkpoint"))
    yield made
    made.rack.close()


def frozen(stage: Stage, program: Started) -> str:
    """Checkpoint the one program; its name."""
    name = stage("checkpoint", stage.program()).stdout.strip()
    assert program.process.wait(SECONDS) == 75
    said = f"rackless: checkpointed as {name}: `rackless restart {name} --on BLADE` goes on with it\n"
    assert program.stderr.read_text() == said
    stage.alone()
    return name


@pytest.mark.parametrize(("mebibytes", "threads"), [(2, 1), (12, 1), (12, 4)])
def test_a_program_goes_on(stage: Stage, mebibytes: int, threads: int) -> None:
    """That fits its ExCache; that does not; with threads. What it prints is what it would have printed at once."""
    words = [stage.wander, str(mebibytes), "12", "out", str(threads)]
    whole = stage("run", "--excache", str(4 << 20), "--", *words).stdout
    program = stage.start(*words)
    program.until("step 3")
    name = frozen(stage, program)
    assert name in stage("checkpoint", "--list").stdout
    done = stage("restart", name)
    assert (program.stdout.read_text() + done.stdout, done.stderr) == (whole, "")
    assert (stage.vnode / "out").read_text() == "begin\nend\n"
    assert f"there is no checkpoint {name} (restarted already?)" in stage("restart", name, code=125).stderr
