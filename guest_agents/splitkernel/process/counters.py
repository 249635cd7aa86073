"""The counters that a program's pager keeps in a file while it runs and leaves behind (native/counters.h).

A job is what one `split run` started: a program and the programs that it starts, each with counters of its own.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

MAGIC = 0x31544E43
FIELDS = (
    "excache_bytes",
    "managed",
    "faults",
    "pages_held",
    "pages_mapped",
    "pages_pooled",
    "replica_requests",
    "misses",
    "flushes",
    "zero_fills",
    "piggybacks",
    "evictions",
    "buffer_hits",
    "write_faults",
    "reads",
    "writes",
    "zero_drops",
    "bytes_in",
    "bytes_out",
    "pages_touched",
    "forks",
    "regions",
    "regions_returned",
    "wait_nanoseconds",
    "busy_nanoseconds",
    "miss_nanoseconds",
    "read_nanoseconds",
    "install_nanoseconds",
    "packed",
    "packed_bytes",
    "packed_hits",
    "spills",
    "pool_bytes",
    "replica_writes",
    "failovers",
    "rereplicated_bytes",
    "degraded_regions",
    "prefetched",
    "sets",
    "dozes",
    "doze_hits",
    "evicted_ahead",
    "overlaps",
)
BLADE_FIELDS = ("misses", "flushes", "bytes_in", "bytes_out", "reads", "writes", "piggybacks", "replica_writes")
BLADES = 16
NAME = 32
COMMAND = 16
_HEAD = struct.Struct(f"<Q{len(FIELDS)}QQ")
_BLADE = struct.Struct(f"<{NAME}s{len(BLADE_FIELDS)}Q")
_COMMAND_AT = _HEAD.size + BLADES * _BLADE.size
SIZE = _COMMAND_AT + COMMAND


def parse(data: bytes) -> dict[str, Any]:
    """One program's counters; ValueError if this is not a counters file."""
    if len(data) != SIZE:
        raise ValueError(f"counters are {SIZE} bytes, not {len(data)}")
    magic, *values, blades = _HEAD.unpack_from(data)
    if magic != MAGIC or blades > BLADES:
        raise ValueError("not a counters file")
    result: dict[str, Any] = dict(zip(FIELDS, values, strict=True))
    result["command"] = data[_COMMAND_AT:].split(b"\0")[0].decode(errors="replace")
    result["blades"] = {}
    for number in range(blades):
        name, *numbers = _BLADE.unpack_from(data, _HEAD.size + number * _BLADE.size)
        result["blades"][name.rstrip(b"\0").decode()] = dict(zip(BLADE_FIELDS, numbers, strict=True))
    return result


def processes(job: Path) -> dict[int, dict[str, Any]]:
    """Every process of a job that has counters, by its id: those that page; of the others, those that have ended."""
    result = {}
    for file in sorted(job.glob("*.counters")):
        # One that has ended may be cleared away with its job, one that was killed as it made its file is incomplete.
        with suppress(OSError, ValueError):
            result[int(file.stem)] = parse(file.read_bytes())
    return result


def total(counted: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The sums over programs; `programs` and `managed` count them."""
    result: dict[str, Any] = dict.fromkeys(FIELDS, 0)
    result.update(programs=0, blades={})
    for one in counted:
        before = dict(result)
        result["programs"] += 1
        for name in FIELDS:
            result[name] += one[name]
        for name in ("excache_bytes", "sets"):  # each program has an ExCache of its own, perhaps not in use yet
            result[name] = max(before[name], one[name])
        for blade, numbers in one["blades"].items():
            sums = result["blades"].setdefault(blade, dict.fromkeys(BLADE_FIELDS, 0))
            for name, value in numbers.items():
                sums[name] += value
    return result
