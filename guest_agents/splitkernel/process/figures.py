"""What follows from a pager's counters: requests by opcode, what can be known of hits, and a model of the slowdown."""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from guest_agents.splitkernel import opcodes
from guest_agents.splitkernel.process import counters
from guest_agents.splitkernel.process.programs import Programs

MISS_US, FLUSH_US, PIGGYBACK_US = 6.31, 6.11, 8.23
"""What LegoOS needs to fetch a page of 4 KiB, to flush one, and to do both with one request: microseconds on 40 Gbit/s
InfiniBand, measured by its authors at boot (LegoOS, Documentation/profile.md; legoos.md section 2)."""
ROOM = 40_000
"""Most characters of JSON for the processes of a job: an answer of the desk is one message of 64 KiB."""
_NANO = 1e-9


def requests(counted: Mapping[str, Any]) -> dict[str, int]:
    """What a pager sent, by opcode: READs, WRITEs of first and of second copies, regions asked for and given back.

    One of ours carries up to 32 pages (READ) or 16 (WRITE), one of LegoOS's a page. Copies that give regions their
    second place back are none of these.
    """
    copied = counted["rereplicated_bytes"] // mmap.PAGESIZE  # page by page, one READ and one WRITE each
    return {
        opcodes.MISS: max(counted["reads"] - copied, counted["misses"]),
        opcodes.FLUSH: max(counted["writes"] - counted["replica_requests"] - copied, 0),
        opcodes.REPLICA: counted["replica_requests"],
        opcodes.CONTROL["memory.allocate"]: counted["regions"],
        opcodes.CONTROL["memory.free"]: counted["regions_returned"],
    }


def hit_ratio_of_faults(counted: Mapping[str, Any]) -> float | None:
    """The share of page faults that no memory blade had to answer; None if there was no fault.

    It is not the share of all accesses: those to mapped pages, nearly all, raise no fault and are seen by nobody.
    """
    return round(1 - counted["misses"] / counted["faults"], 4) if counted["faults"] else None


def model(counted: Mapping[str, Any], wall_seconds: float) -> dict[str, Any]:
    """What the network would have cost this run on LegoOS's hardware: a model, not a measurement.

    Every page that came or went (first copies) costs what LegoOS's request for one page does, and the program waits
    for each, as it does there; a page that came together with flushed ones is a piggyback with one of them. A slowdown
    needs the time that the program takes without any of this: taken for it is the time that the pager was not busy.
    """
    pages_in = (counted["bytes_in"] - counted["rereplicated_bytes"]) // mmap.PAGESIZE
    both = min(counted["piggybacks"], pages_in, counted["flushes"])
    costs = (pages_in - both) * MISS_US + (counted["flushes"] - both) * FLUSH_US + both * PIGGYBACK_US
    network = costs / 1e6
    local = max(wall_seconds - counted["busy_nanoseconds"] * _NANO, 0.0)
    return {
        "label": "a model: pages moved here x LegoOS's microseconds per page; not a measured time",
        "miss_us": MISS_US,
        "flush_us": FLUSH_US,
        "piggyback_us": PIGGYBACK_US,
        "network_seconds": round(network, 6),
        "local_seconds": round(local, 6),
        "slowdown": round(1 + network / local, 4) if local > 0 else None,
    }


def of_job(job: Path) -> dict[str, Any]:
    """The counters of a job, added up, and those of each of its processes that page, the busiest first.

    `processes_left_out` counts those that are left out because there are too many to tell of.
    """
    counted = counters.processes(job)
    sums = counters.total(counted.values())
    sums["working_set_bytes"] = sums["pages_touched"] * mmap.PAGESIZE
    paging = {pid: one for pid, one in counted.items() if one["managed"]}
    busiest = sorted(paging, key=lambda pid: paging[pid]["faults"], reverse=True)
    told: list[dict[str, Any]] = []
    room = ROOM
    for pid in busiest:
        one = {"pid": pid, **_with_figures(paging[pid])}
        room -= len(json.dumps(one))
        if room < 0:
            break
        told.append(one)
    return {**_with_figures(sums), "processes": told, "processes_left_out": len(paging) - len(told)}


def running(programs: Programs) -> list[dict[str, Any]]:
    """The programs that run on this blade, with the counters that they have now.

    Only a process that has outgrown its ExCache has any: before, all of its memory is here, and nobody counts.
    """
    return [
        {"id": name, "vnode": program.vnode, "command": program.command, "started": program.started,
         "excache": program.excache, "counters": of_job(program.job)}
        for name, program in programs.running().items() if program.job is not None
    ]  # fmt: skip


def _with_figures(counted: dict[str, Any]) -> dict[str, Any]:
    return {**counted, "requests": requests(counted), "hit_ratio_of_faults": hit_ratio_of_faults(counted)}
