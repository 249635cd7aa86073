"""A rack of LITE tiers in one process: real control servers, membership, directory and locks on loopback addresses.

Only the native core needs an RDMA device; a stand-in keeps its tables and copies memory within this process.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import mmap
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from guest_agents import control
from guest_agents.budget import Budget
from guest_agents.lite.directory import Directory
from guest_agents.lite.errors import (
    BadArgument,
    BadHandle,
    LiteError,
    NodeDead,
    NodeUnreachable,
    PermissionDenied,
    Revoked,
    error_for,
)
from guest_agents.lite.tier import Settings, Tier
from guest_agents.membership import Manager, Membership, Timing

SECRET = b"s" * 32
PATIENT = Timing(0.1, 20.0)
"""A process that shares its machine may well be held up for seconds: nobody shall die of that."""
_NOTICED_SECONDS = 0.5


class Slab:
    """Memory that all cores of this process can reach, as if by RDMA."""

    def __init__(self, size: int, closed: Callable[[Slab], None]) -> None:
        self._memory = mmap.mmap(-1, size)
        self.address = ctypes.addressof((ctypes.c_char * size).from_buffer(self._memory))
        self.bytes = size
        self.rkey = 7
        self._closed = closed

    def close(self) -> None:
        self._closed(self)


class Fabric:
    """Which cores there are, and which of their memory may be reached."""

    def __init__(self) -> None:
        self.cores: dict[int, StandInCore] = {}
        self.atomic = threading.Lock()

    def check(self, asker: StandInCore, node: int, address: int, length: int) -> None:
        core = self.cores.get(node)
        if node == 0 or asker.dead.get(node, 0) >= asker.peers.get(node, 0) > 0:
            raise NodeDead
        if core is None or core.gone or (core is not asker and asker.peers.get(node) != core.incarnation):
            raise NodeUnreachable
        if core is not asker and core.dead.get(asker.node, 0) >= asker.incarnation:
            raise NodeUnreachable  # it has destroyed its end
        assert any(s.address <= address and address + length <= s.address + s.bytes for s in core.slabs), "stray access"


class StandInCore:
    """The tables of core.Core, without RDMA."""

    def __init__(self, fabric: Fabric) -> None:
        self.fabric = fabric
        self.node = self.incarnation = 0
        self.gone = False
        self.slabs: list[Slab] = []
        self.peers: dict[int, int] = {}
        self.dead: dict[int, int] = {}
        self.prepared: set[int] = set()
        self.lmrs: dict[int, dict[str, Any]] = {}
        self.handles: dict[tuple[int, int], list[int]] = {}
        self.clients: dict[int, int] = {}
        self.channels: list[int] = []
        self.events: queue.Queue[Any] = queue.Queue()
        self.changed = threading.Condition()
        self._numbers = itertools.count(1)

    def join(self, node: int, incarnation: int) -> None:
        self.node, self.incarnation = node, incarnation
        self.peers.clear()
        self.fabric.cores[node] = self

    def slab(self, size: int) -> Slab:
        slab = Slab(size, self.slabs.remove)
        self.slabs.append(slab)
        return slab

    def memset_local(self, address: int, byte: int, length: int) -> None:
        ctypes.memset(address, byte, length)

    def memmove_local(self, target: int, source: int, length: int) -> None:
        ctypes.memmove(target, source, length)

    def read_into(self, node: int, address: int, rkey: int, target: int, length: int) -> None:
        self.fabric.check(self, node, address, length)
        ctypes.memmove(target, address, length)

    def write_from(self, node: int, address: int, rkey: int, source: int, length: int) -> None:
        self.read_into(node, address, rkey, address, length)
        ctypes.memmove(address, source, length)

    def fetch_add(self, node: int, address: int, rkey: int, addend: int) -> int:
        self.fabric.check(self, node, address, 8)
        with self.fabric.atomic:
            word = ctypes.c_uint64.from_address(address)
            before = word.value
            word.value = before + addend
            return before

    def cas(self, node: int, address: int, rkey: int, guess: int, value: int) -> int:
        self.fabric.check(self, node, address, 8)
        with self.fabric.atomic:
            word = ctypes.c_uint64.from_address(address)
            before = word.value
            if before == guess:
                word.value = value
            return before

    def peer_prepare(self, node: int, incarnation: int) -> dict[str, Any]:
        if incarnation <= self.dead.get(node, 0):
            raise NodeDead
        self.prepared.add(node)
        return {"from": self.node}

    def peer_connect(self, node: int, incarnation: int, remote: dict[str, Any]) -> None:
        assert node in self.prepared
        assert remote == {"from": node}
        self.peers[node] = incarnation

    def peer_dead(self, node: int, incarnation: int) -> None:
        self.dead[node] = max(incarnation, self.dead.get(node, 0))

    def client_add(self, pid: int) -> int:
        number = next(self._numbers)
        self.clients[number] = pid
        return number

    def channel_add(self, client: int, fd: int, mailbox: bool = False) -> int | None:
        self.channels.append(fd)
        return None

    def client_remove(self, client: int) -> None:
        del self.clients[client]
        for key in [key for key in self.handles if key[0] == client]:
            self.handle_drop(*key)

    def lmr_put(self, lmr: int, blocks: list[tuple[int, int, int, int]]) -> None:
        self.lmrs.setdefault(lmr, {"blocks": blocks, "frozen": False, "code": 0, "busy": 0})

    def lmr_freeze(self, lmr: int, timeout: float = 30.0) -> None:
        with self.changed:
            self.lmrs[lmr]["frozen"] = True
            assert self.changed.wait_for(lambda: not self.lmrs[lmr]["busy"], timeout)

    def lmr_replace(self, lmr: int, blocks: list[tuple[int, int, int, int]]) -> None:
        if not self.lmrs[lmr]["frozen"]:
            raise BadArgument
        self.lmrs[lmr]["blocks"] = blocks

    def lmr_thaw(self, lmr: int) -> None:
        with self.changed:
            self.lmrs[lmr]["frozen"] = False
            self.changed.notify_all()

    def lmr_kill(self, lmr: int, code: int) -> None:
        with self.changed:
            self.lmrs[lmr]["code"] = code
            self.changed.notify_all()
            self.changed.wait_for(lambda: not self.lmrs[lmr]["busy"])
        self._forget(lmr)

    def handle_add(self, client: int, lmr: int, permissions: int) -> int:
        number = next(self._numbers)
        self.handles[client, number] = [lmr, permissions]
        return number

    def handle_set(self, client: int, handle: int, permissions: int) -> None:
        self.handles[client, handle][1] = permissions

    def handle_drop(self, client: int, handle: int) -> None:
        lmr, _permissions = self.handles.pop((client, handle))
        self._forget(lmr)

    def _forget(self, lmr: int) -> None:
        if self.lmrs[lmr]["code"] and all(lmr != other for other, _permissions in self.handles.values()):
            del self.lmrs[lmr]

    def next_event(self, timeout: float) -> Any:
        with suppress(queue.Empty):
            return self.events.get(timeout=timeout)
        return None

    def stats(self) -> dict[str, Any]:
        return {"peers": {}, "queue_pairs": 4 * (len(self.peers) + 1)}

    # What a data channel would do

    def access(self, client: int, handle: int, offset: int, data: bytes | int) -> bytes:
        """Write `data`, or read so many bytes."""
        if (client, handle) not in self.handles:
            raise BadHandle
        number, permissions = self.handles[client, handle]
        if not permissions:
            raise Revoked
        if not permissions & (1 if isinstance(data, int) else 2):
            raise PermissionDenied
        lmr = self.lmrs[number]
        with self.changed:
            assert self.changed.wait_for(lambda: not lmr["frozen"] or lmr["code"], 30)
            if lmr["code"]:
                raise error_for(lmr["code"])
            lmr["busy"] += 1
        try:
            out, begin, length = b"", 0, data if isinstance(data, int) else len(data)
            for node, address, _rkey, size in lmr["blocks"]:
                low, high = max(offset, begin), min(offset + length, begin + size)
                if low < high:
                    self.fabric.check(self, node, address + low - begin, high - low)
                    if isinstance(data, int):
                        out += ctypes.string_at(address + low - begin, high - low)
                    else:
                        ctypes.memmove(address + low - begin, data[low - offset : high - offset], high - low)
                begin += size
            return out
        finally:
            with self.changed:
                lmr["busy"] -= 1
                self.changed.notify_all()


class MortalServer(control.Server):
    """A control server that can be killed, with the connections it has."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._open: list[socket.socket] = []

    def _serve(self, client: socket.socket, name: str) -> None:
        self._open.append(client.dup())
        super()._serve(client, name)

    def kill(self) -> None:
        self.close()
        for connection in self._open:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()


