"""The live table of a rack's progress: one row per blade. It imports rich: for terminals only."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orchestrator.events import Event, Note, State, Step

_BAR_WIDTH = 24
_MARKS: dict[State, tuple[str, str]] = {
    "start": ("·", "cyan"),
    "progress": ("·", "cyan"),
    "done": ("✓", "green"),
    "fail": ("✗", "red"),
}


@dataclass
class Row:
    """What is known of one blade, or of the rack as a whole."""

    phase: str
    state: State
    started: float
    """When its first phase began, and `changed`, when the last event came: seconds of the monotonic clock."""
    changed: float
    fraction: float | None = None
    message: str = ""

    def seconds(self, now: float) -> float:
        """How long the blade has been worked on; it stands still while no phase runs."""
        return (now if self.state in ("start", "progress") else self.changed) - self.started


class Board:
    """The rows, fed with events from any thread and drawn by rich several times a second."""

    def __init__(self, rack: str) -> None:
        self.rack = rack
        self.rows: dict[str, Row] = {}
        self._lock = threading.Lock()

    def apply(self, event: Step) -> None:
        """Take in what happened."""
        now = time.monotonic()
        name = event.blade or self.rack
        with self._lock:
            row = self.rows.get(name)
            if row is None:
                row = self.rows[name] = Row(event.phase, event.state, started=now, changed=now)
            row.phase, row.state, row.changed = event.phase, event.state, now
            row.fraction = event.fraction
            row.message = event.message or ""

    def __rich__(self) -> Table:
        now = time.monotonic()
        grid = Table.grid(padding=(0, 2))
        for _ in range(5):
            grid.add_column(no_wrap=True)
        with self._lock:
            for name, row in self.rows.items():
                grid.add_row(*_cells(name, row, now))
        return grid


def _cells(name: str, row: Row, now: float) -> tuple[Text | ProgressBar, ...]:
    mark, color = _MARKS[row.state]
    over = row.state in ("done", "fail")
    bar = ProgressBar(
        total=1.0,
        completed=1.0 if over else row.fraction or 0.0,
        width=_BAR_WIDTH,
        pulse=not over and row.fraction is None,
        complete_style=color,
        finished_style=color,
        animation_time=now,
    )
    return (
        Text(f"{mark} {name}", style=color),
        bar,
        Text(f"{row.seconds(now):5.1f} s"),
        Text(row.phase),
        Text(row.message, style="red" if row.state == "fail" else "dim"),
    )


class LiveBoard:
    """A board on a terminal, drawn from `__enter__` to `__exit__`; notes scroll by above it."""

    def __init__(self, rack: str, stream: TextIO) -> None:
        self._console = Console(file=stream)
        self._board = Board(rack)
        self._live = Live(self._board, console=self._console, refresh_per_second=8)

    def __enter__(self) -> LiveBoard:
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def emit(self, event: Event) -> None:
        """Show an event; an `events.Emit`."""
        if isinstance(event, Note):
            self._console.print(event.message, markup=False, highlight=False)
        elif isinstance(event, Step):
            self._board.apply(event)
