"""What the user sees: progress on standard error, results on standard output, errors with a hint.

Only this module and the commands in cli/ print.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from orchestrator.errors import RacklessError
from orchestrator.events import Emit, Event, Note, Step

_RED, _BOLD, _PLAIN = "\x1b[31m", "\x1b[1m", "\x1b[0m"


@contextmanager
def progress(rack: str, json: bool = False, stream: TextIO | None = None) -> Iterator[Emit]:
    """Show the events given to the yielded function, which any thread may call.

    On a terminal a live table with one bar per blade; otherwise, and with `json` (its reader is a program),
    one plain line per event. Everything goes to `stream`: standard error, unless told otherwise.
    """
    stream = stream or sys.stderr
    if _is_terminal(stream) and not json and (stream.encoding or "").lower().startswith("utf"):
        from orchestrator.board import LiveBoard  # rich takes a tenth of a second to import

        with LiveBoard(rack, stream) as board:
            yield board.emit
    else:
        yield _plain(stream)


def plain_line(event: Event, elapsed_seconds: float) -> str | None:
    """One event as a line such as `[  3.2s] mb0 restore done (0.8 s)`; None when it is not worth a line."""
    clock = f"[{elapsed_seconds:5.1f}s]"
    if isinstance(event, Note):
        return f"{clock} {event.message}"
    if not isinstance(event, Step):  # the result tells what was changed
        return None
    # How far a phase is would be too many lines.
    if event.state == "progress" and event.message is None:
        return None
    words = [clock, event.blade or event.rack, event.phase, event.state if event.state != "progress" else ""]
    if event.seconds is not None:
        words.append(f"({event.seconds:.1f} s)")
    line = " ".join(word for word in words if word)
    return f"{line}: {event.message}" if event.message else line


def print_error(error: RacklessError, stream: TextIO | None = None) -> None:
    """Print an error for its user: what is wrong (in red on a terminal), a hint, and where the log is."""
    stream = stream or sys.stderr
    red, plain = (_RED, _PLAIN) if _has_color(stream) else ("", "")
    for line in error.message.splitlines() or [type(error).__name__]:
        print(f"{red}error:{plain} {line}", file=stream)
    if error.hint:
        print(f"hint: {error.hint}", file=stream)
    for line in (error.detail or "").splitlines():
        print(f"  | {line}", file=stream)
    if error.log:
        print(f"log: {error.log}", file=stream)


def table(headers: Sequence[str], rows: Iterable[Sequence[object]], stream: TextIO | None = None) -> None:
    """Print rows under their headers in aligned columns; numbers to the right. To stdout by default."""
    stream = stream or sys.stdout
    cells = [["-" if value is None else str(value) for value in row] for row in rows]
    rows_and_head = [list(headers), *cells]
    widths = [max(len(row[column]) for row in rows_and_head) for column in range(len(headers))]
    numeric = [
        bool(cells) and all(_is_number(row[column]) for row in cells) for column in range(len(headers))
    ]
    bold, plain = (_BOLD, _PLAIN) if _has_color(stream) else ("", "")
    for number, row in enumerate(rows_and_head):
        aligned = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        line = "  ".join(aligned).rstrip()
        print(f"{bold}{line}{plain}" if number == 0 else line, file=stream)


def _plain(stream: TextIO) -> Emit:
    started = time.monotonic()
    lock = threading.Lock()

    def emit(event: Event) -> None:
        with lock:
            line = plain_line(event, time.monotonic() - started)
            if line is not None:
                print(line, file=stream, flush=True)

    return emit


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _has_color(stream: TextIO) -> bool:
    return _is_terminal(stream) and not os.environ.get("NO_COLOR")


def _is_number(cell: str) -> bool:
    return cell == "-" or cell.replace(".", "", 1).isdigit()
