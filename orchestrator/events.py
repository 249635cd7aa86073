"""What the engine tells the user interface while it works. The engine emits events; it never prints."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal, Protocol

State = Literal["start", "progress", "done", "fail"]


@dataclass(frozen=True)
class Step:
    """A phase of the work on one blade (or on the whole rack when `blade` is None) begins, moves or ends."""

    rack: str
    phase: str
    state: State
    blade: str | None = None
    fraction: float | None = None
    """How much of the phase is done, 0..1, when that is known."""
    message: str | None = None
    seconds: float | None = None
    """How long the phase took; set when the state is done or fail."""

    def to_json(self) -> dict[str, object]:
        return {"event": "step", **asdict(self)}


@dataclass(frozen=True)
class Note:
    """A line the user should read: which accelerator was chosen, a warning about the rack file."""

    message: str

    def to_json(self) -> dict[str, object]:
        return {"event": "note", **asdict(self)}


@dataclass(frozen=True)
class Changed:
    """A blade is about to be made, changed or removed, as the plan says."""

    rack: str
    blade: str
    action: str
    reasons: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        return {"event": "change", **asdict(self)}


@dataclass(frozen=True)
class Broken:
    """The faults of a blade are others now: what is broken of it, in words; nothing when it is healed."""

    rack: str
    blade: str
    faults: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        return {"event": "faults", **asdict(self)}


Event = Step | Note | Changed | Broken
Emit = Callable[[Event], None]
"""Where events go. Called from several threads at once: a receiver must lock what it shares."""


class Report(Protocol):
    """Say how far a running step is."""

    def __call__(self, fraction: float | None = None, message: str | None = None) -> None: ...


def ignore(event: Event) -> None:
    """An Emit for callers that show nothing."""


@contextmanager
def step(emit: Emit, rack: str, phase: str, blade: str | None = None) -> Iterator[Report]:
    """Emit start, then done or fail with the seconds taken, around a block of work.

        with step(emit, "demo", "restore", "mb0") as report:
            report(0.5, "2 of 4 layers")

    The exception of a failed block is passed on.
    """
    started = time.monotonic()

    def report(fraction: float | None = None, message: str | None = None) -> None:
        emit(Step(rack, phase, "progress", blade, fraction, message))

    emit(Step(rack, phase, "start", blade))
    try:
        yield report
    except BaseException as error:
        text = str(error) or type(error).__name__
        emit(Step(rack, phase, "fail", blade, None, text.splitlines()[0], time.monotonic() - started))
        raise
    emit(Step(rack, phase, "done", blade, 1.0, None, time.monotonic() - started))
