"""The programs that were started on this blade: one for each `split run`, until some time after its end."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guest_agents import control
from guest_agents.control import Message
from guest_agents.splitkernel.managers.process import EXITED, RUNNING

ENDED_KEPT = 32
"""How many programs that have ended are remembered."""


@dataclass
class Program:
    """One program. Times are seconds since the epoch."""

    pid: int
    vnode: str
    command: str
    started: float
    handle: int
    """A pidfd: it means this process even when another has got its number."""
    ended: float | None = None
    exit_code: int | None = None
    """As a shell says it: 128 + n if signal n ended it. None while it runs, and if nobody saw its end."""
    job: Path | None = None
    """The folder with its counters."""
    excache: int | None = None
    """Bytes of its ExCache, as it was started with; each process that it starts has as much."""
    clock: int = field(default_factory=time.monotonic_ns)
    """When this agent heard of it and, 0 while it runs, of its end: on the clock of traces, which nobody sets."""
    clock_ended: int = 0


class Programs:
    """The list; thread-safe.

    blade -- this blade's name: BLADE.PID names a program in the rack
    changed -- is called when programs came or went
    """

    def __init__(self, blade: str, changed: Callable[[], None] = lambda: None) -> None:
        self._blade = blade
        self._changed = changed
        self._programs: list[Program] = []
        self._lock = threading.Lock()

    def begin(
        self, pid: int, vnode: str, command: str, started: float | None = None, job: Path | None = None,
        excache: int | None = None,
    ) -> Program:  # fmt: skip
        """Process `pid`, which its parent has not waited for yet, is a program. ControlError if there is none.

        started -- if that was not now
        """
        try:
            handle = os.pidfd_open(pid)
        except OSError as failure:
            raise control.ControlError(f"no process {pid}: {failure.strerror}", None) from failure
        shown = "".join(letter if letter.isprintable() else "?" for letter in command)
        began = time.time() if started is None else started
        program = Program(pid, vnode, shown, began, handle, job=job, excache=excache)
        with self._lock:
            self._programs.append(program)
        self._changed()
        return program

    def end(self, program: Program, exit_code: int | None) -> None:
        """It has ended. Nothing happens the second time."""
        with self._lock:
            if program.ended is not None:
                return
            program.ended, program.exit_code = time.time(), exit_code
            program.clock_ended = time.monotonic_ns()
            os.close(program.handle)
            ended = [other for other in self._programs if other.ended is not None]
            for old in ended[:-ENDED_KEPT]:
                self._programs.remove(old)
        self._changed()

    def kill(self, name: str, number: int) -> None:
        """Send a signal to a running program: BLADE.PID, or PID. ControlError if it does not run."""
        with self._lock:
            program = self._find(name)
            with suppress(ProcessLookupError):  # its end has not been reported yet: as to a zombie
                signal.pidfd_send_signal(program.handle, number)

    def find(self, name: str) -> tuple[str, Program]:
        """A running program, and its whole name: BLADE.PID, or PID. ControlError if it does not run."""
        with self._lock:
            program = self._find(name)
        return self._id(program), program

    def _find(self, name: str) -> Program:
        for program in self._programs:
            if name in (str(program.pid), self._id(program)) and program.ended is None:
                return program
        raise control.ControlError(
            f"no program {name} runs on {self._blade}", "see `rackless ps`, on a blade `split ps`"
        )

    def describe(self) -> list[Message]:
        """What the global process manager is told."""
        with self._lock:
            return [self._describe(program) for program in self._programs]

    def running(self) -> dict[str, Program]:
        """Those that run, by BLADE.PID."""
        with self._lock:
            return {self._id(program): program for program in self._programs if program.ended is None}

    def _id(self, program: Program) -> str:
        return f"{self._blade}.{program.pid}"

    def _describe(self, program: Program) -> dict[str, Any]:
        return {"id": self._id(program), "blade": self._blade, "pid": program.pid, "vnode": program.vnode,
                "command": program.command, "started": program.started, "ended": program.ended,
                "state": RUNNING if program.ended is None else EXITED, "exit_code": program.exit_code}  # fmt: skip


def signal_number(text: str) -> int:
    """The number of a signal: 9, KILL or SIGKILL. ControlError if there is none."""
    try:
        if text.isdecimal():
            return signal.Signals(int(text)).value
        return signal.Signals["SIG" + text.upper().removeprefix("SIG")].value
    except (KeyError, ValueError):
        raise control.ControlError(f"there is no signal {text[:20]!r}", "write for example TERM, KILL or 9") from None