class Blade:
    """One blade's tier, with its control server; the first is the manager."""

    def __init__(self, rack: Rack, name: str, index: int) -> None:
        self.rack, self.name = rack, name
        self.address = f"{rack.network}.{index + 1}"
        self.core = StandInCore(rack.fabric)
        self.manager: Manager | None = None
        self.directory: Directory | None = None
        if index == 0:
            self.manager = Manager(name, rack.timing, lambda: rack.expected)
        about = {"name": name, "kind": "manager" if index == 0 else "memory", "address": self.address,
                 "management": self.address, "node_id": index + 1}  # fmt: skip
        self.membership = Membership((rack.manager_address, rack.port), SECRET, about, rack.timing)
        self.budget = Budget(rack.memory)
        path = rack.folder / f"{name}.sock"
        settings = Settings(name, rack.manager_address, SECRET, rack.port, path, 1 << 20)
        self.tier = Tier(self.core, self.membership, settings, self.budget, self.manager)  # type: ignore[arg-type]
        handlers: dict[str, control.Handler] = {}
        if self.manager is None:
            handlers |= self.tier.handlers()
        else:
            self.directory = Directory(self.manager, self.tier.links)
            self.manager.books = self.directory
            handlers |= {**self.manager.handlers(), **self.tier.handlers(self.directory.handlers())}
        self.server = MortalServer((self.address, rack.port), SECRET, handlers)
        rack.port = self.server.address[1]
        self.membership._manager = (rack.manager_address, rack.port)
        self.tier.settings = Settings(name, rack.manager_address, SECRET, rack.port, path, 1 << 20)

    def start(self) -> Blade:
        self.server.start()
        self.tier.start()
        if self.manager is not None:
            assert self.directory is not None
            self.manager.start()
            self.directory.start()
        self.membership.start()
        assert self.membership.joined.wait(10)
        return self

    def kill(self, *, noticed: bool = True) -> None:
        """The blade loses its power: it answers nobody, and its memory cannot be reached. `noticed`: the manager
        declares it dead, after a while that is shorter than its silence would have to be."""
        if noticed and self.manager is None:
            threading.Timer(_NOTICED_SECONDS, self.declare_dead).start()
        self.core.gone = True
        self.membership._left = True
        if self.manager is not None:
            self.manager.timing = Timing(1.0, 1e9)  # so that it says nothing when nobody beats any more
        self.server.kill()
        for node in range(1, len(self.rack.expected) + 1):  # its threads, which cannot be killed, can talk to nobody
            self.tier.links.end(node, 1 << 40)
        self.tier.clients.close()

    def declare_dead(self) -> None:
        """What the manager does when it has heard nothing from it for too long."""
        manager, life = self.rack["gm0"].manager, self.membership
        assert manager is not None
        assert life.incarnation is not None
        with manager._change:
            manager._end(life.node_id, life.incarnation, "it is silent")

    def client(self) -> Program:
        return Program(self)

    @property
    def free(self) -> int:
        return self.budget.room


