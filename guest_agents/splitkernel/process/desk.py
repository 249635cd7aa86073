"""The process monitor's desk: a Unix socket where `split` and the programs' pagers ask for what they need.

SOCK_SEQPACKET, one text message each way; replies are "ok ..." or "error ERRNO text":

    job EXCACHE VNODE [DIRECTORY]  -> ok DIRECTORY EXCACHE ROOT      from `split`, before it starts the program ("-" as
                                                                     EXCACHE: the blade's; as ROOT: no files of its own;
                                                                     DIRECTORY: as the program had it on another blade)
    began PID COMMAND...           -> ok                             from `split`, once there is a process
    swap DIRECTORY                 -> ok GROUP                       a control group for a program of the second tier
    verdict DIRECTORY              -> ok [WORDS]                     why it was killed, if that was for want of memory
    report DIRECTORY SECONDS CODE  -> ok {json}                      from `split`, after the program's end
    trace DIRECTORY                -> ok FILE                        after the report: what a traced program did
    ps                             -> ok TABLE
    kill ID SIGNAL                 -> ok
    program ID                     -> ok BLADE.PID PID VNODE EXCACHE DIRECTORY COMMAND...
    discard NAME                   -> ok                             a checkpoint is given up: see memory/monitor.py
    attach PID DIRECTORY           -> ok BLADE...                    from a pager: the memory blades, in order
    connect BLADE QPN PSN GIDHEX   -> ok QPN PSN GIDHEX
    region BYTES COPIES [INDEX...] -> ok [INDEX ADDRESS RKEY]...     on as many blades, none with one of these indices
    release BLADE                  -> ok                             what it has there is given up: it is out of reach
    watch                          -> ok                             "lost BLADE" and "back BLADE" come unasked then,
                                                                     and "drain BLADE" (take all elsewhere) and "keep"
    keep NAME PLACES               -> ok                             what was lent stays as checkpoint NAME's: so many
    claim NAME PLACES              -> ok                             ... and is this program's now: so many, or none
    heir NUMBER                    -> (no answer)                    a child was forked; three descriptors: see heirs.py
    forgo NUMBER                   -> (no answer)                    it has called exec or ended
    return [INDEX ADDRESS]...      -> (no answer)                    the places of a region, which is needed no more

When a pager's socket closes, its program has ended (or called exec), its children get what they still need of its
memory, and all it held is given back. When a socket of
`split` closes before its report, it was killed, and the program with it.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import IPv6Address
from pathlib import Path
from typing import Any

from guest_agents import control
from guest_agents.splitkernel.managers.vnode import DEFAULT
from guest_agents.splitkernel.process import figures, jobs, trace
from guest_agents.splitkernel.process.belonging import Belonging
from guest_agents.splitkernel.process.heirs import FILES, Heirs
from guest_agents.splitkernel.process.memory import Lender, Loan
from guest_agents.splitkernel.process.programs import Program
from guest_agents.splitkernel.process.swap import Swap

MESSAGE = 64 << 10
log = logging.getLogger("rackless.process")


class RefusalError(Exception):
    """A request that cannot be met: an errno and one line."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.number = number


@dataclass(frozen=True)
class Stock:
    """What a desk has to give."""

    jobs: Path
    """Where jobs have their folders."""
    excache: Callable[[], int]
    lender: Lender
    belonging: Belonging
    extra: Callable[[], dict[str, Any]]
    """Figures to add to a job's report, from other parts of the monitor; called at its start and end."""
    vnodes: dict[str, str] = field(default_factory=dict)
    """Which vNode a job belongs to, by the job's folder."""
    limits: dict[str, int] = field(default_factory=dict)
    """The bytes that each job may have here."""
    swap: Swap = field(default_factory=Swap)


