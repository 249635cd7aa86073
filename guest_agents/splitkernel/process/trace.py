"""Traces of programs: what their pagers noted (native/trace.h), as the JSON that Perfetto and chrome://tracing open.

A track per process for its life, one for its pager's misses, evictions and forks, one for each flush that can be in
flight at a time, and counter tracks. Times are microseconds from the program's start.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from guest_agents.splitkernel.process import counters
from guest_agents.splitkernel.process.programs import Program

MAGIC = 0x31435254
_HEAD = struct.Struct("<9Q")
_EVENT = struct.Struct("<QQIIIHH")
KINDS = ("miss", "flush", "evict", "fork", "failover", "re-replicate")
FLUSH = KINDS.index("flush")
MISS = KINDS.index("miss")

RATES = ("faults", "misses", "flushes", "zero_fills", "piggybacks", "evictions", "buffer_hits", "packed_hits",
         "bytes_in", "bytes_out", "rereplicated_bytes")  # fmt: skip
"""Counters shown per second; these are shown as they are:"""
GAUGES = ("pages_held", "pages_mapped", "pages_pooled", "degraded_regions")

LIFE, PAGER, LANES = 0, 1, 10
"""Tracks of each process; flush n is LANES + n."""
_SECOND = 10**9
_NAMES = {LIFE: "life", PAGER: "pager"}
Event = dict[str, Any]


@dataclass(frozen=True)
class Noted:
    """What one process's pager noted; times are nanoseconds of CLOCK_MONOTONIC."""

    begin: int
    end: int
    """0 if it was killed, or still runs."""
    dropped: int
    """Events that were overwritten by later ones."""
    events: list[tuple[int, int, int, int, int, int, int]]
    """begin, length, page, pages, blades (bit set), kind, lane; in the order in which they ended."""
    snapshots: list[tuple[int, tuple[int, ...]]]
    """Time, and all counters as counters.FIELDS names them."""


def parse(data: bytes) -> Noted:
    """A trace file; ValueError if it is none."""
    if len(data) < _HEAD.size:
        raise ValueError("not a trace")
    magic, events_most, snapshots_most, values, begin, end, _interval, written, taken = _HEAD.unpack_from(data)
    snapshot = struct.Struct(f"<{1 + values}Q")
    first = _HEAD.size + events_most * _EVENT.size
    if magic != MAGIC or values != len(counters.FIELDS) or len(data) < first + snapshots_most * snapshot.size:
        raise ValueError("not a trace")
    kept = [_EVENT.unpack_from(data, _HEAD.size + number % events_most * _EVENT.size)
            for number in range(max(0, written - events_most), written)]  # fmt: skip
    shots = [snapshot.unpack_from(data, first + number * snapshot.size) for number in range(min(taken, snapshots_most))]
    return Noted(begin, end, max(0, written - events_most), kept, [(shot[0], shot[1:]) for shot in shots])


def write(job: Path, program: Program) -> Path:
    """Make the trace of a job whose program has ended; returns the file, in the job's folder."""
    counted = counters.processes(job)
    noted: dict[int, Noted] = {}
    for file in sorted(job.glob("*.trace")):
        with suppress(OSError, ValueError):  # one killed while making its file
            noted[int(file.stem)] = parse(file.read_bytes())
    # A quick program may page before this agent has heard that it began; what it left running may page after its end.
    zero = min([program.clock, *(one.begin for one in noted.values())])
    end = max([program.clock_ended, *(one.end for one in noted.values())])
    path = job / "trace.json"
    path.unlink(missing_ok=True)  # everybody may write in that folder: it must be a new file, and no link
    with path.open("x") as out:
        out.write('{"traceEvents": [\n')
        life = _span(program.command, program.pid, LIFE, 0, end - zero,
                     id=program.pid, vnode=program.vnode, exit_code=program.exit_code)  # fmt: skip
        out.write(json.dumps(life))
        commands = {pid: one["command"] for pid, one in counted.items()} | {program.pid: program.command}
        for pid in sorted({program.pid, *noted}):
            out.write(",\n" + json.dumps(_named("process_name", pid, LIFE, commands.get(pid) or "?")))
        for pid, one in noted.items():
            blades = list(counted[pid]["blades"]) if pid in counted else []
            for event in _events(pid, one, blades, zero):
                out.write(",\n" + json.dumps(event))
        other = {
            "dropped_events": {str(pid): one.dropped for pid, one in noted.items()},
            # There was no room for their files.
            "untraced_processes": sorted(pid for pid, one in counted.items() if one["managed"] and pid not in noted),
        }
        out.write(f'\n], "displayTimeUnit": "ms", "otherData": {json.dumps(other)}}}\n')
    path.chmod(0o644)  # `split` may not be root's
    return path


