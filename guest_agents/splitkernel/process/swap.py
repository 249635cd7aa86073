"""The second tier: programs whose memory the pager cannot have are kept in a control group, and swap to memory blades.

For static programs, which load no library, and for whoever asks for it (`--tier swap`). A job's group may have as much
memory as its ExCache is large; beyond that the kernel swaps, to a device that `swapd` (native/swapd.c) serves from
memory blades. There is one such device, of the blade, while there are such jobs: the kernel does not let groups choose.
So where pages go is not up to the vNode; and when a memory blade dies that has some, all jobs of this tier end.

Of memory a group counts everything: file pages, the kernel's for it, page tables.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import select
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from guest_agents import control

PROGRAM = Path(__file__).parents[2] / "native" / "build" / "swapd"
MOUNT = Path("/sys/fs/cgroup")
DEVICE_BYTES = 4 << 30
"""Address space: the kernel needs 2 bytes for each 4 KiB of it, memory blades lend as it is used."""
SMALLEST = 4 << 20
"""Bytes: with less the kernel finds nothing to reclaim, and kills."""
START_SECONDS = 120.0
_EMPTY_SECONDS = 0.2
_NEWS_SECONDS = 0.5
_VMSTAT = Path("/proc/vmstat")
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
log = logging.getLogger("rackless.process")


class Swap:
    """The groups of jobs, and the device behind them; thread-safe."""

    def __init__(self, mount: Path = MOUNT, program: Path = PROGRAM) -> None:
        self._mount = mount
        self._all = mount / "rackless"
        self._program = program
        self._lock = threading.Lock()
        self._daemon: subprocess.Popen[bytes] | None = None
        self._groups: dict[str, Path] = {}
        self._before: dict[str, dict[str, int]] = {}
        self._reasons: dict[str, str] = {}

    def enter(self, job: str, limit: int) -> Path:
        """Make the group of a job, with at most `limit` bytes of memory here. ControlError, and why, if it cannot be.

        What a process in it starts is in it too. `leave` must follow.
        """
        with self._lock:
            if job in self._groups:
                return self._groups[job]
            self._prepare()
            if self._daemon is None:
                self._start()
            group = self._all / Path(job).name
            group.mkdir()
            (group / "memory.max").write_text(str(max(limit, SMALLEST)))
            self._groups[job] = group
            self._before[job] = _table(_VMSTAT)
            return group

    def leave(self, job: str) -> None:
        """The program of a job has ended; its group goes when all that it has started has, too."""
        group = self._groups.get(job)
        if group is not None:
            threading.Thread(target=self._leave, args=(job, group), name="swap group", daemon=True).start()

    @property
    def used(self) -> bool:
        """Are there programs whose memory is in the swap space, and so stays on the memory blades where it is?"""
        return bool(self._groups)

    def figures(self, job: str) -> dict[str, Any]:
        """What a job had and has here and at memory blades; empty without a group.

        What came and went (`blade_...`) is counted for the whole blade while the job ran: the kernel has no more.
        """
        group = self._groups.get(job)
        if group is None:
            return {}
        stat, events, now, before = (_table(group / "memory.stat"), _table(group / "memory.events"), _table(_VMSTAT),
                                     self._before[job])  # fmt: skip
        pages_in, pages_out = (now.get(name, 0) - before.get(name, 0) for name in ("pswpin", "pswpout"))
        return {
            "limit_bytes": _number(group / "memory.max"),
            "memory_peak_bytes": _number(group / "memory.peak"),
            "swap_peak_bytes": _number(group / "memory.swap.peak"),
            "swap_bytes": _number(group / "memory.swap.current"),
            "major_faults": stat.get("pgmajfault", 0),
            "refaults": stat.get("workingset_refault_anon", 0),
            "oom_kills": events.get("oom_kill", 0),
            "blade_pages_in": pages_in,
            "blade_pages_out": pages_out,
            "blade_bytes_in": pages_in * mmap.PAGESIZE,
            "blade_bytes_out": pages_out * mmap.PAGESIZE,
        }

    def verdict(self, job: str) -> str:
        """Why the programs of a job were killed, if it was us or the kernel for want of memory; else empty."""
        if job not in self._groups:
            return ""
        deadline = time.monotonic() + _NEWS_SECONDS
        while True:  # who kills them and who tells why are two
            if job in self._reasons:
                return self._reasons[job]
            if self.figures(job)["oom_kills"]:
                return "out of memory: the program does not fit, or the memory blades are full"
            if time.monotonic() > deadline:
                return ""
            time.sleep(_NEWS_SECONDS / 10)

    def _prepare(self) -> None:
        """Have control groups with memory limits. They are not mounted on a blade that has never needed them."""
        try:
            if not (self._mount / "cgroup.controllers").exists():
                subprocess.run(["mount", "-t", "cgroup2", "none", self._mount], check=True, capture_output=True)
            for folder in (self._mount, self._all):
                folder.mkdir(exist_ok=True)
                (folder / "cgroup.subtree_control").write_text("+memory")
        except (OSError, subprocess.CalledProcessError) as failure:
            raise control.ControlError(f"no control groups for memory on this blade: {failure}", None) from failure

    def _start(self) -> None:
        for stale in self._all.iterdir():  # of an agent that was here before
            if stale.is_dir():
                _end(stale)
        _settle()
        daemon = subprocess.Popen([self._program, self._all, str(DEVICE_BYTES)], stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE)  # fmt: skip
        assert daemon.stdout is not None
        words = _line(daemon.stdout.fileno(), START_SECONDS)
        if not words.startswith("ready"):
            _close(daemon)
            raise control.ControlError(
                f"no swap space on memory blades: {words.removeprefix('error ') or 'swapd said nothing'}",
                "see `rackless status`; only programs that are linked dynamically can do without it",
            )
        log.info("swap space on memory blades: %s", words.removeprefix("ready "))
        self._daemon = daemon
        device = words.removeprefix("ready ")
        threading.Thread(target=self._listen, args=(daemon, device), name="swapd", daemon=True).start()

    def _listen(self, daemon: subprocess.Popen[bytes], device: str) -> None:
        assert daemon.stdout is not None
        for line in daemon.stdout:
            what, *rest = line.decode().split()
            log.warning("swapd: %s %s", what, " ".join(rest))
            if what == "lost":
                self._doom(f"memory blade {rest[0]} died, and with it memory of programs in the second tier")
        daemon.wait()
        with self._lock:
            if self._daemon is daemon:  # it was not we who ended it
                self._daemon = None
                self._doom("the swap space of this blade has gone: swapd has ended")
                _write(self._all / "cgroup.kill", "1")
                subprocess.run(["swapoff", device], check=False, capture_output=True)  # nobody could read it

    def _doom(self, reason: str) -> None:
        self._reasons.update(dict.fromkeys(self._groups, reason))

    def _leave(self, job: str, group: Path) -> None:
        while _table(group / "cgroup.events").get("populated"):
            time.sleep(_EMPTY_SECONDS)
        with self._lock:
            if job not in self._groups:
                return
            _end(group)
            del self._groups[job], self._before[job]
            self._reasons.pop(job, None)
            if not self._groups and self._daemon is not None:
                daemon, self._daemon = self._daemon, None
                _close(daemon)


def _settle() -> None:
    """Have the kernel's client; and stay in memory: swapd asks us for more, so our own pages must not be out there."""
    subprocess.run(["modprobe", "nbd", "nbds_max=4", "max_part=0"], check=False, capture_output=True)
    ctypes.CDLL(None).mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT)


