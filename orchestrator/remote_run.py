"""Running a program on a processor blade as if it ran here: same streams, exit code and signals."""

from __future__ import annotations

import os
import posixpath
import secrets
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from orchestrator.errors import RacklessError

VNODE = "/vnode"
"""Where a program finds the files that storage blades keep: its working directory."""

EXIT_NOT_STARTED = 125
"""As env, nohup and docker say it: the program itself was not started."""

STATS, TRACE = "stats.json", "trace.json"
"""Results in a job's folder on its blade."""

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_SIGNAL_SECONDS = 15.0
_CHUNK_BYTES = 64 * 1024


@dataclass(frozen=True)
class Job:
    """One program to run on a blade. `excache` is in bytes; None means the blade's own setting."""

    ssh: Sequence[str]
    """The command that reaches the blade, up to its name: ssh -F FILE."""
    blade: str
    command: Sequence[str]
    excache: int | None = None
    replicas: int | None = None
    """Memory blades that keep each page; None means one."""
    organisation: Mapping[str, str | int] = field(default_factory=dict)
    """How its ExCache is organised, as options of `split run`: ways, policy, victim, prefetch, pool; its tier."""
    stats: Path | None = None
    """Where the counters go on this host."""
    trace: Path | None = None
    """Where a trace goes on this host; None: none is made."""
    directory: str = VNODE
    vnode: str | None = None
    """None means the default one."""
    cwd: str | None = None
    """Where it starts, seen from `directory`."""
    env: Sequence[str] = ()
    """NAME=VALUE, on top of the blade's environment."""
    restart: bool = False
    """The command is the name of a checkpoint, to go on with."""
    folder: str = field(default_factory=lambda: f"/tmp/rackless-run-{secrets.token_hex(8)}")
    """On the blade, for as long as the job lasts: its process id, its results."""

    def script(self) -> str:
        """Return what the blade's shell does.

        The shell leads a session of its own (sshd sees to that), so its pid is the process group to signal.
        It stays as the program's parent, to turn death by a signal into an exit code that ssh can carry.
        """
        split = ["split", "restart" if self.restart else "run"]
        if self.excache is not None:
            split += ["--excache", str(self.excache)]
        if self.replicas is not None:
            split += ["--replicas", str(self.replicas)]
        for name, value in self.organisation.items():
            split += [f"--{name}", str(value)]
        if self.stats is not None:
            split += ["--stats", f"{self.folder}/{STATS}"]
        if self.trace is not None:
            split += ["--trace", f"{self.folder}/{TRACE}"]
        for setting in self.env:
            split += ["--env", setting]
        if self.vnode is not None:
            split += ["--vnode", self.vnode, "--cwd", posixpath.join(self.directory, self.cwd or "")]
        elif self.cwd is not None:
            split += ["--cwd", self.cwd]
        missing = f"rackless: {self.blade} has no {self.directory}: is its agent ready?"
        start = (
            f"cd {shlex.quote(self.directory)} 2>/dev/null || "
            f"{{ echo {shlex.quote(missing)} >&2; exit {EXIT_NOT_STARTED}; }}"
        )
        lines = [
            "trap : INT TERM HUP QUIT",
            *([start] if self.vnode is None else []),  # another vNode's files need not be where these are
            f"mkdir -m 700 {self.folder} && echo $$ > {self.folder}/pid || exit {EXIT_NOT_STARTED}",
            shlex.join([*split, "--", *self.command]),
            "code=$?",
            *([] if self.results() else [f"rm -rf {self.folder}"]),
            "exit $code",
        ]
        return "\n".join(lines)

    def results(self) -> list[tuple[str, Path]]:
        """The files that it leaves in its folder, and where they go."""
        return [(name, path) for name, path in ((STATS, self.stats), (TRACE, self.trace)) if path is not None]


