"""One agent per blade: puts identity, fabric, membership and the monitors of its kind together."""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from ipaddress import IPv4Interface
from typing import Any

from guest_agents import balloon, clock, control, disk, fabric, identity, load, mapper, nvdimm, pressure, version
from guest_agents.budget import Budget, budget_of
from guest_agents.config import AgentConfig
from guest_agents.hotpot import gate, media
from guest_agents.hotpot.gate import Gate
from guest_agents.identity import Identity
from guest_agents.lite import tier as tiers
from guest_agents.lite.core import Core
from guest_agents.membership import Follower, Manager, Membership, SeveralBooks, SeveralFollowers, Timing
from guest_agents.splitkernel.managers.homes import Homes
from guest_agents.splitkernel.managers.line import Line
from guest_agents.verbs.node import Node, open_node, ping_handler

log = logging.getLogger("rackless.agent")

# The monitors of each kind; a new kind of blade is a line here and a module with `handlers(config)`.
MONITORS: dict[str, tuple[str, ...]] = {
    "manager": (),
    "processor": ("guest_agents.splitkernel.process.monitor",),
    "memory": ("guest_agents.splitkernel.memory.monitor",),
    "storage": ("guest_agents.splitkernel.storage.monitor",),
}
DEFAULT_EXCACHE = 64 << 20
_running: list[Agent] = []
_READY_SECONDS = 120.0


def preload() -> None:
    """Import all monitors now, in the template, and not after a restore: it costs seconds without KVM."""
    for modules in MONITORS.values():
        for module in modules:
            importlib.import_module(module)
    mapper.load_module()
    # One request to ourselves loads what a first handshake needs: OpenSSL alone takes a second.
    with control.Server(("127.0.0.1", 0), b"warm", {"hello": lambda _request: {}}).start() as server:
        control.call(server.address, b"warm", "hello")


def take_identity(request: dict[str, Any]) -> dict[str, Any]:
    """Become the blade the host says, and come up. Returns when the agent has joined and RDMA is active."""
    identity.reseed(bytes.fromhex(request["entropy"]))
    identity.set_clock(request["epoch_ns"])
    mine = Identity.of(request)
    identity.write_files(mine)
    agent = Agent(mine)
    agent.start()
    identity.save(mine)
    if not agent.membership.joined.wait(_READY_SECONDS):
        raise control.ControlError(f"{mine.name} did not join the manager at {mine.manager}", "is the manager up?")
    return agent.status({})


def leave() -> None:
    """Tell the rack that the agent of this blade ends, if it has one."""
    for agent in _running:
        agent.membership.leave()