class Program:
    """A program on a blade, speaking the control socket's language."""

    def __init__(self, blade: Blade, token: str | None = None) -> None:
        self.blade = blade
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.connect(str(blade.tier.settings.socket))
        hello, descriptors = self._exchange({"op": "hello", **({"token": token} if token else {})})
        for descriptor in descriptors:
            os.close(descriptor)
        self.number: int = hello["client"]
        self.token: str = hello["token"]

    def call(self, op: str, **fields: Any) -> dict[str, Any]:
        reply, descriptors = self._exchange({"op": op, **fields})
        for descriptor in descriptors:
            os.close(descriptor)
        return reply

    def read(self, handle: int, offset: int, length: int) -> bytes:
        return self.blade.core.access(self.number, handle, offset, length)

    def write(self, handle: int, offset: int, data: bytes) -> None:
        self.blade.core.access(self.number, handle, offset, data)

    def kill(self) -> None:
        self.socket.close()

    def _exchange(self, request: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
        self.socket.send(json.dumps(request).encode())
        packet, descriptors, _flags, _from = socket.recv_fds(self.socket, 1 << 20, 4)
        reply = json.loads(packet)
        if not reply.pop("ok"):
            raise error_for(reply["code"], reply["error"])
        return reply, descriptors


class Rack:
    """Blades by name; gm0 is the manager."""

    def __init__(self, folder: Path, names: list[str], memory: int = 16 << 20, timing: Timing = PATIENT) -> None:
        self.folder, self.memory, self.timing = folder, memory, timing
        self.fabric = Fabric()
        # Of its own: while a manager is away, its port could become that of another test's.
        self.network = f"127.{1 + secrets.randbelow(254)}.{secrets.randbelow(256)}"
        self.manager_address = f"{self.network}.1"
        self.port = 0
        self.expected: list[str] = names
        self.blades: dict[str, Blade] = {}
        for index, name in enumerate(names):
            self.blades[name] = Blade(self, name, index).start()

    def __getitem__(self, name: str) -> Blade:
        return self.blades[name]

    def restart(self, name: str, index: int) -> Blade:
        """A new agent on a blade."""
        self.blades[name].kill()
        self.blades[name] = Blade(self, name, index)
        return self.blades[name].start()

    def close(self) -> None:
        for blade in self.blades.values():
            blade.kill(noticed=False)


def eventually(condition: Callable[[], object], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with suppress(LiteError):
            if condition():
                return
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)
