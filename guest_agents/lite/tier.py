"""LITE's tier in the agent of a blade: puts core, peers, LMRs, locks and programs together.

Below is the native core, which has the queue pairs; above are programs, which reach the tier by its control socket
(clients.py, requests.py) and the core by data channels; beside it are the tiers of other blades and, on the manager,
the directory.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guest_agents.budget import Budget
from guest_agents.control import Handler, Message
from guest_agents.lite.blocks import Blocks
from guest_agents.lite.clients import VOID, Client, Clients, Handle
from guest_agents.lite.copies import Copies
from guest_agents.lite.core import Ring
from guest_agents.lite.directory import directory_of
from guest_agents.lite.errors import (
    BadArgument,
    Freed,
    LiteError,
    ManagerLost,
    NodeDead,
    NodeUnreachable,
    NoSuchNode,
    NotJoined,
)
from guest_agents.lite.links import Links, guarded
from guest_agents.lite.lmrs import Lmrs
from guest_agents.lite.locks import LOCKS, Locks
from guest_agents.lite.peers import Peers
from guest_agents.lite.records import BLOCK, Record
from guest_agents.lite.requests import Requests
from guest_agents.lite.tickets import Tickets
from guest_agents.lite.waits import Waits
from guest_agents.membership import Follower, Life, Manager, Membership

if TYPE_CHECKING:
    from guest_agents.lite.core import Core

SOCKET = Path("/run/rackless/lite.sock")
_EVENT_SECONDS = 10.0
_READY_SECONDS = 20.0
_POLL_SECONDS = 0.05

log = logging.getLogger("rackless.lite")


@dataclass(frozen=True)
class Settings:
    """What a tier needs to know. Sizes in bytes."""

    name: str
    manager: str
    """Address of the manager on the fabric, as members know it."""
    secret: bytes
    port: int
    """Where agents listen for control connections."""
    socket: Path
    slab: int = 16 << 20
    """Memory that is registered at once for blocks, if there is room."""


class Tier(Follower):
    """The tier of one blade, over the blade's lives."""

    def __init__(
        self, core: Core, membership: Membership, settings: Settings, budget: Budget, manager: Manager | None = None
    ) -> None:
        self.core = core
        self.membership = membership
        self.settings = settings
        self._manager = manager
        self._life: Life | None = None
        self._buried: dict[int, int] = {}
        self._mourned: dict[int, int] = {}
        self._burying = threading.RLock()
        self._news: queue.Queue[dict[int, int]] = queue.Queue()
        self._owed: list[tuple[str, dict[str, Any]]] = []
        self._owing = threading.Lock()
        self._kept: dict[int, Record] = {}
        self._early: dict[tuple[int, int], int] = {}
        self._mapping = 0
        self._openings = itertools.count(1)
        self._meeting = False
        self._maps = threading.Lock()
        self.waits = Waits()
        self.links = Links(settings.secret, lambda: self._life, self._address_of)
        self.blocks = Blocks(core, budget, settings.slab)
        self.peers = Peers(core, self.links, self.life, self._bury_before)
        self.lmrs = Lmrs(core, self._is_over, self.peers.reach)
        self.copies = Copies(core, self.blocks, self.links, self.life, self.peers.connect)
        self.locks = Locks(core, self.blocks, self.links, self.life, self._living, lambda: list(self._buried.items()))
        self.tickets = Tickets(core, self.links, self.waits, self.life, self.peers.reach)
        self.requests = Requests(self)
        self.clients = Clients(core, settings.socket, self.requests.actions(), self.requests.greeting, self._gone)

    def handlers(self, directory: dict[str, Handler] | None = None) -> dict[str, Handler]:
        """For the agent's control server; `directory` are those of the manager."""
        asked = {
            **self.peers.handlers(), **self.lmrs.handlers(), **self.copies.handlers(), **self.locks.handlers(),
            **self.tickets.handlers(), **(directory or {}),
            "lite.block.allocate": self._allocate, "lite.block.free": self._free, "lite.record.keep": self._keep,
            "lite.lock.drop": self._drop_lock, "lite.lock.state": self._lock_state,
            "lite.handles.set": self._set_handles,
            "lite.rpc.bind": self._offer_ring, "lite.wake": self._wake,
        }  # fmt: skip
        self.links.handlers = guarded(lambda: self._life, asked)
        return {**self.links.handlers, "lite.stat": lambda _request: self.stat(), "lite.qos": self._qos}

    def start(self) -> None:
        """Serve programs; membership must not have started yet."""
        self.membership.follower = self
        threading.Thread(target=self._events, name="lite events", daemon=True).start()
        threading.Thread(target=self._hear, name="lite news", daemon=True).start()
        self.clients.start()

    def life(self) -> Life:
        """This blade's present life. NOT_JOINED before its first."""
        if self._life is None:
            raise NotJoined("this blade has not joined the rack yet")
        return self._life

    # Membership

    def report(self) -> Message:
        """What a restarted manager is told."""
        records = {record.lmr: record for record in (*self._kept.values(), *self.lmrs.records())}
        clients = self.clients.all()
        handles = [(handle.lmr, handle.ticket, client.number, handle.permissions)
                   for client in clients for handle in list(client.handles.values())
                   if handle.ticket != VOID]  # fmt: skip
        used = {lmr for lmr, *_rest in handles}
        return {
            "records": [record.to_json() for record in records.values()],
            "handles": handles,
            "blocks": [(held.owner, held.address) for held in self.blocks.held() if held.owner != LOCKS],
            "frozen": self.lmrs.frozen(),
            "idle": [record.lmr for record in self.lmrs.records() if record.lmr not in used],
            "locks": self.locks.report(),
            "lock_users": [(name, client.number) for client in clients for name in sorted(client.locks)],
        }

    def reborn(self, life: Life) -> None:
        """Begin a life with clean books: what programs have open answers NODE_DEAD, locks are lost."""
        with self._burying:
            self._life = None  # until the books are clean, nobody gets anything of the new life
            # Others may still have LMRs with blocks in our earlier lives: that is not our memory any more.
            self._buried[life.node] = life.incarnation - 1
            self.links.end(life.node, life.incarnation - 1)
            self.core.join(life.node, life.incarnation)
        # Not while burying: a lock that is being settled asks this very tier to bury the dead.
        self.peers.forget_all()
        self.lmrs.kill_all(NodeDead.code)
        self.locks.forget_all()
        self.tickets.forget_all()
        self.waits.wake_all(NodeDead.code)
        self.blocks.free_all()
        self._kept.clear()
        for client in self.clients.all():
            client.locks.clear()
            client.barriers = False
            for handle in client.handles.values():
                handle.ticket = VOID
        with self._owing:
            self._owed.clear()
        self._life = life

    def news(self, members: list[Message], dead: dict[int, int]) -> None:
        """Members came or went."""
        del members
        for node, incarnation in dead.items():
            if node != self.membership.node_id:
                self.links.end(node, incarnation)
        self._news.put(dead)

    def bury(self, dead: dict[int, int]) -> None:
        """Returns when nothing of these lives (node -> highest incarnation that is over) can arrive here any more."""
        with self._burying:
            fresh = {node: incarnation for node, incarnation in dead.items()
                     if node != self.membership.node_id and incarnation > self._buried.get(node, 0)}  # fmt: skip
            for node, incarnation in fresh.items():
                self.links.end(node, incarnation)
                self.core.peer_dead(node, incarnation)
                self._buried[node] = incarnation
            if fresh:
                self.lmrs.drop_lost()

    def member(self, node: int) -> Message:
        """A living member by its id. NO_SUCH_NODE, NODE_DEAD."""
        for member in self.membership.living:
            if member["node_id"] == node:
                return member
        for member in self.membership.members:
            if member["node_id"] == node:
                raise NodeDead(f"{member['name']} is {member['state']}")
        raise NoSuchNode(f"no node has the id {node}")

    def meet(self) -> None:
        """Programs of this blade are about to use LITE: connect to everybody, and to everybody who comes."""
        if not self._meeting:
            self._meeting = True
            self.peers.reach_all(self._living())

    def directory(self, op: str, timeout: float = 60.0, /, **fields: Any) -> Message:
        """A request to the directory. MANAGER_LOST, and what the directory answers."""
        own = self.life()
        manager = self.find_manager()
        try:
            return self.links.call(manager, f"lite.directory.{op}", timeout, life=[own.node, own.incarnation], **fields)
        except NodeUnreachable:
            raise ManagerLost from None
        except NodeDead:
            # Its own answer (some other node is dead) is passed on; that it has ended itself, is not.
            if self.links.is_over(manager) or not self.membership.joined.is_set():
                raise ManagerLost from None
            raise

    def owe(self, op: str, **fields: Any) -> None:
        """Tell the directory something, later if it cannot be told now."""
        with self._owing:
            self._owed.append((op, fields))
        self._pay()

    # Handles

    def open_handle(self, client: Client, op: str, **fields: Any) -> tuple[int, Message]:
        """A handle for what the directory allocates or maps: its number, and the directory's reply."""
        own = self.life()
        with self._maps:
            self._mapping += 1
            opening = next(self._openings)
        try:
            try:
                reply = self.directory(op, client=client.number, opening=opening, **fields)
            except ManagerLost:
                self.owe("undo", opening=opening)  # it may have been done, and then nobody would ever close it
                raise
            lmr, ticket, alone = reply["lmr"], reply["ticket"], "record" in reply
            handle = Handle(lmr, ticket, reply["permissions"], reply["size"], alone)
            try:
                if alone:
                    self._put_alone(own, reply)
                with self._maps:  # a revoke may have come before we knew this ticket
                    handle.permissions = self._early.pop((lmr, ticket), handle.permissions)
                    number = self.core.handle_add(client.number, self.lmrs.number(lmr), handle.permissions)
                    client.handles[number] = handle
            except LiteError:
                self.give_up([handle])
                raise
            return number, reply
        finally:
            with self._maps:
                self._mapping -= 1
                if not self._mapping:
                    self._early.clear()

    def _put_alone(self, own: Life, reply: Message) -> None:
        """Learn of an LMR that only this node can have, in the life that asked for it."""
        self.lmrs.put(reply)
        if self._life != own:  # what that life had was put an end to, perhaps a moment before
            self.lmrs.kill({"lmr": reply["lmr"], "code": NodeDead.code})
            raise NodeDead(f"this blade's life {own.incarnation} is over")

    def give_up(self, handles: list[Handle]) -> None:
        """Tell the directory that handles were closed."""
        for handle in handles:
            if handle.alone:  # the directory need not say so
                self.lmrs.kill({"lmr": handle.lmr, "code": Freed.code})
        closed = [[handle.lmr, handle.ticket] for handle in handles if handle.ticket != VOID]
        if closed:
            self.owe("unmap", handles=closed)

    def _set_handles(self, request: Message) -> Message:
        """lite.handles.set: rights were taken back; answers when no operation with them is in flight."""
        lmr, wanted = request["lmr"], dict(request["handles"])
        with self._maps:
            for client in self.clients.all():
                for number, handle in list(client.handles.items()):
                    if handle.lmr == lmr and handle.ticket in wanted:
                        handle.permissions = wanted.pop(handle.ticket)
                        self.core.handle_set(client.number, number, handle.permissions)
            self._early |= {(lmr, ticket): rights for ticket, rights in wanted.items() if self._mapping}
        self.lmrs.freeze({"lmr": lmr})
        self.lmrs.thaw({"lmr": lmr})
        return {}

    def _gone(self, client: Client) -> None:
        """A program has ended, and the core has forgotten it."""
        self.tickets.client_gone(client.number)
        self.give_up(list(client.handles.values()))
        if client.locks:
            self.owe("lock_close", client=client.number)
        if client.barriers:
            self.owe("barrier_gone", client=client.number)

    # Requests of the directory and of other tiers

    def _allocate(self, request: Message) -> Message:
        lengths = [int(length) for length in request["lengths"]]
        if not all(0 < length <= BLOCK for length in lengths):
            raise BadArgument("a block has 1 byte to 4 MiB")
        held = self.blocks.allocate(int(request["lmr"]), lengths)
        return {"blocks": [(block.address, block.rkey) for block in held]}

    def _free(self, request: Message) -> Message:
        # Who is dead may have been writing here when it was last heard of.
        self.bury({int(node): int(incarnation) for node, incarnation in request["dead"]})
        for lmr, addresses in request["blocks"]:
            self.blocks.free(lmr, addresses)
            if lmr in self._kept and not self.blocks.has(lmr):
                self._kept.pop(lmr, None)
        return {}

    def _drop_lock(self, request: Message) -> Message:
        self.bury({int(node): int(incarnation) for node, incarnation in request["dead"]})
        return self.locks.drop(request)

    def _lock_state(self, request: Message) -> Message:
        self.bury({int(node): int(incarnation) for node, incarnation in request["dead"]})
        return self.tickets.state(request)

    def _keep(self, request: Message) -> Message:
        record = Record.from_json(request["record"])
        self._kept[record.lmr] = record
        return {}

    def _offer_ring(self, request: Message) -> Message:
        life = Life(*request["life"])
        return {"ring": self.core.ring_offer(life.node, life.incarnation, int(request["port"]))}

    def _wake(self, request: Message) -> Message:
        for waiter in request["waiters"]:
            self.waits.wake(waiter, request["code"])
        return {}

    def _qos(self, request: Message) -> Message:
        self.core.qos_set(request["mode"])
        return {}

    def stat(self) -> Message:
        """What `rackless lite stat` shows of this blade: books now, and the core's counters since the agent started."""
        clients = self.clients.all()
        return {
            "name": self.settings.name,
            "node_id": self.membership.node_id,
            "incarnation": self.membership.incarnation,
            "joined": self.membership.joined.is_set(),
            "lmrs": len(self.lmrs.records()),
            "handles": sum(len(client.handles) for client in clients),
            "clients": [{"client": client.number, "pid": client.pid, "handles": len(client.handles)}
                        for client in clients],
            "memory": self.blocks.stat(),
            "locks": len(self.locks.report()),
            "locks_held": self.tickets.held(),
            "core": self.core.stats(),
            "monotonic": time.monotonic(),
        }  # fmt: skip

    # Inside

    def _is_over(self, life: Life) -> bool:
        return life.incarnation <= self._buried.get(life.node, 0)

    def _bury_before(self, life: Life) -> None:
        if self._is_over(life):
            raise NodeDead(f"node {life.node} (incarnation {life.incarnation}) is dead")
        self.bury({life.node: life.incarnation - 1})

    def find_manager(self) -> Life:
        """Its present life; one that was restarted has a moment to join its own list."""
        deadline = time.monotonic() + _READY_SECONDS
        while self.membership.joined.wait(max(0.0, deadline - time.monotonic())):
            for member in self.membership.living:
                if member["address"] == self.settings.manager:
                    return Life(member["node_id"], member["incarnation"])
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL_SECONDS)
        raise ManagerLost

    def _living(self) -> list[Life]:
        return [Life(m["node_id"], m["incarnation"]) for m in self.membership.living]

    def _address_of(self, life: Life) -> tuple[str, int] | None:
        if self._manager is not None:  # it knows first
            found = self._manager.alive().get(life.node)
            return (found.management, self.settings.port) if found is not None and found.life == life else None
        for member in self.membership.living:
            if Life(member["node_id"], member["incarnation"]) == life:
                return member["management"], self.settings.port
        return None

    def _events(self) -> None:
        while True:
            event = self.core.next_event(_EVENT_SECONDS)
            if event is None:
                continue
            if event.kind == "peer_broken":
                life = Life(event.node, event.incarnation)
                peer = self.core.stats()["peers"].get(event.node)
                if peer is not None and peer["state"] == "broken" and peer["incarnation"] == life.incarnation:
                    self.peers.broken(life)
            elif event.kind == "bind":
                threading.Thread(target=self._bind, args=(event.node, event.incarnation, event.port),
                                 name=f"bind {event.node}", daemon=True).start()  # fmt: skip

    def _bind(self, node: int, incarnation: int, port: int) -> None:
        """Get the ring of a port for messages from here, and whatever waits for it goes on."""
        try:
            member = self.member(node)
            life, own = Life(node, member["incarnation"]), self.life()
            self.peers.connect(life)
            ring = self.links.call(life, "lite.rpc.bind", life=[own.node, own.incarnation], port=port)["ring"]
            self.core.ring_attach(life.node, life.incarnation, port, Ring(*ring))
        except LiteError as failure:
            try:
                self.core.ring_refuse(node, incarnation, port, failure.code)
            except LiteError:
                log.info("nobody waits for port %d of node %d any more", port, node)

    def _hear(self) -> None:
        while True:
            dead = self._news.get()
            try:
                self.bury(dead)
                if dead != self._mourned:  # locks go on without those who are dead
                    self.tickets.homes_died(self._is_over)
                    self.locks.died(self._is_over)
                    self._mourned = dead
                self._pay()
                if self._meeting:
                    self.peers.reach_all(self._living())
            except Exception:
                log.exception("news of %s", dead)

    def _pay(self) -> None:
        while True:
            with self._owing:
                if not self._owed or not self.membership.joined.is_set():
                    return
                op, fields = self._owed.pop(0)
            try:
                self.directory(op, **fields)
            except ManagerLost:
                with self._owing:
                    self._owed.insert(0, (op, fields))
                return
            except LiteError as failure:
                log.warning("%s: %s", op, failure)


def manager_directory(manager: Manager, tier: Tier) -> dict[str, Handler]:
    """Start the directory, on the manager; its handlers."""
    directory = directory_of(manager, tier.links)
    directory.start()
    return directory.handlers()