class Agent:
    """The running agent of an identified blade."""

    def __init__(self, mine: Identity) -> None:
        self.identity = mine
        self.secret = bytes.fromhex(mine.secret)
        self.started = time.monotonic()
        self.about = {"name": mine.name, "kind": mine.kind, "address": mine.fabric["address"],
                      "management": mine.management["address"], "node_id": mine.index + 1}  # fmt: skip
        timing = Timing(mine.heartbeat, mine.dead_after)
        self.membership = Membership((mine.manager, control.PORT), self.secret, self.about, timing)
        self.manager: Manager | None = None
        if mine.fabric["address"] == mine.manager:  # of several managers one keeps the books
            self.manager = Manager(mine.name, timing, lambda: self.identity.hosts)

    def start(self) -> None:
        """Bring the networks up, serve, join. Raises TimeoutError when a network card is missing."""
        mine = self.identity
        _running.append(self)
        fabric.configure(mine.management, mine.fabric, time.monotonic() + _READY_SECONDS)
        log.info("networks are up after %.1f s", time.monotonic() - self.started)
        fabric.shape(mine.link)
        with suppress(control.ControlError):  # an agent that is started anew goes without, rather than not at all
            pressure.take(mine.pressure)
        if mine.disk:
            disk.mount()
            disk.fill(disk.ROOT, bool(mine.disk_faults.get("full")))
        if mine.pmem:
            nvdimm.setup(mine.pmem)
            media.use_pmem(gate.FOLDER)
        handlers: dict[str, control.Handler] = {
            "agent.status": self.status,
            "agent.update": self._update,
            "agent.hosts": self._hosts,
            "agent.resize": self._resize,
            "agent.wake": self._wake,
            **load.handlers(),
            **nvdimm.handlers(mine.pmem, lambda: media.backing(gate.FOLDER)),
        }
        node = open_node(fabric.RXE)
        handlers |= {**node.handlers(), "verbs.ping": ping_handler(node, self.secret)}
        self.budget = budget = budget_of(mine.kind)
        tier, lite = self._lite(budget)
        hotpot = Gate(tier)
        line = self._managers(node)
        handlers |= {**lite, **hotpot.handlers(), **line.handlers()}
        config = AgentConfig(
            name=mine.name,
            node=node,
            secret=self.secret,
            budget=budget,
            holder=line.holder,
            peers=lambda kind: {m["name"]: m["management"] for m in self.membership.of_kind(kind)},
            watch=self._watch,
            excache=lambda: self.identity.excache or DEFAULT_EXCACHE,
        )
        for module in MONITORS[mine.kind]:
            handlers |= importlib.import_module(module).handlers(config)
        control.Server(("0.0.0.0", control.PORT), self.secret, handlers).start()
        if self.manager is not None:
            self.manager.start()
        tier.start()
        hotpot.start()
        line.start()
        followers: dict[str, Follower] = {"lite": tier, "splitkernel": line.holder}
        if mine.kind == "processor":
            own = mine.management
            homes = Homes(mine.name, line.holder, partial(fabric.hold, own["address"], own["prefix"]))
            homes.start()
            followers["homes"] = homes
        self.membership.follower = SeveralFollowers(followers)
        self.membership.start()
        log.info("%s of kind %s serves rack %s", mine.name, mine.kind, mine.rack)

    def _watch(self, kind: str, changed: Callable[[dict[str, int]], None]) -> None:
        self.membership.watch(lambda: changed({m["name"]: m["incarnation"] for m in self.membership.of_kind(kind)}))

    def _lite(self, budget: Budget) -> tuple[tiers.Tier, dict[str, control.Handler]]:
        """The tier of LITE and, on the manager, the books of members and LMRs; what serves others."""
        mine = self.identity
        settings = tiers.Settings(mine.name, mine.manager, self.secret, control.PORT, tiers.SOCKET)
        made = tiers.Tier(Core(), self.membership, settings, budget, self.manager)
        if self.manager is None:
            return made, made.handlers()
        directory = tiers.manager_directory(self.manager, made)
        return made, {**self.manager.handlers(), **made.handlers(directory)}

    def _managers(self, node: Node) -> Line:
        """The line to the splitkernel's global managers; on the manager they are at this end of it."""
        mine, books = self.identity, self.manager
        node.life = lambda: line.life()
        line = Line(self.membership, self.secret, mine.manager, control.PORT, node.bury,
                    identity.FILE.with_name("vnodes.json"), books, self.vnode_addresses)  # fmt: skip
        if books is not None and line.books is not None:
            books.books = SeveralBooks({"lite": books.books, "splitkernel": line.books})
        return line

    def vnode_addresses(self) -> Iterator[str]:
        """What vNodes may have: the end of the management network. The last address is the host's."""
        network = IPv4Interface(f"{self.identity.management['address']}/{self.identity.management['prefix']}").network
        for place in range(3, network.num_addresses // 2):
            address = str(network[-place])
            if address not in self.identity.hosts.values():
                yield address

    def status(self, _request: control.Message) -> control.Message:
        """Health of this blade as `rackless status` shows it."""
        return {
            "name": self.identity.name,
            "kind": self.identity.kind,
            "version": version.VERSION,
            "joined": self.membership.joined.is_set(),
            "node_id": self.membership.node_id,
            "rdma": fabric.rdma_state(),
            "uptime_seconds": round(time.monotonic() - self.started, 1),
            "monitors": [module.split(".")[-2] for module in MONITORS[self.identity.kind]],
        }

    def _hosts(self, request: control.Message) -> control.Message:
        """Blades came or went: their names mean something here too."""
        self.identity = replace(self.identity, hosts=request["hosts"])
        identity.write_hosts(self.identity.hosts)
        identity.save(self.identity)
        return {}

    def _resize(self, request: control.Message) -> control.Message:
        """The host is about to take memory, or has given some."""
        budget = self.budget if self.identity.kind == "memory" else None
        balloon.resize(request["before"], request["after"], budget, bool(request.get("dry")))
        return {}

    def _wake(self, request: control.Message) -> control.Message:
        """The blade stood still, or is another one restored: its wall clock is late, its random numbers are known."""
        identity.reseed(bytes.fromhex(request["entropy"]))
        identity.set_clock(request["epoch_ns"] + round(self.identity.clock * 1e9))
        return {}

    def _update(self, request: control.Message) -> control.Message:
        """The host changed what can change while the blade runs."""
        fabric.shape(request["link"])
        if request.get("pressure", 0) != self.identity.pressure:
            pressure.take(int(request.get("pressure", 0)))
        disk_faults, off = request.get("disk_faults", {}), request.get("clock", 0.0)
        if disk_faults != self.identity.disk_faults:
            disk.break_as(disk_faults)
        if off != self.identity.clock:
            clock.jump(off - self.identity.clock)
        changes = {name: request[name] for name in ("link", "excache", "heartbeat", "dead_after")}
        changes |= {"pressure": request.get("pressure", 0), "disk_faults": disk_faults, "clock": off}
        self.identity = replace(self.identity, **changes)
        self.membership.timing = Timing(request["heartbeat"], request["dead_after"])
        if self.manager is not None:
            self.manager.timing = self.membership.timing
        identity.save(self.identity)
        return {}
