"""A rack of splitkernel agents in one process: real control servers, membership, managers, memory monitors and desks.

Only RDMA (stand_in_pyverbs) and /vnode (plain folders) are stood in for. The manager is gm0; pb*, mb* and sb* are
processor, memory and storage blades.
"""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from guest_agents import control, load
from guest_agents.budget import Budget
from guest_agents.control import Handler, Message
from guest_agents.membership import Manager, Membership, SeveralBooks, SeveralFollowers, Timing
from guest_agents.splitkernel.managers.homes import Homes
from guest_agents.splitkernel.managers.line import Line
from guest_agents.splitkernel.managers.vnode import VNode
from tests.unit import stand_in_pyverbs
from tests.unit.lite_blades import MortalServer

stand_in_pyverbs.install()

from guest_agents.splitkernel.memory.monitor import MemoryMonitor, report_load  # noqa: E402
from guest_agents.splitkernel.process import figures  # noqa: E402
from guest_agents.splitkernel.process.belonging import Belonging  # noqa: E402
from guest_agents.splitkernel.process.desk import Desk, Stock  # noqa: E402
from guest_agents.splitkernel.process.memory import Lender  # noqa: E402
from guest_agents.splitkernel.storage import monitor as storage  # noqa: E402
from guest_agents.splitkernel.storage.files import Files  # noqa: E402
from guest_agents.splitkernel.storage.hold import Hold  # noqa: E402
from guest_agents.splitkernel.storage.moving import Moving  # noqa: E402
from guest_agents.verbs.node import Node  # noqa: E402

SECRET = b"s" * 32
FAST = Timing(0.1, 2.0)
MEMORY = 256 << 20
KINDS = {"gm": "manager", "pb": "processor", "mb": "memory", "sb": "storage"}


class Blade:
    """The splitkernel's part of one blade's agent."""

    def __init__(self, rack: Rack, name: str, index: int) -> None:
        self.rack, self.name, self.index = rack, name, index
        self.kind = KINDS[name[:2]]
        self.addresses: set[str] = set()
        self.address = f"{rack.network}.{index + 1}"
        about = {"name": name, "kind": self.kind, "address": self.address, "management": self.address,
                 "node_id": index + 1}  # fmt: skip
        self.manager = Manager(name, FAST, lambda: rack.names) if index == 0 else None
        self.membership = Membership((rack.manager_address, rack.port), SECRET, about, FAST)
        self.node = Node(stand_in_pyverbs.device(self.address))
        self.budget = Budget(rack.memory.get(name, MEMORY))
        self.file = rack.folder / f"{name}.vnodes.json"
        self.line = Line(self.membership, SECRET, rack.manager_address, rack.port, self.node.bury, self.file,
                         self.manager, lambda: [f"10.0.0.{number}" for number in range(1, 5)])  # fmt: skip
        self.node.life = self.line.life
        if self.manager is not None:
            assert self.line.books is not None
            self.manager.books = SeveralBooks({"splitkernel": self.line.books})
        handlers: dict[str, Handler] = {**self.node.handlers(), **self.line.handlers(),
                                        **(self.manager.handlers() if self.manager else {})}  # fmt: skip
        own = {"memory": self._memory, "processor": self._processor, "storage": self._storage}
        handlers |= own.get(self.kind, dict)() | load.handlers()
        self.server = MortalServer((self.address, rack.port), SECRET, handlers)
        rack.port = self.server.address[1]
        self.membership._manager = (rack.manager_address, rack.port)
        self.line._port = rack.port

    def start(self) -> Blade:
        self.server.start()
        if self.manager is not None:
            self.manager.start()
        self.line.start()
        homes = Homes(self.name, self.line.holder, self._hold)
        homes.start()
        self.membership.follower = SeveralFollowers({"splitkernel": self.line.holder, "homes": homes})
        self.membership.start()
        return self

    def kill(self) -> None:
        """The blade loses its power: it answers nobody. Connections it made look alive from elsewhere."""
        self.membership._left = True
        self.line._manager_address = "gone"
        if self.manager is not None:
            self.manager.timing = Timing(1.0, 1e9)  # so that it says nothing when nobody beats any more
        self.server.kill()

    def call(self, op: str, **fields: Any) -> Message:
        """As the host asks its agent."""
        return control.call((self.address, self.rack.port), SECRET, op, 30.0, **fields)

    def ask(self, text: str) -> Visitor:
        """A new conversation with its desk, that has begun with a request."""
        visitor = Visitor(self.desk_path)
        visitor.ask(text)
        return visitor

    def _hold(self, addresses: Collection[str]) -> None:
        self.addresses = set(addresses)

    def _memory(self) -> dict[str, Handler]:
        self.monitor = MemoryMonitor(self.node, self.budget)
        threading.Thread(target=report_load, args=(self.line.holder, self.monitor), daemon=True).start()
        return self.monitor.handlers()

    def _processor(self) -> dict[str, Handler]:
        self.desk_path = self.rack.folder / f"{self.name}.sock"
        self.belonging = Belonging(self.name, self.line.holder, self._root, self._call_other)
        # As in an agent; the port is known when the first blade serves.
        self.lender = lender = Lender(self.name, SECRET, lambda: self._peers("memory"), self.rack.port,
                                      self.node.introduction, self.node.device)  # fmt: skip
        self.membership.watch(lambda: lender.members(
            {member["name"]: member["incarnation"] for member in self.membership.of_kind("memory")}))  # fmt: skip
        jobs = self.rack.folder / f"{self.name}.jobs"
        Desk(self.desk_path, Stock(jobs, lambda: 64 << 20, lender, self.belonging, dict)).start()

        def kill(request: Message) -> Message:
            self.belonging.kill(str(request["id"]), str(request["signal"]))
            return {}

        return {"process.kill": kill, "process.stats": lambda _: {"running": figures.running(self.belonging.programs)}}

    def _storage(self) -> dict[str, Handler]:
        root = self.rack.folder / self.name
        root.mkdir(exist_ok=True)
        self.files, self.hold = Files(root), Hold(root)
        moving = Moving(root, self.hold, self.line.holder.ask, lambda blade: Direct(self.rack[blade].files))
        moving.start()
        return {"storage.stats": lambda _: storage.stats(self.files), **moving.handlers()}

    def _root(self, vnode: VNode) -> Path | None:
        root = self.rack.folder / str(vnode.storage) / vnode.name
        root.mkdir(parents=True, exist_ok=True)
        return root if vnode.storage else None

    def _call_other(self, blade: str, op: str, **fields: Any) -> Message:
        return control.call((self._peers("processor")[blade], self.rack.port), SECRET, op, **fields)

    def _peers(self, kind: str) -> dict[str, str]:
        return {member["name"]: member["management"] for member in self.membership.of_kind(kind)}


