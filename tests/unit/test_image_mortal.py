"""Builders' commands end with the builder, also when it has no time to say goodbye."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrator.image.mortal import mortal, plain

ROOT = Path(__file__).parents[2]

# A builder whose command has a child in a session of its own, as dpkg's scripts may; both write where they are.
BUILDER = """
import subprocess, sys
from orchestrator.image.mortal import mortal
subprocess.run(mortal(["sh", "-c", "setsid sh -c 'while sleep 0.05; do echo x >> $0; done' $0 & wait", sys.argv[1]]))
"""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make a PID namespace")


def test_a_killed_builder_takes_all_of_its_command_along(tmp_path: Path) -> None:
    sign = tmp_path / "alive"
    builder = subprocess.Popen([sys.executable, "-c", BUILDER, sign], cwd=ROOT)
    deadline = time.monotonic() + 10
    while not sign.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    builder.kill()
    builder.wait()
    time.sleep(0.2)
    size = sign.stat().st_size
    time.sleep(0.4)
    assert sign.stat().st_size == size


def test_output_and_exit_code_are_those_of_the_command() -> None:
    done = subprocess.run(mortal(["sh", "-c", "echo out; echo err >&2; exit 7"]), capture_output=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == (b"out\n", b"err\n", 7)


def test_a_missing_program_is_missing_as_for_subprocess() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        mortal(["no-such-program", "-x"])
    assert caught.value.filename == "no-such-program"


def test_a_person_sees_the_command() -> None:
    assert plain(mortal(["sh", "-c", "true --"])) == f"{shutil.which('sh')} -c true --"
    assert plain(["make", "--", "x"]) == "make -- x"
