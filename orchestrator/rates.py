"""Two samples of a rack made into what `rackless top` shows: what is there, and what happens per second."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from orchestrator.sampler import Sample

PROGRAM_RATES = ("faults", "misses", "flushes", "zero_fills", "piggybacks", "evictions", "bytes_in", "bytes_out")
BUFFER_RATES = ("hits", "misses", "bytes_hit", "bytes_missed", "bytes_written")
MEMORY_RATES = ("misses", "flushes", "piggybacks", "bytes_in", "bytes_out")
STORAGE_RATES = ("requests", "bytes_in", "bytes_out")
_PAGE = 4096


def view(before: Sample, now: Sample) -> dict[str, Any]:
    """What two samples show. Rates are per second, and None if the agent was restarted in between, or is new."""
    return {
        "blades": [_blade(name, before.get(name, {}), told) for name, told in now.items()],
        "programs": [program for name, told in now.items() if told["kind"] == "processor"
                     for program in _programs(before.get(name, {}), told)],
        "memory": [_memory(name, before, now) for name in _answering(now, "memory")],
        "storage": [_storage(name, before.get(name, {}), now[name]) for name in _answering(now, "storage")],
        "managers": next((now[name]["stats"] for name in _answering(now, "manager")), None),
    }  # fmt: skip


def _answering(sample: Sample, kind: str) -> Iterator[str]:
    return (name for name, told in sample.items() if told["kind"] == kind and told.get("stats"))


def _seconds(before: Mapping[str, Any], now: Mapping[str, Any]) -> float | None:
    """Between two samples of a blade; None if these are not of one life of its agent."""
    if "load" not in before or "load" not in now or before["load"]["life"] != now["load"]["life"]:
        return None
    passed: float = now["load"]["monotonic"] - before["load"]["monotonic"]
    return passed if passed > 0 else None


def _rate(before: Mapping[str, Any], now: Mapping[str, Any], name: str, seconds: float | None) -> float | None:
    if seconds is None:
        return None
    change: float = now.get(name, 0) - before.get(name, 0)
    return round(change / seconds, 1)


def _rates(
    before: Mapping[str, Any] | None, now: Mapping[str, Any], names: tuple[str, ...], seconds: float | None
) -> dict[str, float | None]:
    known = seconds if before is not None else None
    return {name: _rate(before or {}, now, name, known) for name in names}


def _blade(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    about = {"name": name, "kind": now["kind"], "error": now.get("error")}
    if "load" not in now:
        return about
    load, earlier = now["load"], before.get("load")
    busy = agent = None
    # The kernel's clock ticks go on when an agent is restarted; the agent's do not.
    if earlier is not None and load["cpu_seconds"]["all"] > earlier["cpu_seconds"]["all"]:
        passed = load["cpu_seconds"]["all"] - earlier["cpu_seconds"]["all"]
        busy = round(100 * (load["cpu_seconds"]["busy"] - earlier["cpu_seconds"]["busy"]) / passed, 1)
    if earlier is not None and (seconds := _seconds(before, now)) is not None:
        agent = round(100 * (load["agent_cpu_seconds"] - earlier["agent_cpu_seconds"]) / seconds, 1)
    return {
        **about,
        "cpus": load["cpus"],
        "cpu_percent": busy,
        "agent_cpu_percent": agent,
        "memory_total": load["memory_total"],
        "memory_used": load["memory_total"] - load["memory_free"],
    }


def _by_id(told: Mapping[str, Any]) -> dict[tuple[str, float], Mapping[str, Any]]:
    return {(one["id"], one["started"]): one for one in told.get("stats", {}).get("running", ())}


def _programs(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    seconds, earlier = _seconds(before, now), _by_id(before)
    for key, program in _by_id(now).items():
        counted = program["counters"]
        then = earlier[key]["counters"] if key in earlier else None
        opcodes = tuple(counted["requests"])
        pages = bool(counted["managed"])  # before it has outgrown its ExCache nobody counts
        yield {
            **program,
            "excache_pages": counted["pages_mapped"] + counted["pages_pooled"] if pages else None,
            "bytes_held": counted["pages_held"] * _PAGE if pages else None,
            "working_set_at_most": _working_set(then, counted) if pages else None,
            "rates": _rates(then, counted, PROGRAM_RATES, seconds),
            "request_rates": _rates(then and then["requests"], counted["requests"], opcodes, seconds),
        }


def _working_set(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> int | None:
    """Bytes that the program can have used between the samples, at most.

    A page that it used was mapped then: it still is, or was evicted in between. Which of the mapped ones it used
    nobody knows, as hits are not seen.
    """
    if before is None:
        return None
    pages: int = now["pages_mapped"] + now["evictions"] - before["evictions"]
    held: int = max(now["pages_held"], before["pages_held"])
    return min(pages, held) * _PAGE


def _traffic(sample: Sample, blade: str, only: set[tuple[str, float]]) -> Counter[str]:
    """What programs have had to do with a memory blade so far: it sees nothing of that itself."""
    sums: Counter[str] = Counter()
    for told in sample.values():
        for key, program in _by_id(told).items():
            if key in only:
                sums.update(program["counters"]["blades"].get(blade, {}))
    return sums


def _memory(name: str, before: Sample, now: Sample) -> dict[str, Any]:
    stats, earlier = now[name]["stats"], before.get(name, {}).get("stats") or None
    seconds = _seconds(before.get(name, {}), now[name])
    # A program that has come or gone in between, or whose blade's agent was restarted, says nothing of a rate.
    both = {key for blade, told in now.items() if _seconds(before.get(blade, {}), told) for key in _by_id(told)
            if key in _by_id(before[blade])}  # fmt: skip
    traffic = _rates(_traffic(before, name, both), _traffic(now, name, both), MEMORY_RATES, seconds)
    opcodes = tuple(stats["requests"])
    return {
        "name": name,
        **stats,
        "rates": traffic,
        "buffer_rates": _rates(earlier and earlier["buffers"], stats["buffers"], BUFFER_RATES, seconds),
        "request_rates": _rates(earlier and earlier["requests"], stats["requests"], opcodes, seconds),
    }


def _storage(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    stats, earlier, seconds = now["stats"], before.get("stats") or None, _seconds(before, now)
    opcodes = tuple(stats["by_opcode"])
    return {
        "name": name,
        **stats,
        "rates": _rates(earlier, stats, STORAGE_RATES, seconds),
        "request_rates": _rates(earlier and earlier["by_opcode"], stats["by_opcode"], opcodes, seconds),
    }
