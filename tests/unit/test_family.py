"""Children of a program that is killed: they go on with the memory they had at their fork.

The real shim, pager, userfaultfd and heirs of the process monitor, over stand-in verbs; memory blades are files here.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from guest_agents.splitkernel.process.heirs import FILES, Heirs
from tests.unit.paging_stage import Stage, missing

pytestmark = [pytest.mark.long, pytest.mark.skipif(missing() is not None, reason=missing() or "")]
KILLED = -9
SETTLED = "1000"
"""Milliseconds after which all has been stored (family.c: 50)."""
FINE = sorted(f"depth {depth}: fine" for depth in (0, 1, 2, 3, 10, 11, 12, 13))


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage(tmp_path_factory.mktemp("family"), checked=True)


@dataclass
class Monitor:
    """The process monitor as far as forked children go; `lost` are memory blades that have died with the program."""

    folder: Path
    lost: set[int] = field(default_factory=set)
    children: int = 0
    forgotten: int = 0
    reads: int = 0

    def read(self, blade: int, address: int, rkey: int, size: int) -> bytes:
        if blade in self.lost:
            raise OSError("it has died")
        self.reads += 1
        file = os.open(self.folder / f"memory.{blade}", os.O_RDONLY)
        try:
            return os.pread(file, size, address - (1 << 44) - (blade << 36))
        finally:
            os.close(file)

    def serve(self, listener: socket.socket) -> None:
        client, _ = listener.accept()
        heirs = Heirs()
        with client:
            while True:
                text, files, _, _ = socket.recv_fds(client, 100, FILES, socket.MSG_CMSG_CLOEXEC)
                if not text:
                    break
                word, number = text.decode().split()
                if word == "heir":
                    self.children += 1
                    heirs.add(number, files)
                else:
                    self.forgotten += 1
                    heirs.forget(number)
        heirs.inherit(self.read)
        assert not heirs


@pytest.fixture
def monitored(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    @contextmanager
    def start(*lost: int) -> Iterator[Monitor]:
        made = Monitor(tmp_path, set(lost))
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(tmp_path / "heirs"))
            listener.listen()
            thread = threading.Thread(target=made.serve, args=(listener,))
            thread.start()
            yield made
            thread.join(30)
            assert not thread.is_alive()

    before = set(os.listdir("/proc/self/fd"))
    yield start
    assert set(os.listdir("/proc/self/fd")) <= before


def settings(folder: Path) -> dict[str, Any]:
    return {"heirs": str(folder / "heirs"), "memory": str(folder / "memory")}


@pytest.mark.parametrize("organisation", [{}, {"policy": "lru"}, {"ways": 8}], ids=str)
@pytest.mark.parametrize("replicas", [1, 2])
def test_descendants_of_a_killed_program_go_on(
    stage: Stage, monitored: Callable[..., Any], tmp_path: Path, organisation: dict[str, str | int], replicas: int
) -> None:
    with monitored() as monitor:
        done = stage.run(stage.stress, "killed", "8", SETTLED, replicas=replicas, organisation=organisation,
                         **settings(tmp_path))  # fmt: skip
    assert (done.code, done.stderr) == (KILLED, ""), done
    assert sorted(done.stdout.split("\n")[:-1]) == FINE
    assert monitor.children >= 4
    assert monitor.reads > 10


def test_a_second_copy_will_do(stage: Stage, monitored: Callable[..., Any], tmp_path: Path) -> None:
    with monitored(1) as monitor:
        done = stage.run(stage.stress, "killed", "8", SETTLED, **settings(tmp_path))
    assert sorted(done.stdout.split("\n")[:-1]) == FINE
    assert monitor.reads > 10


def test_lost_memory_is_never_read_as_zeros(stage: Stage, monitored: Callable[..., Any], tmp_path: Path) -> None:
    """The blades die with the program: SIGBUS, so no child says anything."""
    with monitored(0, 1, 2) as monitor:
        done = stage.run(stage.stress, "killed", "8", SETTLED, replicas=1, **settings(tmp_path))
    assert (done.code, done.stdout, monitor.reads) == (KILLED, "", 0), done


@pytest.mark.parametrize("seed", range(3))
def test_a_program_that_is_killed_at_once(
    stage: Stage, monitored: Callable[..., Any], tmp_path: Path, seed: int
) -> None:
    """Mostly before anything was stored: then its children get SIGBUS, but nobody ever sees other bytes."""
    with monitored():
        done = stage.run(stage.stress, "killed", "8", "0", replicas=1 + seed % 2, **settings(tmp_path))
    assert (done.code, done.stderr) == (KILLED, "")
    assert set(done.stdout.split("\n")[:-1]) <= set(FINE)


def test_without_a_process_monitor_descendants_are_not_given_zeros(stage: Stage) -> None:
    """The program loses its memory, ends its children, and spoils what theirs have lost."""
    done = stage.run(stage.stress, "killed", "8", SETTLED, replicas=1, events="0x400 1x401 2x402")
    assert (done.code, done.stdout) == (70, ""), done


def test_children_that_call_exec_are_forgotten(stage: Stage, monitored: Callable[..., Any], tmp_path: Path) -> None:
    script = """if True:
        import os, subprocess
        block = bytearray(os.urandom(8 << 20))
        for _ in range(100):
            child = os.fork()
            if not child:  # has a child of its own, of which the pager hears nothing but the fork
                if not (other := os.fork()):
                    os.execlp("true", "true")
                os.waitpid(other, 0)
                os.execlp("true", "true")
            os.waitpid(child, 0)
        print(len(block))"""
    with monitored() as monitor:
        done = stage.run(sys.executable, "-c", script, replicas=1, **settings(tmp_path))
    assert (done.code, done.stdout, done.stderr) == (0, f"{8 << 20}\n", "")
    assert done.counted["forks"] == monitor.children == 200
    assert monitor.forgotten > 150
