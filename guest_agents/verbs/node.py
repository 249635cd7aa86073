"""A blade's RDMA endpoint: accepts connections for named services, and checks the way to a peer.

Handlers for the control server (messages: guest_agents/control.py): verbs.accept, verbs.release, verbs.ping.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from guest_agents import control
from guest_agents.membership import Life
from guest_agents.verbs.arena import Arena
from guest_agents.verbs.completion import Completions, check
from guest_agents.verbs.connection import Connection, address_of
from guest_agents.verbs.device import Device, open_device

PING_BYTES = 64 << 10


@dataclass
class Accepted:
    """A connection that a peer asked for."""

    number: int
    service: str
    client: str
    connection: Connection
    life: Life | None = None
    """Of the peer, if it has said so."""
    offer: dict[str, Any] = field(default_factory=dict)
    on_close: list[Callable[[], None]] = field(default_factory=list)

    def close(self) -> None:
        """Destroy the queue pair first, so that nothing arrives in memory that is given to others next."""
        self.connection.close()
        for action in reversed(self.on_close):
            action()


Service = Callable[[Accepted, Device], None]
"""Prepares an accepted connection (before it is connected): adds to `offer` and `on_close`."""


class Node:
    """The device, the services this blade offers, and who is connected."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.services: dict[str, Service] = {"ping": _offer_ping}
        self.life: Callable[[], Life | None] = lambda: None
        """This blade's present life, which its peers are told."""
        self._dead: dict[int, int] = {}
        self._accepted: dict[int, Accepted] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._idle: Completions | None = None

    def handlers(self) -> dict[str, control.Handler]:
        """For the agent's control server."""
        return {"verbs.accept": self.accept, "verbs.release": self.release}

    def accept(self, request: control.Message) -> control.Message:
        """verbs.accept: make the other end of the peer's queue pair, for one of our services."""
        prepare = self.services.get(request["service"])
        if prepare is None:
            known = ", ".join(sorted(self.services))
            raise control.ControlError(f"no service {request['service']!r} here", f"this blade offers: {known}")
        peer = address_of(request)
        life = Life(*request["life"]) if request.get("life") else None
        with self._lock:
            accepted = Accepted(
                next(self._numbers),
                request["service"],
                str(request.get("client", "?")),
                Connection(self.device, self._completions()),
                life,
            )
        try:
            prepare(accepted, self.device)
            accepted.connection.connect(peer)
        except BaseException:
            accepted.close()
            raise
        with self._lock:
            self._accepted[accepted.number] = accepted
            over = self._is_over(life)
        if over:
            self._close(accepted.number)
            raise control.ControlError(f"{accepted.client} was declared dead", "it has to begin a new life")
        caller = control.current_peer()
        if caller is not None:
            caller.on_close(lambda: self._close(accepted.number))
        return {**accepted.connection.address.fields(), "connection": accepted.number, **accepted.offer}

    def release(self, request: control.Message) -> control.Message:
        """verbs.release: forget a connection and all that belongs to it."""
        self._close(int(request["connection"]))
        return {}

    def introduction(self) -> dict[str, Any]:
        """What a blade says of itself when it asks a peer for a connection."""
        life = self.life()
        return {"life": [life.node, life.incarnation]} if life is not None else {}

    def bury(self, dead: dict[int, int]) -> None:
        """These lives (node -> highest incarnation that is over) have no connections here any more.

        A blade that lost its power closes none, and its control connection looks alive from here.
        """
        with self._lock:
            self._dead = dead
            lost = [accepted.number for accepted in self._accepted.values() if self._is_over(accepted.life)]
        for number in lost:
            self._close(number)

    def accepted(self, number: int) -> Accepted:
        """An open connection by its number."""
        try:
            return self._accepted[number]
        except KeyError:
            raise control.ControlError(f"no connection {number}", "it was released, or this agent restarted") from None

    def _close(self, number: int) -> None:
        with self._lock:
            accepted = self._accepted.pop(number, None)
        if accepted is not None:
            accepted.close()

    def _is_over(self, life: Life | None) -> bool:
        return life is not None and life.incarnation <= self._dead.get(life.node, 0)

    def _completions(self) -> Completions:
        """A queue for connections whose work is all the peer's: one-sided READs and WRITEs complete over there."""
        if self._idle is None:
            self._idle = Completions(self.device, depth=16)
        return self._idle


def open_node(name: str = "rxe0") -> Node:
    """The node on RDMA device `name`."""
    return Node(open_device(name))


def _offer_ping(accepted: Accepted, device: Device) -> None:
    arena = Arena(device, PING_BYTES)
    accepted.on_close.append(arena.close)
    accepted.offer.update(addr=arena.address, rkey=arena.rkey, size=arena.size)


def ping(node: Node, peer: control.ControlClient, size: int = 4096, timeout: float = 15.0) -> float:
    """WRITE random bytes into the peer and READ them back; returns the seconds of the two round trips.

    Proves that RDMA really works to that blade, both ways. Raises VerbsError or ControlError if not.
    """
    data = os.urandom(size)
    completions = Completions(node.device, depth=16)
    arena = Arena(node.device, 2 * size)
    connection = Connection(node.device, completions, depth=8)
    where = peer.address[0]
    try:
        offer = peer.call("verbs.accept", service="ping", client="ping", **connection.address.fields())
        try:
            connection.connect(address_of(offer))
            arena.view[:size] = data
            start = time.perf_counter()
            connection.post_write(1, arena.address, size, arena.lkey, offer["addr"], offer["rkey"])
            connection.post_read(2, arena.address + size, size, arena.lkey, offer["addr"], offer["rkey"])
            done = 0
            while done < 2:
                entries = completions.wait(timeout)
                if not entries:
                    raise control.ControlError(f"no RDMA reply from {where} in {timeout:g} s", "is its link up?")
                for entry in entries:
                    check(entry, where)
                    done += 1
            seconds = time.perf_counter() - start
            if bytes(arena.view[size:]) != data:
                raise control.ControlError(f"RDMA to {where} returned other bytes than were written", None)
            return seconds
        finally:
            peer.call("verbs.release", connection=offer["connection"])
    finally:
        connection.close()
        arena.close()
        completions.close()


def ping_handler(node: Node, secret: bytes) -> control.Handler:
    """The handler of verbs.ping: checks the way from this blade to another."""

    def handle(request: control.Message) -> control.Message:
        with control.ControlClient((request["peer"], int(request.get("port", control.PORT))), secret) as peer:
            size = int(request.get("size", 4096))
            return {"seconds": ping(node, peer, size), "bytes": size, "peer": request["peer"]}

    return handle