class Direct:
    """A caller of a file service in this process."""

    def __init__(self, files: Files) -> None:
        self._files = files

    def call(
        self, opcode: int, first: bytes, second: bytes | memoryview = b"", into: Callable[..., Any] | None = None
    ) -> Any:
        out = memoryview(bytearray((1 << 20) + (8 << 10)))
        head, data = self._files.handle(opcode, memoryview(first), memoryview(second), out)
        return into(out[:head], out[head : head + data]) if into else None


class Visitor:
    """Whoever talks to a desk: `split`, or a program's pager."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.connect(str(path))

    def ask(self, text: str) -> str:
        """The reply after "ok "; AssertionError if it is an error."""
        self.socket.send(text.encode())
        reply = self.socket.recv(1 << 16).decode()
        assert reply.startswith("ok"), reply
        return reply[3:]

    def close(self) -> None:
        self.socket.close()


class Rack:
    """Blades by name; all have joined."""

    def __init__(self, folder: Path, names: Sequence[str], memory: dict[str, int] | None = None) -> None:
        self.folder, self.names, self.memory = folder, list(names), memory or {}
        # Of its own: while a manager is away, its port could become that of another test's.
        self.network = f"127.{1 + secrets.randbelow(254)}.{secrets.randbelow(256)}"
        self.manager_address, self.port = f"{self.network}.1", 0
        self.blades: dict[str, Blade] = {}
        for index, name in enumerate(names):
            self.blades[name] = Blade(self, name, index).start()
        self.wait()

    def __getitem__(self, name: str) -> Blade:
        return self.blades[name]

    def host(self, op: str, **fields: Any) -> Message:
        """A request of the host to the managers."""
        return self["gm0"].call(op, **fields)

    def wait(self) -> None:
        """Until everybody has joined and knows everybody."""
        eventually(lambda: all(blade.membership.joined.is_set() for blade in self.blades.values()))
        living = {(blade.name, blade.membership.incarnation) for blade in self.blades.values()}
        eventually(lambda: all(
            {(m["name"], m["incarnation"]) for m in blade.membership.members if m["state"] == "alive"} == living
            for blade in self.blades.values()))  # fmt: skip
        memory = {name: life for name, life in living if KINDS[name[:2]] == "memory"}
        for blade in self.blades.values():
            if blade.kind == "processor":
                eventually(lambda lender=blade.lender: {name: lender.life(name) for name in memory} == memory)  # type: ignore[misc]

    def restart(self, *names: str, forgetting: bool = False) -> None:
        """New agents, all at once; `forgetting`: on blades made anew."""
        for name in names:
            self[name].kill()
        for name in names:
            if forgetting:
                self[name].file.unlink(missing_ok=True)
            self.blades[name] = Blade(self, name, self[name].index)
        for name in names:
            self[name].start()
        self.wait()

    def programs(self) -> dict[str, str]:
        """States by id."""
        return {program["id"]: program["state"] for program in self.host("program.list")["programs"]}

    def close(self) -> None:
        for blade in self.blades.values():
            blade.kill()


def eventually(condition: Callable[[], object], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with suppress(control.ControlError):
            if condition():
                return
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)
