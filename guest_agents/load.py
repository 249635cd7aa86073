"""How busy a blade is, as its kernel says: processor time and memory. Figures only; who asks twice makes rates."""

from __future__ import annotations

import os
import time
from pathlib import Path

from guest_agents.control import Handler, Message

_IDLE, _WAITING = 3, 4
"""Of the first line of /proc/stat; behind the eighth come the guests', which are counted twice."""


def handlers() -> dict[str, Handler]:
    """For the agent's control server.

    agent.load also says which `life` of the agent this is: what it counts begins again with each.
    """
    life = f"{os.getpid()}.{time.time_ns()}"
    return {"agent.load": lambda _request: {"life": life, **load()}}


def load() -> Message:
    """Seconds of processor time since boot (of all processors, and of this agent), bytes of memory."""
    ticks = [int(text) for text in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    second = os.sysconf("SC_CLK_TCK")
    memory = _meminfo()
    return {
        "monotonic": time.monotonic(),
        "cpus": os.cpu_count(),
        "cpu_seconds": {"busy": (sum(ticks) - ticks[_IDLE] - ticks[_WAITING]) / second, "all": sum(ticks) / second},
        "agent_cpu_seconds": time.process_time(),
        "memory_total": memory["MemTotal"],
        "memory_free": memory["MemAvailable"],
    }


def _meminfo() -> dict[str, int]:
    lines = (line.partition(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return {name: int(value.split()[0]) << 10 for name, _, value in lines}
