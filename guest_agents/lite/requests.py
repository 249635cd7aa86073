"""What programs may ask of the tier over the control socket."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from guest_agents.control import Message
from guest_agents.lite.clients import VOID, Action, Handle, Reply, Request
from guest_agents.lite.errors import BadArgument, NodeDead, OutOfRange, PermissionDenied, TimedOut
from guest_agents.lite.permissions import Permission
from guest_agents.lite.tickets import Place
from guest_agents.membership import Life

if TYPE_CHECKING:
    from guest_agents.lite.tier import Tier

QOS_MODES = ("none", "hw_sep", "sw_pri")
_RIGHTS = int(Permission.ALL)
_MOVE_SECONDS = 600.0


class Requests:
    """One method per request; each raises LiteError."""

    def __init__(self, tier: Tier) -> None:
        self._tier = tier
        self._places: dict[str, Place] = {}
        """Where locks are that programs of this node use."""

    def actions(self) -> dict[str, Action]:
        """By the name of the request."""
        return {
            "nodes": self.nodes, "malloc": self.malloc, "map": self.map, "unmap": self.unmap, "free": self.free,
            "grant": self.grant, "revoke": self.revoke, "move": self.move, "memset": self.memset,
            "memcpy": self.memmove, "memmove": self.memmove, "buffer": self.buffer, "buffer_drop": self.buffer_drop,
            "register": self.register, "unregister": self.unregister, "lock_create": self.lock_create,
            "lock": self.lock, "unlock": self.unlock, "barrier": self.barrier, "stat": self.stat, "qos": self.qos,
        }  # fmt: skip

    def greeting(self) -> Message:
        """For hello: this node and the others. NOT_JOINED."""
        life = self._tier.life()
        self._tier.meet()
        return {"node_id": life.node, "incarnation": life.incarnation, "name": self._tier.settings.name,
                "nodes": self._tier.membership.members}  # fmt: skip

    def nodes(self, request: Request) -> Reply:
        """nodes{}: members, also those that died or left and are not back."""
        del request
        return {"nodes": self._tier.membership.members}

    def malloc(self, request: Request) -> Reply:
        """malloc{size, nodes?, spread?, name?, keep?, permissions}: an LMR and a master's handle to it."""
        nodes = request.fields.get("nodes")
        number, reply = self._tier.open_handle(
            request.client,
            "malloc",
            size=request.number("size", 1),
            nodes=None if nodes is None else _names(nodes),
            spread=request.fields.get("spread") is True,
            keep=request.fields.get("keep") is True,
            name=None if request.fields.get("name") is None else request.text("name"),
            permissions=request.number("permissions", 0, _RIGHTS, int(Permission.USE)),
        )
        return {"lmr": reply["lmr"], "handle": number, "permissions": reply["permissions"], "size": reply["size"],
                "blocks": reply["blocks"]}  # fmt: skip

    def map(self, request: Request) -> Reply:
        """map{name, permissions?}: a handle to the LMR of that name; without permissions for all that is allowed."""
        asked = None if request.fields.get("permissions") is None else request.number("permissions", 1, _RIGHTS)
        number, reply = self._tier.open_handle(request.client, "map", name=request.text("name"), permissions=asked)
        return {"handle": number, "size": reply["size"], "permissions": reply["permissions"]}

    def unmap(self, request: Request) -> Reply:
        """unmap{handle}"""
        handle = request.handle()
        del request.client.handles[request.fields["handle"]]
        self._tier.core.handle_drop(request.client.number, request.fields["handle"])
        self._tier.give_up([handle])
        return {}

    def free(self, request: Request) -> Reply:
        """free{handle}: needs ADMIN; all handles to it get FREED, this one too."""
        return self._as_master(request, "free")

    def grant(self, request: Request) -> Reply:
        """grant{handle, permissions, to}: needs ADMIN."""
        rights = request.number("permissions", 1, _RIGHTS)
        return self._as_master(request, "grant", permissions=rights, to=request.text("to"))

    def revoke(self, request: Request) -> Reply:
        """revoke{handle, permissions, to}: needs ADMIN."""
        rights = request.number("permissions", 1, _RIGHTS)
        return self._as_master(request, "revoke", permissions=rights, to=request.text("to"))

    def move(self, request: Request) -> Reply:
        """move{handle, to, block?}: needs ADMIN."""
        block = None if request.fields.get("block") is None else request.number("block")
        return self._as_master(request, "move", _MOVE_SECONDS, to=_names(request.fields.get("to")), block=block)

    def memset(self, request: Request) -> Reply:
        """memset{handle, offset, length, byte}: needs WRITE."""
        offset, length, byte = request.number("offset"), request.number("length"), request.number("byte", 0, 255)
        handle = _checked(request.handle(), Permission.WRITE, offset, length)
        with self._tier.lmrs.use(handle.lmr) as (record,):
            self._tier.copies.memset(record, offset, length, byte)
        return {}

    def memmove(self, request: Request) -> Reply:
        """memcpy, memmove{source, soffset, target, toffset, length}: needs READ there and WRITE here. The same, as
        memmove costs no more: LMRs know where they overlap."""
        soffset, toffset, length = request.number("soffset"), request.number("toffset"), request.number("length")
        source = _checked(request.handle("source"), Permission.READ, soffset, length)
        target = _checked(request.handle("target"), Permission.WRITE, toffset, length)
        with self._tier.lmrs.use(source.lmr, target.lmr) as (first, second):
            self._tier.copies.memmove(first, soffset, second, toffset, length)
        return {}

    def buffer(self, request: Request) -> Reply:
        """buffer{size}: registered memory shared with the program; its descriptor comes with the reply."""
        number, descriptor = self._tier.core.buffer_add(request.client.number, request.number("size", 1))
        return {"id": number}, descriptor

    def buffer_drop(self, request: Request) -> Reply:
        """buffer_drop{id}"""
        self._tier.core.buffer_drop(request.client.number, request.number("id", 0, 0xFFFFFFFF))
        return {}

    def register(self, request: Request) -> Reply:
        """register{port, max_message}"""
        port, largest = request.number("port", 0, 0xFFFFFFFF), request.number("max_message", 0)
        self._tier.core.port_open(request.client.number, port, largest)
        return {}

    def unregister(self, request: Request) -> Reply:
        """unregister{port}"""
        self._tier.core.port_close(request.client.number, request.number("port", 0, 0xFFFFFFFF))
        return {}

    def lock_create(self, request: Request) -> Reply:
        """lock_create{name, home?}: the lock of that name, made at `home` (or here) if there is none."""
        home = None if request.fields.get("home") is None else request.text("home")
        self._lock(request, "lock_create", home=home)
        return {}

    def lock(self, request: Request) -> Reply:
        """lock{name, timeout_ms}: 0 is no limit."""
        name, seconds = request.text("name"), request.seconds()
        place = self._places.get(name) if name in request.client.locks else None
        if place is None:
            place = self._lock(request, "lock_find")
        try:
            self._tier.tickets.acquire(name, place, request.client.number, request.program, seconds)
        except NodeDead:
            request.client.locks.discard(name)  # there may be a new lock of that name by now
            raise
        return {}

    def unlock(self, request: Request) -> Reply:
        """unlock{name}"""
        self._tier.tickets.release(request.text("name"), request.client.number)
        return {}

    def barrier(self, request: Request) -> Reply:
        """barrier{name, count, timeout_ms}: 0 is no limit."""
        name, count, seconds = request.text("name"), request.number("count", 1), request.seconds()
        tier, client = self._tier, request.client
        waiter = tier.waits.begin()
        client.barriers = True
        try:
            if tier.directory("barrier", client=client.number, name=name, count=count, waiter=waiter.number)["done"]:
                return {}
            try:
                tier.waits.wait(waiter, request.program, seconds)
            except TimedOut:
                left = tier.directory("barrier_leave", name=name, waiter=waiter.number)["left"]
                if left:
                    raise
                tier.waits.wait(waiter, request.program, None)  # it was complete, or broke, in the same moment
            return {}
        finally:
            tier.waits.end(waiter)

    def stat(self, request: Request) -> Reply:
        """stat{}"""
        del request
        return self._tier.stat()

    def qos(self, request: Request) -> Reply:
        """qos{mode}: none, hw_sep or sw_pri, for all programs of this blade."""
        mode = request.text("mode")
        if mode not in QOS_MODES:
            raise BadArgument(f"mode is one of {', '.join(QOS_MODES)}")
        self._tier.core.qos_set(mode)  # type: ignore[arg-type]
        return {}

    def _lock(self, request: Request, op: str, **fields: Any) -> Place:
        """Find a lock, and use it from now on."""
        name = request.text("name")
        reply = self._tier.directory(op, client=request.client.number, name=name, **fields)
        place = self._places[name] = Place(Life(*reply["home"]), reply["address"], reply["rkey"])
        request.client.locks.add(name)
        return place

    def _as_master(self, request: Request, op: str, seconds: float = 60.0, **fields: Any) -> Reply:
        handle = request.handle()
        _alive(handle)
        client = request.client.number
        return self._tier.directory(op, seconds, lmr=handle.lmr, ticket=handle.ticket, client=client, **fields)


def _alive(handle: Handle) -> None:
    if handle.ticket == VOID:
        raise NodeDead("this blade was declared dead since, and its handles with it", hint="unmap it, and map it again")


def _names(value: object) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
        raise BadArgument("nodes are a list of names")
    return value


def _checked(handle: Handle, needed: Permission, offset: int, length: int) -> Handle:
    _alive(handle)
    if not handle.permissions & needed:
        raise PermissionDenied(f"the handle does not allow to {needed.name.lower()}" if needed.name else None)
    if offset + length > handle.size:
        raise OutOfRange(f"{length} bytes at {offset} of an LMR of {handle.size}")
    return handle
