"""The counters a program's pager leaves behind (native/counters.h), added up over the programs of a job."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

MAGIC = 0x31544E43
FIELDS = (
    "excache_bytes",
    "managed",
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
    "wait_nanoseconds",
    "busy_nanoseconds",
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
)
BLADE_FIELDS = ("misses", "flushes", "bytes_in", "bytes_out")
BLADES = 16
NAME = 32
_HEAD = struct.Struct(f"<Q{len(FIELDS)}QQ")
_BLADE = struct.Struct(f"<{NAME}s{len(BLADE_FIELDS)}Q")
SIZE = _HEAD.size + BLADES * _BLADE.size


def parse(data: bytes) -> dict[str, Any]:
    """One program's counters; ValueError if this is not a counters file."""
    if len(data) != SIZE:
        raise ValueError(f"counters are {SIZE} bytes, not {len(data)}")
    magic, *values, blades = _HEAD.unpack_from(data)
    if magic != MAGIC or blades > BLADES:
        raise ValueError("not a counters file")
    result: dict[str, Any] = dict(zip(FIELDS, values, strict=True))
    result["blades"] = {}
    for number in range(blades):
        name, *numbers = _BLADE.unpack_from(data, _HEAD.size + number * _BLADE.size)
        result["blades"][name.rstrip(b"\0").decode()] = dict(zip(BLADE_FIELDS, numbers, strict=True))
    return result


def total(job: Path) -> dict[str, Any]:
    """The sums over all programs of a job; `programs` and `managed` count them."""
    result: dict[str, Any] = dict.fromkeys(FIELDS, 0)
    result.update(programs=0, blades={})
    for file in sorted(job.glob("*.counters")):
        try:
            one = parse(file.read_bytes())
        except ValueError:
            continue  # a program killed while making its file
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
