"""The memory monitor: gives a memory blade's memory to processor blades, by vRegions.

Memory is registered in slabs as it is asked for: registering pins pages, so a whole blade at once would cost seconds
at its start and the host's memory from then on. A processor's monitor connects (`verbs.accept`, service "memory"),
asks for regions, and then reads and writes them itself, one-sided: this agent's CPU is not on the data path, unlike
in LegoOS, where a miss is an RPC served by a worker thread (legoos.md 1.2). What a connection holds goes back when
it is released or its owner disappears; but for what a checkpoint needs, which is kept under the checkpoint's name
until a program that goes on claims it for its own connection, or it is discarded.
"""

from __future__ import annotations

import itertools
import mmap
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

from guest_agents import control
from guest_agents.budget import Budget
from guest_agents.config import AgentConfig
from guest_agents.lite.errors import LiteError
from guest_agents.splitkernel.managers.holder import Holder
from guest_agents.splitkernel.managers.memory import REPORT_SECONDS
from guest_agents.splitkernel.memory.blocks import USER as BUFFERS
from guest_agents.splitkernel.memory.buffers import COUNTED, SERVICE, Buffers
from guest_agents.splitkernel.opcodes import CONTROL, Tally
from guest_agents.splitkernel.storage.wire import Op
from guest_agents.verbs import rpc
from guest_agents.verbs.arena import Arena
from guest_agents.verbs.device import Device
from guest_agents.verbs.node import Accepted, Node

SLAB = 64 << 20
USER = "splitkernel"
WORKERS = 8
"""Threads that answer READs and WRITEs of files: they wait for storage blades."""
CONNECT_SECONDS = 10.0
"""As in process/monitor.py."""


@dataclass(frozen=True)
class Region:
    """A piece of a slab that one program's memory uses."""

    connection: int | None
    """None: it is kept."""
    pid: int
    slab: Arena
    offset: int
    size: int
    checkpoint: str | None = None
    """Whose it is while it is kept."""


