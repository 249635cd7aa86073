"""The job script of a sweep, with a stand-in for `rackless` that notes how it is called: no Slurm, no blades."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

PROJECT = Path(__file__).parent.parent.parent
STAND_IN = """#!/bin/sh
echo "$1 $RACKLESS_RUN" >> "$SLURM_SUBMIT_DIR/calls"
case $1 in
up) grep ^name: "$2" >> "$SLURM_SUBMIT_DIR/calls" ;;
run)
    while [ $# -gt 0 ]; do [ "$1" = --stats ] && echo '{}' > "$2"; shift; done
    [ ! -e "$SLURM_SUBMIT_DIR/slow" ] || exec sleep 20 ;;
esac
"""


def task(folder: Path, number: int) -> subprocess.Popen[bytes]:
    """One task of the array job, begun."""
    for name, text in (("rackless", STAND_IN), ("sudo", '#!/bin/sh\nshift\nexec "$@"\n')):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    for part in ("racks", "tmp"):
        (folder / part).mkdir(exist_ok=True)
    (folder / "racks/default.yml").write_text((PROJECT / "racks/default.yml").read_text())
    return subprocess.Popen(["bash", PROJECT / "experiments/sweep.sbatch"], env={
        "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": str(number), "SLURM_JOB_ID": f"77{number}",
        "SLURM_SUBMIT_DIR": str(folder), "SLURM_TMPDIR": str(folder / "tmp")})  # fmt: skip


def test_a_task_brings_up_a_rack_of_its_own_and_takes_it_down(tmp_path: Path) -> None:
    assert task(tmp_path, 3).wait() == 0
    run = "/run/rackless-773"
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == [f"up {run}", "name: sweep-3", f"run {run}", f"down {run}"]
    assert (tmp_path / "results/sweep-3.json").exists()
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_task_that_slurm_ends_takes_its_rack_down(tmp_path: Path) -> None:
    (tmp_path / "slow").touch()
    running = task(tmp_path, 0)
    deadline = time.monotonic() + 30
    while not ((tmp_path / "calls").exists() and "run " in (tmp_path / "calls").read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    running.send_signal(signal.SIGTERM)
    assert running.wait() == 143
    assert (tmp_path / "calls").read_text().splitlines()[-1] == "down /run/rackless-770"
    assert not (tmp_path / "results/sweep-0.json").exists()
    assert list((tmp_path / "tmp").iterdir()) == []