class Desk:
    """Serves one connection per thread."""

    def __init__(self, path: Path, stock: Stock) -> None:
        self._stock = stock
        self.programs = 0
        stock.jobs.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.bind(str(path))
        self._socket.listen(64)
        for job in stock.jobs.iterdir():
            jobs.adopt(job, stock.belonging.programs, stock.vnodes)

    def start(self) -> None:
        """Serve in the background."""
        threading.Thread(target=self._accept, name="desk", daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._socket.accept()
            threading.Thread(target=self._serve, args=(client,), name="desk client", daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        def tell(what: str, blade: str) -> None:
            with suppress(OSError):  # it has gone, or does not listen
                client.send(f"{what} {blade}".encode(), socket.MSG_DONTWAIT)

        visit = Visit(self._stock, tell)
        self.programs += 1
        try:
            with client:
                while True:
                    data, files, _, _ = socket.recv_fds(client, MESSAGE, FILES, socket.MSG_CMSG_CLOEXEC)
                    if not data:
                        break
                    message = data.decode("utf-8", "replace")
                    if not visit.note(message, files):
                        client.send(visit.answer(message).encode())
        except OSError as failure:
            log.warning("a program's socket failed: %s", failure)
        finally:
            self.programs -= 1
            visit.close()


class Visit:
    """One client's conversation and what it holds; `tell` reaches it unasked."""

    def __init__(self, stock: Stock, tell: Callable[[str, str], None]) -> None:
        self._stock = stock
        self._tell = tell
        self._before: dict[str, Any] = {}
        self._job: Path | None = None
        self._excache = 0
        self._program: Program | None = None
        self._loan: Loan | None = None
        self._heirs = Heirs()

    def note(self, message: str, files: list[int]) -> bool:
        """Take what needs no answer, and the descriptors that came with it. False if it is a request."""
        word, *args = message.split() or [""]
        if word == "return" and self._loan is not None:
            numbers = [int(arg) for arg in args if arg.isdecimal()]
            self._loan.give_back(zip(numbers[::2], numbers[1::2], strict=False))
        elif word == "heir" and self._loan is not None and len(args) == 1:
            self._heirs.add(args[0], files)
        elif word == "forgo":
            self._heirs.forget(" ".join(args))
        else:
            for file in files:
                os.close(file)
            return False
        return True

    def answer(self, message: str) -> str:
        """The reply to one request; never raises."""
        word, *args = message.split() or [""]
        handlers: dict[str, Callable[..., list[str]]] = {
            "job": self._new_job,
            "began": self._began,
            "swap": self._swap,
            "verdict": self._verdict,
            "report": self._report,
            "trace": self._trace,
            "ps": self._ps,
            "kill": self._kill,
            "program": self._describe,
            "discard": self._discard,
            "keep": self._keep,
            "claim": self._claim,
            "attach": self._attach,
            "connect": self._connect,
            "region": self._region,
            "release": self._release,
            "watch": self._watch,
        }
        handler = handlers.get(word)
        try:
            if handler is None:
                raise RefusalError(errno.EINVAL, f"unknown request {word!r}")
            return " ".join(["ok", *handler(*args)])
        except RefusalError as refusal:
            return f"error {refusal.number} {refusal}"
        except control.ControlError as failure:
            return f"error {errno.EHOSTUNREACH} {failure.error}{f' ({failure.hint})' if failure.hint else ''}"
        except Exception as failure:  # a bug here must reach the program as an error, not as silence
            log.exception("request failed: %s", message)
            return f"error {errno.EPROTO} the process monitor failed: {type(failure).__name__}: {failure}"

    def close(self) -> None:
        """The client has gone: return what it held."""
        self._stock.lender.unwatch(self._tell)
        if self._loan is not None:
            try:
                self._bequeath(self._loan)
            finally:
                self._loan.close()
        if self._program is not None:
            self._stock.belonging.programs.end(self._program, None)
        if self._job is not None:
            self._stock.vnodes.pop(str(self._job), None)
            self._stock.limits.pop(str(self._job), None)
            self._stock.swap.leave(str(self._job))
            shutil.rmtree(self._job, ignore_errors=True)

    def _bequeath(self, loan: Loan) -> None:
        if self._heirs:
            with self._stock.lender.retrieval(loan.blades) as retrieval:
                self._heirs.inherit(retrieval.read)

    def _new_job(self, excache: str = "-", vnode: str = DEFAULT, directory: str = "") -> list[str]:
        root = self._stock.belonging.enter(vnode)
        self._job = self._job_again(directory) if directory else Path(tempfile.mkdtemp(dir=self._stock.jobs))
        self._job.chmod(0o1777)  # the program may run as another user
        self._stock.vnodes[str(self._job)] = vnode
        self._before = self._stock.extra()
        self._excache = self._stock.excache() if excache == "-" else int(excache)
        self._stock.limits[str(self._job)] = self._excache
        return [str(self._job), str(self._excache), str(root or "-")]

    def _job_again(self, directory: str) -> Path:
        """The folder that a checkpoint's program knows as its job's."""
        job = Path(directory)
        if job.parent != self._stock.jobs:
            raise RefusalError(errno.EINVAL, f"{directory} is no job's folder here")
        try:
            job.mkdir()
        except FileExistsError:
            raise RefusalError(errno.EEXIST, f"there is a job {directory} already") from None
        return job

    def _swap(self, job: str) -> list[str]:
        if job not in self._stock.limits:
            raise RefusalError(errno.EINVAL, "no such job")
        return [str(self._stock.swap.enter(job, self._stock.limits[job]))]

    def _verdict(self, job: str) -> list[str]:
        return [self._stock.swap.verdict(job)]

    def _began(self, pid: str, *command: str) -> list[str]:
        if self._job is None or self._program is not None:
            raise RefusalError(errno.EINVAL, "no job, or it has begun")
        vnode = self._stock.vnodes[str(self._job)]
        self._program = self._stock.belonging.programs.begin(int(pid), vnode, " ".join(command), job=self._job,
                                                             excache=self._excache)  # fmt: skip
        jobs.note(self._job, self._program)
        return []

    def _report(self, job: str, seconds: str, code: str) -> list[str]:
        if self._job is None or str(self._job) != job:
            raise RefusalError(errno.EINVAL, "a report of another job")
        if self._program is not None:
            self._stock.belonging.programs.end(self._program, int(code))
        result = figures.of_job(self._job)
        result["wall_seconds"] = float(seconds)
        result["exit_code"] = int(code)
        result["storage"] = difference(self._stock.extra(), self._before)
        result["model"] = figures.model(result, float(seconds))
        swapped = self._stock.swap.figures(job)
        result["tier"] = "swap" if swapped else "excache"
        result["swap"] = swapped
        return [json.dumps(result)]

    def _trace(self, job: str) -> list[str]:
        if self._job is None or self._program is None or str(self._job) != job or self._program.ended is None:
            raise RefusalError(errno.EINVAL, "a trace of another job, or of one that has not ended")
        return [str(trace.write(self._job, self._program))]

    def _ps(self) -> list[str]:
        return [self._stock.belonging.table()]

    def _kill(self, name: str, signal: str = "TERM") -> list[str]:
        self._stock.belonging.kill(name, signal)
        return []

    def _describe(self, name: str) -> list[str]:
        full, program = self._stock.belonging.programs.find(name)
        return [full, str(program.pid), program.vnode, str(program.excache), str(program.job), program.command]

    def _keep(self, name: str, places: str) -> list[str]:
        self._holding().keep(name, int(places))
        return []

    def _claim(self, name: str, places: str) -> list[str]:
        self._holding().claim(name, int(places))
        return []

    def _discard(self, name: str) -> list[str]:
        self._stock.lender.discard(name)
        return []

    def _attach(self, pid: str, job: str) -> list[str]:
        if self._loan is not None:
            raise RefusalError(errno.EALREADY, "attached already")
        # A job that this agent does not know began before it was restarted.
        among, place = self._stock.belonging.memory(self._stock.vnodes.get(job, DEFAULT))
        self._loan = self._stock.lender.open(int(pid), among, place)
        return self._loan.blades

    def _connect(self, blade: str, qpn: str, psn: str, gid: str) -> list[str]:
        peer = self._holding().connect(blade, int(qpn), int(psn), str(IPv6Address(bytes.fromhex(gid))))
        return [str(peer.qpn), str(peer.psn), IPv6Address(peer.gid).packed.hex()]

    def _region(self, size: str, copies: str, *without: str) -> list[str]:
        if int(copies) < 1:
            raise RefusalError(errno.ENOMEM, "no memory blade is left")
        granted = self._holding().regions(int(size), int(copies), [int(number) for number in without])
        if granted is None:
            raise RefusalError(errno.ENOMEM, "the memory blades are full")
        return [str(word) for one in granted for word in (one.blade, one.address, one.rkey)]

    def _release(self, blade: str) -> list[str]:
        self._holding().release(blade)
        return []

    def _watch(self) -> list[str]:
        self._stock.lender.watch(self._tell)
        return []

    def _holding(self) -> Loan:
        if self._loan is None:
            raise RefusalError(errno.ENOTCONN, "attach first")
        return self._loan


def difference(after: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """`after - before` for nested dictionaries of numbers."""
    result: dict[str, Any] = {}
    for key, value in after.items():
        if isinstance(value, dict):
            result[key] = difference(value, before.get(key, {}))
        else:
            with suppress(TypeError):
                result[key] = value - before.get(key, 0)
    return result