class MemoryMonitor:
    """The slabs and their books; their memory comes from a budget that LITE and `buffers` draw on too."""

    def __init__(self, node: Node, budget: Budget, buffers: Buffers | None = None) -> None:
        self._node = node
        self._budget = budget
        self._buffers = buffers
        self._slabs: list[Arena] = []
        self._regions: dict[int, Region] = {}
        self._numbers = itertools.count(1)
        self._requests = 0
        self._refused = 0
        self.tally = Tally()
        self._lock = threading.Lock()
        node.services["memory"] = self._offer

    def handlers(self) -> dict[str, control.Handler]:
        """For the agent's control server."""
        counted = self.tally.counting({"memory.allocate": self.allocate, "memory.free": self.free})
        return {**counted, "memory.stats": self.stats, "memory.keep": self.keep, "memory.claim": self.claim,
                "memory.discard": self.discard}  # fmt: skip

    def allocate(self, request: control.Message) -> control.Message:
        """memory.allocate: a region of at least `size` bytes for a program of that connection's owner."""
        size = -(-int(request["size"]) // mmap.PAGESIZE) * mmap.PAGESIZE
        if size <= 0:
            raise control.ControlError(f"cannot allocate {size} bytes", None)
        with self._lock:  # with which a connection that ends is forgotten: so no region can come after that
            connection = self._node.accepted(int(request["connection"]))
            self._requests += 1
            slab, offset = self._place(size)
            number = next(self._numbers)
            self._regions[number] = Region(connection.number, int(request["pid"]), slab, offset, size)
        return {"region": number, "addr": slab.address + offset, "rkey": slab.rkey, "size": size}

    def free(self, request: control.Message) -> control.Message:
        """memory.free: give one region back."""
        with self._lock:
            region = self._regions.get(int(request["region"]))
            if region is None or region.connection != int(request["connection"]):
                raise control.ControlError(f"no region {request['region']} of that connection", None)
            self._return(int(request["region"]))
        return {}

    def keep(self, request: control.Message) -> control.Message:
        """memory.keep: the regions of a connection are the checkpoint `name`'s, whatever becomes of the connection.

        Which, in `regions`: as memory.claim says them.
        """
        name = str(request["name"])
        with self._lock:
            connection = self._node.accepted(int(request["connection"])).number
            return self._hand_over(lambda one: one.connection == connection, None, name)

    def claim(self, request: control.Message) -> control.Message:
        """memory.claim: those of the checkpoint `name` are this connection's now. Which, in `regions`: number, addr,
        rkey of each."""
        name = str(request["name"])
        with self._lock:  # as in `allocate`
            connection = self._node.accepted(int(request["connection"])).number
            return self._hand_over(lambda one: one.checkpoint == name, connection, None)

    def discard(self, request: control.Message) -> control.Message:
        """memory.discard: give back what the checkpoint `name` has here, if anything."""
        with self._lock:
            for number in [n for n, region in self._regions.items() if region.checkpoint == str(request["name"])]:
                self._return(number)
        return {}

    def _hand_over(
        self, is_one: Callable[[Region], bool], connection: int | None, checkpoint: str | None
    ) -> control.Message:
        """With the lock."""
        chosen = {number: region for number, region in self._regions.items() if is_one(region)}
        for number, region in chosen.items():
            self._regions[number] = replace(region, connection=connection, checkpoint=checkpoint)
        return {"regions": [[number, one.slab.address + one.offset, one.slab.rkey] for number, one in chosen.items()]}

    def stats(self, request: control.Message) -> control.Message:
        """memory.stats: what is given out and to how many, what was asked and how often there was no room."""
        del request
        kept, by_opcode = self._buffered()
        with self._lock:
            return {
                "regions": len(self._regions),
                "bytes_allocated": self._allocated(),
                "bytes_registered": sum(slab.size for slab in self._slabs),
                "bytes_total": self._budget.total,
                "bytes_of_others": self._budget.total - self._free() - sum(slab.size for slab in self._slabs),
                "connections": len({region.connection for region in self._regions.values()} - {None}),
                "kept": self._kept(),
                "refused": self._refused,
                "requests": {**self.tally.counts(), **by_opcode},
                "buffers": kept,
            }

    def _buffered(self) -> tuple[dict[str, int], dict[str, int]]:
        if self._buffers is None:
            return dict.fromkeys((*COUNTED, "files", "bytes", "limit"), 0), {}
        return self._buffers.stats(), self._buffers.tally.counts()

    def _free(self) -> int:
        """Bytes that nobody has, or only the buffers, which give way."""
        return self._budget.room + self._budget.taken().get(BUFFERS, 0)

    def load(self) -> dict[str, int]:
        """What the global memory manager is told: bytes that can still be given out, requests for regions so far."""
        with self._lock:
            unused = sum(slab.size for slab in self._slabs) - self._allocated()
            return {"free": self._free() + unused, "requests": self._requests}

    def _kept(self) -> dict[str, int]:
        """Bytes of each checkpoint."""
        sums: Counter[str] = Counter()
        for region in self._regions.values():
            if region.checkpoint is not None:
                sums[region.checkpoint] += region.size
        return dict(sums)

    def _offer(self, accepted: Accepted, device: Device) -> None:
        del device  # regions are asked for later, each in a slab with a key of its own
        accepted.on_close.append(lambda: self._forget(accepted.number))

    def _forget(self, connection: int) -> None:
        with self._lock:
            for number in [n for n, region in self._regions.items() if region.connection == connection]:
                self._return(number)

    def _return(self, number: int) -> None:
        region = self._regions.pop(number)
        region.slab.extents.free(region.offset)
        if not region.slab.extents.allocated:
            self._slabs.remove(region.slab)
            region.slab.close()
            self._budget.give(USER, region.slab.size)

    def _place(self, size: int) -> tuple[Arena, int]:
        """A free piece of at least ``size`` bytes, in a new slab when no other has one."""
        for slab in self._slabs:
            offset = slab.extents.allocate(size)
            if offset is not None:
                return slab, offset
        self._budget.press(max(SLAB, size))
        room = self._budget.room
        taken = min(max(SLAB, size), room)
        if size > room or not self._budget.take(USER, taken):
            unused = sum(slab.size for slab in self._slabs) - self._allocated()
            self._refused += 1
            raise control.ControlError(
                f"out of remote memory: {size} bytes asked, {room + unused} free", "add a memory blade, or run less"
            )
        try:
            slab = Arena(self._node.device, taken)
        except BaseException:
            self._budget.give(USER, taken)
            raise
        offset = slab.extents.allocate(size)
        assert offset is not None
        self._slabs.append(slab)
        return slab, offset

    def _allocated(self) -> int:
        return sum(slab.extents.allocated for slab in self._slabs)


def handlers(config: AgentConfig) -> dict[str, control.Handler]:
    """Start the memory monitor of this blade; what it adds to the agent's control server."""
    cache = Buffers(config.budget, lambda blade: rpc.Client(config.node, "storage", lambda: _storage(config, blade)))
    rpc.offer(config.node, SERVICE, cache.handle, {Op.READ, Op.WRITE}, WORKERS, (config.budget, BUFFERS))
    monitor = MemoryMonitor(config.node, config.budget, cache)
    threading.Thread(target=report_load, args=(config.holder, monitor), name="load", daemon=True).start()
    return monitor.handlers()


def _storage(config: AgentConfig, blade: str) -> control.ControlClient:
    address = config.peers("storage").get(blade)
    if address is None:
        raise control.ControlError(f"storage blade {blade} is not there", "is it up?")
    return control.ControlClient((address, control.PORT), config.secret, CONNECT_SECONDS)


def report_load(holder: Holder, monitor: MemoryMonitor) -> None:
    """Tell the global memory manager every half second how this blade is, as far as it is there."""
    while True:
        with suppress(LiteError):
            holder.ask("managers.load", 2.0, **monitor.load())
            monitor.tally.add(CONTROL["managers.load"])
        time.sleep(REPORT_SECONDS)
