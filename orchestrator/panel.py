"""Two snapshots of a rack made into what the dashboard's page draws."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from orchestrator.network.place import FABRIC
from orchestrator.observer import Snapshot
from orchestrator.rates import view
from orchestrator.wiring import Wire


def panel(before: Snapshot, now: Snapshot) -> dict[str, Any]:
    """The rack in the order of its places, programs, and what each blade does. Rates are per second, None if unknown.

    `hit_ratio` is the share of page faults in between that no memory blade had to answer.
    """
    look = view(before.sample, now.sample)
    loads = {blade["name"]: blade for blade in look["blades"]}
    seconds = now.monotonic - before.monotonic
    return {
        "rack": now.rack,
        "time": round(now.time, 3),
        "accelerator": now.accelerator,
        "blades": [_blade(wire, loads.get(wire.blade, {}), look, before, now, seconds) for wire in now.wires],
        "programs": [_program(program) for program in look["programs"]],
    }


def _blade(wire: Wire, load: Mapping[str, Any], look: Mapping[str, Any], before: Snapshot, now: Snapshot,
           seconds: float) -> dict[str, Any]:  # fmt: skip
    host = now.host.get(wire.blade)
    return {
        **wire.to_json(),
        "answers": "cpu_percent" in load,
        "error": load.get("error"),
        "cpu_percent": load.get("cpu_percent"),
        "memory_used": load.get("memory_used"),
        "memory_total": load.get("memory_total"),
        "host_cpu_percent": _host_cpu(wire.blade, before, now, seconds),
        "host_bytes": host.resident_bytes if host else None,
        **_fabric(wire.blade, before, now, seconds),
        "does": _does(wire, look),
    }


def _host_cpu(blade: str, before: Snapshot, now: Snapshot, seconds: float) -> float | None:
    if blade not in before.host or blade not in now.host or seconds <= 0:
        return None
    return _rate(before.host[blade].cpu_seconds, now.host[blade].cpu_seconds, seconds, 100)


def _fabric(blade: str, before: Snapshot, now: Snapshot, seconds: float) -> dict[str, float | None]:
    """Bytes per second through its link to the fabric."""
    then, present = (shot.host[blade].traffic.get(FABRIC) if blade in shot.host else None for shot in (before, now))
    if then is None or present is None or seconds <= 0:
        return {"bytes_in": None, "bytes_out": None}
    return {"bytes_in": _rate(then.bytes_in, present.bytes_in, seconds),
            "bytes_out": _rate(then.bytes_out, present.bytes_out, seconds)}  # fmt: skip


def _rate(then: float, now: float, seconds: float, factor: float = 1) -> float | None:
    """None if it counts anew: the blade is another."""
    return round(factor * (now - then) / seconds, 1) if now >= then else None


def _does(wire: Wire, look: Mapping[str, Any]) -> dict[str, Any]:
    """What a blade of its kind is there for, in figures."""
    if wire.kind == "processor":
        programs = [program for program in look["programs"] if program["id"].startswith(f"{wire.blade}.")]
        paging = [program for program in programs if program["counters"]["managed"]]
        return {
            "programs": len(programs),
            "hit_ratio": _hit_ratio(paging),
            "misses": _sum(program["rates"]["misses"] for program in paging),
            "flushes": _sum(program["rates"]["flushes"] for program in paging),
        }
    told = next((one for one in [*look["memory"], *look["storage"]] if one["name"] == wire.blade), None)
    if told is None:
        return {}
    room = {"bytes_total": told["bytes_total"]}
    if wire.kind == "memory":
        return {**room, "bytes_allocated": told["bytes_allocated"], "bytes_of_others": told["bytes_of_others"]}
    return {**room, "bytes_free": told["bytes_free"], "requests": told["rates"]["requests"]}


def _hit_ratio(programs: Iterable[Mapping[str, Any]]) -> float | None:
    """Of the faults in between; while there are none, of all so far."""
    programs = list(programs)
    faults = _sum(program["rates"]["faults"] for program in programs)
    misses = _sum(program["rates"]["misses"] for program in programs)
    if not faults or misses is None:
        faults = sum(program["counters"]["faults"] for program in programs)
        misses = sum(program["counters"]["misses"] for program in programs)
    return round(max(0.0, 1 - misses / faults), 4) if faults else None


def _sum(rates: Iterable[float | None]) -> float | None:
    known = [rate for rate in rates if rate is not None]
    return round(sum(known), 1) if known else None


def _program(program: Mapping[str, Any]) -> dict[str, Any]:
    rates, counted = program["rates"], program["counters"]
    return {
        "id": program["id"],
        "command": program["command"],
        "excache": program["excache"],
        "bytes_held": program["bytes_held"],
        "hit_ratio": _hit_ratio([program]) if counted["managed"] else None,
        **{name: rates[name] for name in ("faults", "misses", "flushes", "bytes_in", "bytes_out")},
    }