def _close(daemon: subprocess.Popen[bytes]) -> None:
    """Have it give back device and memory, and wait for its end."""
    assert daemon.stdin is not None
    daemon.stdin.close()
    daemon.wait()


def _end(group: Path) -> None:
    """Kill what is in a group, and remove it."""
    _write(group / "cgroup.kill", "1")
    while group.exists():
        with suppress(OSError):  # EBUSY: not all of it has ended
            group.rmdir()
            return
        time.sleep(_EMPTY_SECONDS)


def _line(file: int, seconds: float) -> str:
    """The next line, without its end; empty if there is none in time."""
    said = b""
    poll = select.poll()  # an agent may have more files open than select can name
    poll.register(file, select.POLLIN)
    deadline = time.monotonic() + seconds
    while not said.endswith(b"\n"):
        ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
        got = os.read(file, 1) if ready else b""
        if not got:
            return ""
        said += got
    return said.decode().strip()


def _table(file: Path) -> dict[str, int]:
    """A file of names and numbers; empty if it is not there."""
    try:
        return {name: int(number) for name, number in map(str.split, file.read_text().splitlines())}
    except OSError:
        return {}


def _number(file: Path) -> int:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return 0


def _write(file: Path, text: str) -> None:
    with suppress(OSError):
        file.write_text(text)