def run_job(job: Job) -> int:
    """Run a program on a blade with this process's own stdin, stdout and stderr; return its exit code.

    On a terminal the program gets a terminal. Otherwise bytes go through unchanged and the signals that this
    process gets (Ctrl-C, SIGTERM, ...) go on to the program.
    """
    if is_terminal(sys.stdin) and is_terminal(sys.stdout):
        code = _run_on_a_terminal(job)
    else:
        code = _run_through_pipes(job)
    if job.results():
        _fetch_results(job, code)
    return code


def is_terminal(stream: IO[str] | None) -> bool:
    """Whether a stream of this process (None if it was closed at the start) is a terminal."""
    return stream is not None and not stream.closed and stream.isatty()


def _run_on_a_terminal(job: Job) -> int:
    # ssh makes the terminal raw, so Ctrl-C goes to the program as a character; an early one is ssh's.
    with _handlers((signal.SIGINT, signal.SIGQUIT), lambda number, frame: None):
        return subprocess.run([*job.ssh, "-t", job.blade, job.script()], check=False).returncode


def _run_through_pipes(job: Job) -> int:
    typed = is_terminal(sys.stdin)
    standard_input: IO[str] | int | None = subprocess.PIPE if typed else sys.stdin
    if sys.stdin is None or sys.stdin.closed:
        standard_input = subprocess.DEVNULL
    # In a process group of its own ssh does not see the terminal's Ctrl-C: the program must, and then ends by
    # itself. But ssh may not read from the terminal then, so what is typed is passed on.
    process = subprocess.Popen([*job.ssh, "-T", job.blade, job.script()], stdin=standard_input, process_group=0)

    def forward(number: int, frame: FrameType | None) -> None:
        if not _send_signal(job, number):
            process.terminate()

    with _handlers(FORWARDED, forward):
        if typed and process.stdin is not None:
            threading.Thread(target=_pass_on, args=(process.stdin,), daemon=True).start()
        code = process.wait()
    return code if code >= 0 else 128 - code


def _pass_on(destination: IO[bytes]) -> None:
    """Copy what is typed until its end (Ctrl-D) or until ssh has gone."""
    try:
        with destination:
            while chunk := os.read(0, _CHUNK_BYTES):
                destination.write(chunk)
                destination.flush()
    except OSError:
        return


def _send_signal(job: Job, number: int) -> bool:
    """Send a signal to the program on the blade; whether that worked."""
    name = signal.Signals(number).name.removeprefix("SIG")
    command = f"kill -{name} -- -$(cat {job.folder}/pid)"
    try:
        sent = subprocess.run(
            [*job.ssh, "-T", job.blade, command],
            stdin=subprocess.DEVNULL, capture_output=True, check=False,
            timeout=_SIGNAL_SECONDS, process_group=0,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return False
    return sent.returncode == 0


def _fetch_results(job: Job, code: int) -> None:
    """Bring the job's results here and remove its folder. RacklessError names what is not there."""
    missing = []
    for name, path in job.results():
        fetched = _ask_blade(job, f"cat {job.folder}/{name}")
        if fetched.returncode == 0:
            write_atomically(path, fetched.stdout)
        else:
            missing.append("statistics" if name == STATS else "trace")
    _ask_blade(job, f"rm -rf {job.folder}")
    if missing:
        raise RacklessError(
            f"{job.blade} has no {' and no '.join(missing)} of this run",
            hint=f"see `rackless logs {job.blade}`" if code == 0 else f"the program ended with exit code {code}",
            exit_code=code or 1,
        )


def _ask_blade(job: Job, command: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*job.ssh, "-T", job.blade, command], stdin=subprocess.DEVNULL, capture_output=True,
                          check=False)  # fmt: skip


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is seen either as it was or complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RacklessError(f"cannot write {path}: {error.strerror}") from error


@contextmanager
def _handlers(signals: Sequence[signal.Signals], handler: object) -> Iterator[None]:
    """Have a handler for some signals, and the old ones back at the end."""
    old = {number: signal.signal(number, handler) for number in signals}  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)
