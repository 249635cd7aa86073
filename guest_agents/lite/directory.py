"""LITE's directory, on the manager: which LMRs there are, where their blocks lie, who maps them, who may.

It is off the data path: reads, writes and messages never come here, and go on while the manager is away. Changes to
one LMR happen one at a time. What is told to nodes is told before the request that caused it is answered.

A node that does not answer in the middle of a change is waited for until it answers or is declared dead; then it is
passed over, because whoever hosts a block destroys a dead node's queue pairs before the block's memory is used again.

A manager that was restarted rebuilds all this from what members report when they join (`Rebuild`).
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from guest_agents.control import Handler, Message
from guest_agents.lite import drain
from guest_agents.lite.barriers import Barriers
from guest_agents.lite.errors import (
    BadArgument,
    Cancelled,
    Freed,
    LiteError,
    ManagerLost,
    NameTaken,
    NodeDead,
    NodeUnreachable,
    NoMemory,
    NoSuchName,
    NoSuchNode,
    NotJoined,
    PermissionDenied,
)
from guest_agents.lite.links import Links
from guest_agents.lite.lockbook import LockBook
from guest_agents.lite.permissions import Permission
from guest_agents.lite.rebuild import Rebuild
from guest_agents.lite.records import Piece, Record, cut
from guest_agents.membership import Books, Life, Manager, Member

NAME_LONGEST = 128
_READY_POLL = 0.05

log = logging.getLogger("rackless.lite")


@dataclass
class Holder:
    """A handle somewhere in the rack."""

    life: Life
    client: int
    permissions: int
    opening: int = 0
    """The number its tier gave the request."""


@dataclass
class Entry:
    """An LMR with its holders (by ticket)."""

    record: Record
    holders: dict[int, Holder] = field(default_factory=dict)
    freed: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def mappers(self) -> set[Life]:
        """The lives in which somebody has a handle."""
        return {holder.life for holder in self.holders.values()}


class Directory(Books):
    """All LMRs of the rack, and the books of locks and barriers."""

    def __init__(self, manager: Manager, links: Links) -> None:
        self._manager = manager
        self._links = links
        self._entries: dict[int, Entry] = {}
        self._names: dict[str, int] = {}
        self._lock = threading.Lock()
        self._ready = threading.Event()
        # No manager that was here before can have given these: it would have begun in the same second.
        self._ids = itertools.count((int(time.time()) << 24) + 1)
        self._turn = itertools.count()
        self._undone: set[tuple[Life, int]] = set()
        self._rebuild = Rebuild()
        self.leaving: set[Life] = set()  # that are drained: new blocks go elsewhere
        self.locks = LockBook(links, self.life_of, manager.is_alive, self._dead)
        self.barriers = Barriers(self._wake, manager.is_alive)

    def handlers(self) -> dict[str, Handler]:
        """Control operations of tiers to the directory; `guarded` is put around them."""
        return {
            f"lite.directory.{name}": self._when_ready(action)
            for name, action in {
                "malloc": self.malloc, "map": self.map, "undo": self.undo, "unmap": self.unmap, "free": self.free,
                "grant": self.grant, "revoke": self.revoke, "move": self.move, "lock_create": self.locks.create,
                "lock_find": self.locks.find, "lock_close": self.locks.close,
                "barrier": self.barriers.enter, "barrier_leave": self.barriers.leave,
                "barrier_gone": self.barriers.gone, "drain": lambda request: drain.drain(self, request),
            }.items()
        }  # fmt: skip

    def start(self) -> None:
        """Take over what members hold as soon as they all are here."""
        threading.Thread(target=self._settle, name="directory", daemon=True).start()

    # Membership

    def joined(self, member: Member, report: Message) -> None:
        """What a member of an earlier manager holds; nothing if it has just begun to live."""
        if report and not self._ready.is_set():
            self._rebuild.add(member.life, report)

    def died(self, member: Member) -> None:
        """Its handles go, its locks and LMRs nobody has a handle to; what others have there answers NODE_DEAD."""
        life = member.life
        self._links.end(life.node, life.incarnation)
        self._rebuild.drop(life)
        self.locks.died(life)
        self.barriers.died(life)
        self.leaving.discard(life)
        with self._lock:
            self._undone = {undone for undone in self._undone if undone[0] != life}
        for entry in self.entries():
            with entry.lock:
                for ticket in [ticket for ticket, holder in entry.holders.items() if holder.life == life]:
                    del entry.holders[ticket]
                lost = all(not self._manager.is_alive(host) for host in entry.record.hosts())
                if not entry.freed and not entry.holders and (lost or not entry.record.keep):
                    self._release(entry)

    def life_of(self, name: str) -> Life:
        """The present life of the node called `name`. NO_SUCH_NODE, NODE_DEAD."""
        members = self._manager.list({})["members"]
        for member in members:
            if member["name"] == name:
                if member["state"] != "alive":
                    raise NodeDead(f"{name} is {member['state']}")
                return Life(member["node_id"], member["incarnation"])
        known = ", ".join(member["name"] for member in members)
        raise NoSuchNode(f"no node is called {name!r}", hint=f"there are: {known}")

    # Requests of tiers, on behalf of a client

    def malloc(self, request: Message) -> Message:
        """Allocate, publish and map for the caller; see tier.malloc."""
        caller, client = self._caller(request)
        size, spread = int(request["size"]), bool(request.get("spread"))
        if size <= 0:
            raise BadArgument(f"{size} bytes cannot be allocated")
        name = request.get("name")
        if name is not None and not (isinstance(name, str) and 0 < len(name) <= NAME_LONGEST):
            raise BadArgument(f"a name has 1 to {NAME_LONGEST} characters")
        record = Record(next(self._ids), size, [], name, bool(request.get("keep")), int(request["permissions"]))
        entry = Entry(record)
        with self._lock:
            if name is not None:
                if name in self._names:
                    raise NameTaken(f"there is already an LMR called {name!r}")
                self._names[name] = record.lmr
            self._entries[record.lmr] = entry
        with entry.lock:
            try:
                record.blocks = self._place(record, self.candidates(request.get("nodes"), spread, caller), spread)
                if record.keep:
                    self._tell(record.hosts(), "lite.record.keep", record=record.to_json())
                rights = Permission.ALL
                ticket = self._hold(entry, caller, client, rights, request["opening"])
            except BaseException:
                self._release(entry)
                raise
        # What has a name may be changed by others from now on; else the reply is soon enough to tell the caller.
        alone = {"record": record.to_json()} if record.name is None else {}
        return {**alone, "lmr": record.lmr, "ticket": ticket, "permissions": int(rights), "size": size,
                "blocks": [{"node": self._name_of(piece.life), "length": piece.length} for piece in record.blocks],
                }  # fmt: skip

    def map(self, request: Message) -> Message:
        """A handle to the LMR of a name, if its permissions or grants allow it."""
        caller, client = self._caller(request)
        with self._lock:
            entry = self._entries.get(self._names.get(request["name"], 0))
        if entry is None:
            raise NoSuchName(f"no LMR is called {request['name']!r}")
        with entry.lock:
            if entry.freed:
                raise NoSuchName(f"no LMR is called {request['name']!r}")
            allowed = entry.record.allowed(self._name_of(caller), client)
            asked = allowed if request.get("permissions") is None else int(request["permissions"])
            if not allowed & Permission.SHARE or asked & ~allowed or not asked:
                raise PermissionDenied(
                    f"{request['name']!r} may not be mapped for {Permission(asked)!r} from here",
                    hint=f"granted: {Permission(allowed)!r}",
                )
            ticket = self._hold(entry, caller, client, asked, request["opening"])
            return {"lmr": entry.record.lmr, "ticket": ticket, "permissions": asked, "size": entry.record.size}

    def unmap(self, request: Message) -> Message:
        """Handles were closed: `handles` is a list of [lmr, ticket]. Their tier has dropped LMRs without names."""
        freed: list[Record] = []
        for lmr, ticket in request["handles"]:
            entry = self._entries.get(lmr)
            if entry is None:
                continue
            with entry.lock:
                holder = entry.holders.get(ticket)
                if entry.freed or holder is None or holder.life != Life(*request["life"]):
                    continue
                del entry.holders[ticket]
                if holder.life not in entry.mappers() and entry.record.name is not None:
                    self._tell([holder.life], "lite.lmr.kill", lmr=lmr, code=Freed.code)
                if not entry.holders and not entry.record.keep:
                    self._forget(entry)
                    freed.append(entry.record)
        self._give_back([(record.lmr, piece) for record in freed for piece in record.blocks])
        return {}

    def undo(self, request: Message) -> Message:
        """A tier got no answer to its malloc or map number `opening`: it shall not have happened, nor happen yet."""
        life, opening = Life(*request["life"]), int(request["opening"])
        with self._lock:
            self._undone.add((life, opening))
        for entry in self.entries():
            with entry.lock:
                found = [ticket for ticket, holder in entry.holders.items()
                         if (holder.life, holder.opening) == (life, opening)]  # fmt: skip
            if found:
                self._undone.discard((life, opening))
                self.unmap({"life": request["life"], "handles": [[entry.record.lmr, ticket] for ticket in found]})
        return {}

    def free(self, request: Message) -> Message:
        """Free an LMR: its mappers first, then its memory."""
        entry = self._as_master(request)
        with entry.lock:
            self._not_freed(entry)
            self._release(entry)
        return {}

    def grant(self, request: Message) -> Message:
        """Allow more to those who will map it."""
        entry = self._as_master(request)
        with entry.lock:
            self._not_freed(entry)
            record, to = entry.record, self._checked_target(request)
            record.grants[to] = record.grants.get(to, 0) | int(request["permissions"])
            self._publish(entry)
        return {}

    def revoke(self, request: Message) -> Message:
        """Allow less, at once and also with the handles there are; the master's own is spared."""
        entry = self._as_master(request)
        with entry.lock:
            self._not_freed(entry)
            record, to, bits = entry.record, self._checked_target(request), int(request["permissions"])
            if to == "*":
                record.permissions &= ~bits
            for target in list(record.grants):
                if to in ("*", target):
                    record.grants[target] &= ~bits
            changes: dict[Life, list[tuple[int, int]]] = {}
            for ticket, holder in entry.holders.items():
                name = self._name_of(holder.life)
                if ticket != request["ticket"] and to in ("*", name, f"{name}/{holder.client}"):
                    holder.permissions &= ~bits
                    changes.setdefault(holder.life, []).append((ticket, holder.permissions))
            self._publish(entry)
            for life, handles in changes.items():
                self._tell([life], "lite.handles.set", lmr=record.lmr, handles=handles)
        return {}

    def move(self, request: Message) -> Message:
        """Move blocks to other nodes in turn while the LMR is in use."""
        entry = self._as_master(request)
        targets = [self.life_of(name) for name in request["to"]]
        if not targets:
            raise BadArgument("move to which node?")
        with entry.lock:
            self._not_freed(entry)
            count = len(entry.record.blocks)
            chosen = range(count) if request.get("block") is None else [int(request["block"])]
            if not all(0 <= index < count for index in chosen):
                raise BadArgument(f"there is no block {request['block']}: the LMR has {count}")
            for turn, index in enumerate(chosen):
                target = targets[turn % len(targets)]
                if entry.record.blocks[index].life != target:
                    self.move_block(entry, index, target)
            return {"blocks": [{"node": self._name_of(p.life), "length": p.length} for p in entry.record.blocks]}

    def entries(self) -> list[Entry]:
        """All LMRs there are now."""
        with self._lock:
            return list(self._entries.values())

    def move_block(self, entry: Entry, index: int, target: Life) -> None:
        """Freeze at all mappers, copy by RDMA, replace, thaw; then the old block's memory is given back."""
        record, old = entry.record, entry.record.blocks[index]
        new = self._allocate(target, record, [old.length])[0]
        moved = False
        try:
            self._tell(entry.mappers(), "lite.lmr.freeze", lmr=record.lmr)
            self._links.call(target, "lite.block.copy", lmr=record.lmr, source=old, address=new.address)
            record.blocks[index] = new
            moved = True
        finally:
            # Also when it failed: whoever is frozen goes on with the blocks there are now.
            self._publish(entry)
            self._tell(entry.mappers(), "lite.lmr.thaw", lmr=record.lmr)
            self._give_back([(record.lmr, old if moved else new)])

    def _hold(self, entry: Entry, life: Life, client: int, permissions: int, opening: int) -> int:
        if (life, opening) in self._undone:
            raise Cancelled("its tier did not wait for the answer")
        if life not in entry.mappers() and entry.record.name is not None:
            self._links.call(life, "lite.lmr.put", record=entry.record.to_json())
        if not self._manager.is_alive(life):  # its handles have been taken from the books already
            raise NodeDead(f"node {life.node} (incarnation {life.incarnation}) is dead")
        ticket = next(self._turn) + 1
        while ticket in entry.holders:  # one that an earlier manager gave
            ticket = next(self._turn) + 1
        entry.holders[ticket] = Holder(life, client, permissions, opening)
        return ticket

    def _publish(self, entry: Entry) -> None:
        """Everyone who keeps a copy of the record gets the new one."""
        entry.record.version += 1
        record = entry.record.to_json()
        self._tell(entry.mappers(), "lite.lmr.put", record=record)
        if entry.record.keep:
            self._tell(entry.record.hosts(), "lite.record.keep", record=record)

    def _release(self, entry: Entry) -> None:
        """Free an LMR whose lock is held: nobody uses it any more when its memory is given back."""
        record = entry.record
        entry.freed = True
        self._tell(entry.mappers(), "lite.lmr.kill", lmr=record.lmr, code=Freed.code)
        self._give_back([(record.lmr, piece) for piece in record.blocks])
        self._forget(entry)

    def _forget(self, entry: Entry) -> None:
        """An LMR that nobody has a handle to any more leaves the books."""
        record = entry.record
        entry.freed = True
        entry.holders.clear()
        with self._lock:
            self._entries.pop(record.lmr, None)
            if record.name is not None and self._names.get(record.name) == record.lmr:
                del self._names[record.name]

    def _give_back(self, blocks: Iterable[tuple[int, Piece]]) -> None:
        """Blocks (LMR, piece) are free again, at the nodes that have them."""
        by_host: dict[Life, dict[int, list[int]]] = {}
        for lmr, piece in blocks:
            by_host.setdefault(piece.life, {}).setdefault(lmr, []).append(piece.address)
        for host, freed in by_host.items():
            self._tell([host], "lite.block.free", blocks=list(freed.items()), dead=self._dead())

    def _tell(self, lives: Iterable[Life], op: str, **fields: Any) -> None:
        """Tell nodes something they must know before this change goes on; dead ones need not know any more."""
        for life in lives:
            while self._manager.is_alive(life):
                try:
                    self._links.call(life, op, **fields)
                    break
                except NodeDead:
                    break
                except NodeUnreachable:
                    log.warning("%s waits for node %d", op, life.node)
                    time.sleep(self._manager.timing.heartbeat / 2)

    def candidates(self, names: list[str] | None, spread: bool, caller: Life) -> list[Life]:
        """Where an LMR may go. Without names: here; spread: over the memory blades, or all if there are none."""
        if names:
            return [self.life_of(name) for name in names]
        if not spread:
            return [caller]
        staying = (member for member in self._manager.alive().values() if member.life not in self.leaving)
        members = sorted(staying, key=lambda member: member.life.node)
        return [m.life for m in members if m.kind == "memory"] or [m.life for m in members]

    def _place(self, record: Record, nodes: list[Life], spread: bool) -> list[Piece]:
        """Blocks on `nodes` in turn (spread), or all on the first of them that has room."""
        while True:
            used = nodes if spread else nodes[:1]
            lengths = cut(record.size, len(used))
            shares = {life: lengths[turn :: len(used)] for turn, life in enumerate(used)}
            given: dict[Life, list[Piece]] = {}
            try:
                for life, share in shares.items():
                    if share:
                        given[life] = self._allocate(life, record, share)
            except LiteError as failure:
                for pieces in given.values():
                    self._give_back([(record.lmr, piece) for piece in pieces])
                if not isinstance(failure, NoMemory):
                    raise
                nodes = [other for other in nodes if other != life]
                if not nodes:
                    raise NoMemory(f"{self._name_of(life)}: {failure.message}", hint=failure.hint) from None
            else:
                return [given[used[turn % len(used)]][turn // len(used)] for turn in range(len(lengths))]

    def _allocate(self, life: Life, record: Record, lengths: list[int]) -> list[Piece]:
        reply = self._links.call(life, "lite.block.allocate", lmr=record.lmr, lengths=lengths)
        return [Piece(life.node, life.incarnation, address, rkey, length)
                for (address, rkey), length in zip(reply["blocks"], lengths, strict=True)]  # fmt: skip

    def _caller(self, request: Message) -> tuple[Life, int]:
        life = Life(*request["life"])
        if not self._manager.is_alive(life):
            raise NotJoined(f"node {life.node} is not a member (any more)")
        return life, int(request["client"])

    def _as_master(self, request: Message) -> Entry:
        entry = self._entries.get(request["lmr"])
        holder = entry.holders.get(request["ticket"]) if entry else None
        if entry is None or holder is None:
            raise Freed
        if not holder.permissions & Permission.ADMIN:
            raise PermissionDenied("only a master may do this", hint="map it for ADMIN, if that is granted")
        return entry

    @staticmethod
    def _not_freed(entry: Entry) -> None:
        if entry.freed:
            raise Freed

    def _checked_target(self, request: Message) -> str:
        to = str(request.get("to", "*"))
        if to != "*":
            self.life_of(to.partition("/")[0])
        return to

    def _dead(self) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = self._manager.list({})["dead"]
        return found

    def _name_of(self, life: Life) -> str:
        member = self._manager.alive().get(life.node)
        return member.name if member is not None and member.life == life else f"node {life.node}"

    def _wake(self, life: Life, waiters: list[int], code: int) -> None:
        self._links.call(life, "lite.wake", waiters=waiters, code=code)

    def _when_ready(self, action: Handler) -> Handler:
        def handle(request: Message) -> Message:
            if not self._ready.wait(2 * self._manager.timing.dead_after):
                raise ManagerLost("the manager was restarted and still waits for members")
            return action(request)

        return handle

    def _settle(self) -> None:
        while not self._manager.all_here():
            time.sleep(_READY_POLL)
        self._take_over()
        self._ready.set()

    def _take_over(self) -> None:
        """Make the books of what members reported, and put an end to what the last manager left half done."""
        for record, tickets in self._rebuild.records(self._manager.is_alive):
            entry = Entry(record, {ticket: Holder(life, client, rights)
                                   for ticket, (life, client, rights) in tickets.items()})  # fmt: skip
            self._entries[record.lmr] = entry
            if record.name is not None:
                self._names[record.name] = record.lmr
        self.locks.rebuild(self._rebuild.locks, self._rebuild.lock_users)
        for life, lmr, address in self._rebuild.strays():
            self._best_effort(life, "lite.block.free", blocks=[(lmr, [address])], dead=self._dead())
        for lmr, life in self._rebuild.idle:
            self._best_effort(life, "lite.lmr.kill", lmr=lmr, code=Freed.code)
        for lmr, life in self._rebuild.frozen:
            if lmr in self._entries:
                self._best_effort(life, "lite.lmr.put", record=self._entries[lmr].record.to_json())
                self._best_effort(life, "lite.lmr.thaw", lmr=lmr)
        for entry in list(self._entries.values()):
            if not entry.holders and not entry.record.keep:
                self._release(entry)

    def _best_effort(self, life: Life, op: str, **fields: Any) -> None:
        try:
            self._links.call(life, op, **fields)
        except LiteError as failure:
            log.warning("%s at node %d: %s", op, life.node, failure)


def directory_of(manager: Manager, links: Links) -> Directory:
    """The directory as the books of a manager; call its `start` when the manager serves."""
    made = Directory(manager, links)
    manager.books = made
    return made
