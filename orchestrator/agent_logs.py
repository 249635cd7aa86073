"""The logs that agents keep in blades, read and followed over ssh."""

from __future__ import annotations

import re
import shlex
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath

LOG_FOLDER = "/var/log/rackless"
"""On a blade: svlogd writes AGENT/current there, with a UTC time stamp on every line."""

CONSOLE = "console"
"""What a blade's console log is called among its agents."""

_STAMP = re.compile(r"\d{4}-\d\d-\d\d_\d\d:\d\d:\d\d\.\d+ ")


@dataclass(frozen=True)
class Line:
    """One line of a log."""

    blade: str
    agent: str
    text: str


@dataclass(frozen=True)
class Source:
    """Logs of one blade: a command that prints them as `tail -v` does, under headers with files' names."""

    blade: str
    command: Sequence[str]


def agent_source(
    ssh: Sequence[str], blade: str, agent: str | None, lines: int, follow: bool, folder: str = LOG_FOLDER
) -> Source:
    """Return the last lines of an agent's log on a blade, of every agent's if no name is given."""
    files = f"{shlex.quote(agent)}/current" if agent else "*/current"
    missing = f"no log of agent {agent} here" if agent else "no agent has a log here"
    script = [
        f"cd {shlex.quote(folder)} 2>/dev/null || {{ echo 'no agent has a log here' >&2; exit 1; }}",
        f"set -- {files}",
        f'[ -e "$1" ] || {{ echo {shlex.quote(missing)}: there are: $(ls) >&2; exit 1; }}',
    ]
    if follow:
        # sshd lets a command live on when its client has gone: this one ends with its stdin.
        # tail says on stderr that svlogd has begun a new file, which nobody needs to know.
        script += [f'tail -v -n {lines} -F -- "$@" 2>/dev/null &', "cat > /dev/null", "kill $!"]
    else:
        script += [f'tail -v -n {lines} -- "$@"']
    return Source(blade, [*ssh, "-T", blade, "\n".join(script)])


def console_source(blade: str, log: Path, lines: int, follow: bool) -> Source:
    """Return the last lines of a blade's console log, which is a file of this host."""
    return Source(blade, ["tail", "-v", "-n", str(lines), *(["-F"] if follow else []), "--", str(log)])


def read(sources: Iterable[Source], on_line: Callable[[Line], None], on_error: Callable[[str, str], None]) -> int:
    """Read all sources at once until each has ended; return the worst exit code.

    `on_line` and `on_error` (blade, text) are called from several threads.
    """
    with ExitStack() as stack:
        running = [(source.blade, stack.enter_context(_started(source))) for source in sources]
        readers = [
            threading.Thread(target=reader, args=(blade, process), daemon=True)
            for blade, process in running
            for reader in (_line_reader(on_line), _error_reader(on_error))
        ]
        for thread in readers:
            thread.start()
        for thread in readers:
            thread.join()
        return max((process.wait() for _, process in running), default=0)


def parse(blade: str, output: Iterable[str]) -> Iterator[Line]:
    """Split the output of `tail -v` into lines that know their agent.

    tail puts an empty line before each header but the first: an empty line is held back until the next one.
    """
    agent, held = "", False
    for raw in output:
        text = raw.rstrip("\r\n")
        if text.startswith("==> ") and text.endswith(" <=="):
            agent, held = _agent_of(text[4:-4]), False
            continue
        if held:
            yield Line(blade, agent, "")
        held = not text
        if text:
            yield Line(blade, agent, text)
    if held:
        yield Line(blade, agent, "")


def by_time(lines: Iterable[Line]) -> list[Line]:
    """Sort lines of many logs by their time stamps; one without a stamp stays behind the one before it."""
    stamps: dict[tuple[str, str], str] = {}
    keyed = []
    for line in lines:
        log = (line.blade, line.agent)
        if match := _STAMP.match(line.text):
            stamps[log] = match[0]
        keyed.append((stamps.get(log, ""), line))
    return [line for _, line in sorted(keyed, key=lambda pair: pair[0])]


@contextmanager
def _started(source: Source) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        source.command,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
        process_group=0,  # the terminal's Ctrl-C is for us: we then end what runs on the blade
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.stdin is not None:
            process.stdin.close()
        try:
            process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()


def _line_reader(on_line: Callable[[Line], None]) -> Callable[[str, subprocess.Popen[str]], None]:
    def read_lines(blade: str, process: subprocess.Popen[str]) -> None:
        for line in parse(blade, process.stdout or ()):
            on_line(line)

    return read_lines


def _error_reader(on_error: Callable[[str, str], None]) -> Callable[[str, subprocess.Popen[str]], None]:
    def read_errors(blade: str, process: subprocess.Popen[str]) -> None:
        for text in process.stderr or ():
            on_error(blade, text.rstrip("\n"))

    return read_errors


def _agent_of(file: str) -> str:
    """Name the agent of AGENT/current; any other file is a console log."""
    path = PurePath(file)
    return path.parent.name if path.name == "current" else CONSOLE