def _events(pid: int, noted: Noted, blades: list[str], zero: int) -> Iterator[Event]:
    last = max([noted.begin, *(begin + length for begin, length, *_ in noted.events),
                *(when for when, _ in noted.snapshots)])  # fmt: skip
    yield _span("remote memory", pid, LIFE, noted.begin - zero, (noted.end or last) - noted.begin,
                ended="exit" if noted.end else "killed")  # fmt: skip
    lanes = {LANES + lane for *_, kind, lane in noted.events if kind == FLUSH}
    for track in sorted({LIFE, PAGER, *lanes}):
        yield _named("thread_name", pid, track, _NAMES.get(track, f"flush {track - LANES}"))
    if noted.dropped:
        first = min(begin for begin, *_ in noted.events)
        yield {"name": f"{noted.dropped} earlier events were dropped", "ph": "i", "s": "p", "pid": pid,
               "tid": thread(pid, PAGER), "ts": _us(first - zero)}  # fmt: skip
    for begin, length, page, pages, places, kind, lane in noted.events:
        if kind >= len(KINDS) or begin < noted.begin:
            continue  # killed while it was written
        args: dict[str, Any] = {}
        if pages:
            args["pages"] = pages
        if places:
            args["blades"] = ",".join(name for number, name in enumerate(blades) if places >> number & 1)
        if kind == MISS:
            args |= {"page": page, "piggyback": bool(lane)}
        yield _span(KINDS[kind], pid, LANES + lane if kind == FLUSH else PAGER, begin - zero, length, **args)
    yield from _counters(pid, noted, zero)


def _counters(pid: int, noted: Noted, zero: int) -> Iterator[Event]:
    """A value holds from its time to the next one of its track, so only changes are told."""
    at = {name: number for number, name in enumerate(counters.FIELDS)}
    told: dict[str, float] = {}

    def tell(when: int, name: str, value: float) -> Iterator[Event]:
        if told.get(name) != value:
            told[name] = value
            yield {"name": name, "ph": "C", "pid": pid, "ts": _us(when - zero), "args": {"value": value}}

    for (when, before), (then, after) in pairwise(noted.snapshots):
        for name in RATES:
            rate = (after[at[name]] - before[at[name]]) * _SECOND / max(1, then - when)
            yield from tell(when, f"{name}/s", round(rate, 1))
        for name in GAUGES:
            yield from tell(then, name, after[at[name]])
    if noted.snapshots:
        for name in RATES:
            yield from tell(noted.snapshots[-1][0], f"{name}/s", 0.0)


def thread(pid: int, track: int) -> int:
    """The thread id of a track. Perfetto may merge thread 0 with others; two processes need not share any."""
    return pid if track == LIFE else pid * 100 + track


def _span(name: str, pid: int, track: int, begin: int, length: int, **args: Any) -> Event:
    return {"name": name, "ph": "X", "pid": pid, "tid": thread(pid, track), "ts": _us(begin), "dur": _us(length),
            "args": args}  # fmt: skip


def _named(what: str, pid: int, track: int, name: str) -> Event:
    return {"name": what, "ph": "M", "pid": pid, "tid": thread(pid, track), "args": {"name": name}}


def _us(nanoseconds: int) -> float:
    return nanoseconds / 1000
