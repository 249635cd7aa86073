"""One command at a time changes a rack; the other says who is at it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator import lock
from orchestrator.errors import RacklessError
from orchestrator.settings import RackPaths, Settings

ROOT = Path(__file__).parents[2]

HOLDER = """
import sys
from pathlib import Path
from dataclasses import replace
from orchestrator import lock
from orchestrator.settings import RackPaths, Settings

settings = Settings.from_environment({"HOME": "/", "RACKLESS_STATE": sys.argv[1]})
with lock.hold(RackPaths(settings, "t1")):
    print("held", flush=True)
    sys.stdin.read(1)
"""


@pytest.fixture
def paths(tmp_path: Path) -> RackPaths:
    settings = Settings.from_environment({"HOME": str(tmp_path), "RACKLESS_STATE": str(tmp_path / "state")})
    return RackPaths(replace(settings, lock_seconds=0.2), "t1")


@pytest.fixture
def holder(paths: RackPaths) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDER, str(paths.settings.state_dir)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_one_names_the_holder(paths: RackPaths, holder: subprocess.Popen[str]) -> None:
    started = time.monotonic()
    with pytest.raises(RacklessError) as caught, lock.hold(paths):
        pass
    assert 0.2 <= time.monotonic() - started < 5
    assert f"rack t1 is being changed by process {holder.pid} (`-c {paths.settings.state_dir}`" in caught.value.message
    assert lock.held(paths)
    holder.communicate("x", timeout=10)
    assert not lock.held(paths)


def test_kill_9_frees_it(paths: RackPaths, holder: subprocess.Popen[str]) -> None:
    assert lock.held(paths)
    holder.kill()
    assert holder.wait(10) == -signal.SIGKILL
    holder.communicate()
    assert not lock.held(paths)
    with lock.hold(paths):  # although its name is still in the file
        assert lock.held(paths)
    assert not lock.held(paths)


def test_it_waits_for_one_that_ends_in_time(paths: RackPaths, holder: subprocess.Popen[str]) -> None:
    patient = RackPaths(replace(paths.settings, lock_seconds=30), "t1")
    assert holder.stdin is not None
    holder.stdin.write("x")
    holder.stdin.flush()
    with lock.hold(patient):
        pass
    holder.communicate()


def test_a_failure_inside_frees_it(paths: RackPaths) -> None:
    with pytest.raises(ValueError), lock.hold(paths):
        raise ValueError
    with lock.hold(paths):
        pass


def test_racks_do_not_share_it(paths: RackPaths) -> None:
    other = RackPaths(paths.settings, "t2")
    with lock.hold(paths), lock.hold(other):
        assert lock.held(other)


def test_asking_makes_nothing(paths: RackPaths) -> None:
    assert not lock.held(paths)
    assert not paths.settings.state_dir.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', '{"pid": 1, "command": "up", "since": "x"}'])
def test_a_damaged_note_does_not_hide_the_refusal(paths: RackPaths, text: str) -> None:
    with lock.hold(paths):
        (paths.settings.state_dir / "locks/t1").write_text(text)
        with pytest.raises(RacklessError, match="being changed by another process"), lock.hold(paths):
            pass


def test_the_note_is_gone_afterwards(paths: RackPaths) -> None:
    with lock.hold(paths):
        assert f'"pid": {os.getpid()}' in (paths.settings.state_dir / "locks/t1").read_text()
    assert (paths.settings.state_dir / "locks/t1").read_text() == ""
