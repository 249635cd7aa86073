"""Counters and traces as a pager writes them, for tests that need no pager."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from guest_agents.splitkernel.process import counters, trace


def write_counters(
    job: Path, pid: int, blades: Mapping[str, Mapping[str, int]] | None = None, command: str = "app", **values: int
) -> None:
    """A counters file; what is not given is 0."""
    numbers = [{"managed": 1, **values}.get(name, 0) for name in counters.FIELDS]
    assert set(values) <= set(counters.FIELDS)
    given = blades or {}
    data = struct.pack(f"<{2 + len(numbers)}Q", counters.MAGIC, *numbers, len(given))
    for name, one in given.items():
        fields = [one.get(field, 0) for field in counters.BLADE_FIELDS]
        data += struct.pack(f"<{counters.NAME}s{len(fields)}Q", name.encode(), *fields)
    data = data.ljust(counters.SIZE - counters.COMMAND, b"\0") + command.encode().ljust(counters.COMMAND, b"\0")
    assert len(data) == counters.SIZE
    (job / f"{pid}.counters").write_bytes(data)


def write_trace(
    job: Path,
    pid: int,
    begin: int,
    end: int,
    events: Sequence[tuple[int, int, int, int, int, int, int]] = (),
    snapshots: Sequence[tuple[int, Mapping[str, int]]] = (),
    most: int = 8,
) -> None:
    """A trace file with room for `most` events and snapshots; earlier events are overwritten, as a pager does it."""
    values = len(counters.FIELDS)
    head = struct.pack("<9Q", trace.MAGIC, most, most, values, begin, end, 10**7, len(events), len(snapshots))
    ring = [bytes(32)] * most
    for number, event in enumerate(events):
        ring[number % most] = struct.pack("<QQIIIHH", *event)
    shots = [struct.pack(f"<{1 + values}Q", when, *(given.get(name, 0) for name in counters.FIELDS))
             for when, given in snapshots]  # fmt: skip
    shots += [bytes(8 * (1 + values))] * (most - len(shots))
    (job / f"{pid}.trace").write_bytes(head + b"".join(ring) + b"".join(shots))
