"""What happened to a rack, in its folder: one event a line, as JSON, the newest last.

Every event that is shown while a rack is changed is recorded here first, so that screens, `rackless events` and the
dashboard tell the same story. The file is renamed to events.jsonl.1 when it is full, and a new one begun; `down`
removes it with the rack's folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from orchestrator.events import Emit, Event, Step, ignore
from orchestrator.settings import RackPaths

MOST_BYTES = 2 << 20
"""A journal takes twice that: the file and the one before it."""


def recording(paths: RackPaths, emit: Emit = ignore) -> Emit:
    """An Emit that records every event but progress before it is passed on."""

    def record_and_emit(event: Event) -> None:
        if not (isinstance(event, Step) and event.state == "progress"):
            record(paths, event.to_json())
        emit(event)

    return record_and_emit


def begun(paths: RackPaths) -> Emit:
    """An Emit that only records, in the folder of a rack that `up` is about to make."""
    paths.root.mkdir(mode=0o700, parents=True, exist_ok=True)
    return recording(paths)


def record(paths: RackPaths, event: dict[str, Any]) -> None:
    """Append an event, with the time. Nothing when the rack has no folder, or its disk is full."""
    line = json.dumps({"time": round(time.time(), 3), **event}) + "\n"
    with suppress(OSError):  # what is recorded must never keep a rack from being changed
        while not _append(paths.events, line.encode()):
            pass


def older(path: Path) -> Path:
    """The journal before this one."""
    return path.with_name(path.name + ".1")


class Tail:
    """A journal, and what is appended to it, also when it is renamed, removed or made anew meanwhile."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self._begun = False

    def new(self) -> list[dict[str, Any]]:
        """The events since the last call; at first all that are kept, the oldest first."""
        events: list[dict[str, Any]] = []
        if not self._begun:
            self._begun = True
            with suppress(FileNotFoundError), older(self._path).open("rb") as file:
                events += _events(file)
        if self._file is not None:
            events += _events(self._file)
            if not _is_at(self._path, self._file.fileno()):
                events += _events(self._file)  # which came before it was renamed or removed
                self.close()
        if self._file is None:
            with suppress(FileNotFoundError):
                self._file = self._path.open("rb")
                events += _events(self._file)
        return events

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _append(path: Path, line: bytes) -> bool:
    """Append a line; False when somebody renamed the file at that moment."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not _is_at(path, file.fileno()):
            return False
        if file.tell() and file.tell() + len(line) > MOST_BYTES:
            path.rename(older(path))
            return False
        file.write(line)
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _events(file: IO[bytes]) -> Iterator[dict[str, Any]]:
    """The whole lines from here on. A line that is being written is left for the next time."""
    while (line := file.readline()).endswith(b"\n"):
        with suppress(ValueError):  # a line that a full disk cut off
            event = json.loads(line)
            if isinstance(event, dict) and isinstance(event.get("time"), int | float):
                yield event
    if line:
        file.seek(-len(line), os.SEEK_CUR)
