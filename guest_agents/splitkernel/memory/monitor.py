"""The memory monitor: gives a memory blade's memory to processor blades, by vRegions.

The blade's free memory is one registered arena. A processor's monitor connects (`verbs.accept`, service "memory"),
asks for regions, and then reads and writes them itself, one-sided: this agent's CPU is not on the data path, unlike
in LegoOS, where a miss is an RPC served by a worker thread (legoos.md 1.2). What a connection holds goes back when
it is released or its owner disappears.
"""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass
from pathlib import Path

from guest_agents import control
from guest_agents.config import AgentConfig
from guest_agents.verbs.arena import Arena
from guest_agents.verbs.device import Device
from guest_agents.verbs.node import Accepted, Node


@dataclass(frozen=True)
class Region:
    """A piece of the arena that one program's memory uses."""

    connection: int
    pid: int
    offset: int
    size: int


class MemoryMonitor:
    """The arena and its books."""

    def __init__(self, node: Node, size: int) -> None:
        self._node = node
        self._arena = Arena(node.device, size)
        self._regions: dict[int, Region] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        node.services["memory"] = self._offer

    def handlers(self) -> dict[str, control.Handler]:
        """For the agent's control server."""
        return {"memory.allocate": self.allocate, "memory.free": self.free, "memory.stats": self.stats}

    def allocate(self, request: control.Message) -> control.Message:
        """memory.allocate: a region of at least `size` bytes for a program of that connection's owner."""
        connection = self._node.accepted(int(request["connection"]))
        size = int(request["size"])
        if size <= 0:
            raise control.ControlError(f"cannot allocate {size} bytes", None)
        with self._lock:
            offset = self._arena.extents.allocate(size)
            if offset is None:
                left = self._arena.size - self._arena.extents.allocated
                raise control.ControlError(
                    f"out of remote memory: {size} bytes asked, {left} free", "add a memory blade, or run less"
                )
            number = next(self._numbers)
            self._regions[number] = Region(connection.number, int(request["pid"]), offset, size)
        address = self._arena.address + offset
        return {"region": number, "addr": address, "rkey": self._arena.rkey, "size": size}

    def free(self, request: control.Message) -> control.Message:
        """memory.free: give one region back."""
        with self._lock:
            region = self._regions.get(int(request["region"]))
            if region is None or region.connection != int(request["connection"]):
                raise control.ControlError(f"no region {request['region']} of that connection", None)
            self._return(int(request["region"]))
        return {}

    def stats(self, request: control.Message) -> control.Message:
        """memory.stats: what is given out, and to how many."""
        del request
        with self._lock:
            return {
                "regions": len(self._regions),
                "bytes_allocated": self._arena.extents.allocated,
                "bytes_total": self._arena.size,
                "connections": len({region.connection for region in self._regions.values()}),
            }

    def _offer(self, accepted: Accepted, device: Device) -> None:
        del device
        accepted.offer.update(addr=self._arena.address, rkey=self._arena.rkey, size=self._arena.size)
        accepted.on_close.append(lambda: self._forget(accepted.number))

    def _forget(self, connection: int) -> None:
        with self._lock:
            for number in [n for n, region in self._regions.items() if region.connection == connection]:
                self._return(number)

    def _return(self, number: int) -> None:
        self._arena.extents.free(self._regions.pop(number).offset)


def free_memory(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes the kernel believes can still be used (MemAvailable)."""
    for line in meminfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) << 10
    raise OSError(f"{meminfo} has no MemAvailable")


def handlers(config: AgentConfig) -> dict[str, control.Handler]:
    """Start the memory monitor of this blade; what it adds to the agent's control server."""
    size = config.arena or max(free_memory() - config.memory_kept, 16 << 20)
    return MemoryMonitor(config.node, size // (4 << 20) * (4 << 20)).handlers()
