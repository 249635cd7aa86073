"""Connections to the cores of other nodes: made when they are first needed, made again when they break.

That is: to all nodes when the first program of this blade connects, as messages may go anywhere; before that, to the
nodes whose memory is asked for.

Of two nodes the one with the lower id makes the connection, the other asks it to; so both never do it at once. Each
connection has a number, so that both may notice that it broke and it is made again once.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from guest_agents.control import Handler, Message
from guest_agents.lite.errors import LiteError, NodeDead, NodeUnreachable, NotJoined
from guest_agents.lite.links import Links
from guest_agents.membership import Life

_RETRY_SECONDS = 0.5
_ALL_SECONDS = 5.0

log = logging.getLogger("rackless.lite")


class Pairs(Protocol):
    """What of the core this needs."""

    def peer_prepare(self, node: int, incarnation: int) -> dict[str, Any]: ...

    def peer_connect(self, node: int, incarnation: int, remote: dict[str, Any]) -> None: ...


@dataclass
class _Peer:
    life: Life | None = None
    number: int = 0
    """Of the connection; 0: none, or it broke."""
    lock: threading.Lock = field(default_factory=threading.Lock)


class Peers:
    """All peers of this node.

    own -- this node's life
    bury -- makes sure that lives of a node before the given one are over and done with
    """

    def __init__(self, core: Pairs, links: Links, own: Callable[[], Life], bury: Callable[[Life], None]) -> None:
        self._core = core
        self._links = links
        self._own = own
        self._bury = bury
        self._peers: dict[int, _Peer] = {}
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)

    def handlers(self) -> dict[str, Handler]:
        """Control operations of other tiers."""
        return {"lite.peer.connect": self.accept, "lite.peer.ask": self.asked}

    def connect(self, life: Life) -> None:
        """Connect to that life if that is not done yet. NODE_DEAD, NODE_UNREACHABLE."""
        own = self._own()
        if self._is_connected(life):
            return
        peer = self._peer(life.node)
        if own.node < life.node:
            self._make(peer, life, 0)
        else:
            self._links.call(life, "lite.peer.ask", life=[own.node, own.incarnation], broken=0)
            if peer.life != life or not peer.number:
                raise NodeUnreachable(f"node {life.node} did not connect")

    def reach(self, life: Life) -> None:
        """The same, but what cannot be connected now is left for later: operations say why they fail."""
        try:
            self.connect(life)
        except LiteError as failure:
            if not isinstance(failure, NodeDead):
                log.warning("no connection to node %d: %s", life.node, failure)
                self._again(life)

    def reach_all(self, lives: Iterable[Life]) -> None:
        """Connect to all of them at once; returns when that is done or has failed, at the latest after some seconds."""
        threads = [threading.Thread(target=self.reach, args=(life,), name=f"peer {life.node}", daemon=True)
                   for life in lives if not self._is_connected(life)]  # fmt: skip
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + _ALL_SECONDS
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def broken(self, life: Life) -> None:
        """The core has lost the connection: make it anew, as long as that life lasts. Returns at once."""
        self._again(life)

    def forget_all(self) -> None:
        """A new life begins: core.join has dropped all peers."""
        with self._lock:
            self._peers.clear()

    def accept(self, request: Message) -> Message:
        """lite.peer.connect: the other end of a connection."""
        life = Life(*request["life"])
        peer = self._peer(life.node)
        with peer.lock:
            self._bury(life)
            peer.life, peer.number = life, 0
            address = self._core.peer_prepare(life.node, life.incarnation)
            self._core.peer_connect(life.node, life.incarnation, request["address"])
            peer.number = int(request["number"])
        return {"address": address}

    def asked(self, request: Message) -> Message:
        """lite.peer.ask: a node with a higher id wants to be connected; `broken` is the connection that it lost."""
        life = Life(*request["life"])
        self._make(self._peer(life.node), life, int(request["broken"]))
        return {}

    def _make(self, peer: _Peer, life: Life, broken: int) -> None:
        with peer.lock:
            if peer.life == life and peer.number and peer.number != broken:
                return
            self._bury(life)
            own = self._own()
            peer.life, peer.number = life, 0
            number = next(self._numbers)
            address = self._core.peer_prepare(life.node, life.incarnation)
            reply = self._links.call(life, "lite.peer.connect", life=[own.node, own.incarnation], address=address,
                                     number=number)  # fmt: skip
            self._core.peer_connect(life.node, life.incarnation, reply["address"])
            peer.number = number

    def _again(self, life: Life) -> None:
        threading.Thread(target=self._reconnect, args=(life,), name=f"peer {life.node}", daemon=True).start()

    def _reconnect(self, life: Life) -> None:
        peer = self._peer(life.node)
        if peer.life not in (None, life):
            return
        lost = peer.number
        while not self._links.is_over(life):
            try:
                own = self._own()
            except NotJoined:  # our life is over: who joins anew meets everybody
                return
            try:
                if own.node < life.node:
                    self._make(peer, life, lost)
                else:
                    self._links.call(life, "lite.peer.ask", life=[own.node, own.incarnation], broken=lost)
            except NodeDead:
                return
            except LiteError as failure:
                log.warning("node %d is not reconnected yet: %s", life.node, failure)
                time.sleep(_RETRY_SECONDS)
            else:
                return

    def _is_connected(self, life: Life) -> bool:
        peer = self._peer(life.node)
        return life == self._own() or (peer.life == life and peer.number != 0)

    def _peer(self, node: int) -> _Peer:
        with self._lock:
            return self._peers.setdefault(node, _Peer())
