"""A process's membership in LITE: what `lite.connect()` gives."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from guest_agents.lite import wire
from guest_agents.lite.buffers import Buffer
from guest_agents.lite.channel import Regions, Ticket, milliseconds, nothing
from guest_agents.lite.connection import SOCKET, Connection
from guest_agents.lite.errors import BadHandle, Freed, LiteError, NoSuchNode, NotJoined, Revoked
from guest_agents.lite.lmr import Lmr
from guest_agents.lite.permissions import Permission, Priority
from guest_agents.lite.rpc import DEFAULT_MESSAGE, Port
from guest_agents.lite.sync import Lock

if TYPE_CHECKING:
    from typing_extensions import Buffer as Data

_CALL, _SEND = int(wire.Op.CALL), int(wire.Op.SEND)
DEFAULT_REPLY = wire.INLINE
"""Bytes of the largest reply a caller expects unless it says otherwise."""


class Member(NamedTuple):
    """A node of the rack."""

    name: str
    node_id: int
    alive: bool


class Node:
    """This process on this blade's node. Threads share it; each gets its own connection underneath."""

    def __init__(self, path: str) -> None:
        self.priority = Priority.NORMAL
        """Of operations that do not say otherwise; may be set at any time."""
        self.regions: Regions = []
        """Where the registered buffers of this process are."""
        self._path = path
        self._forked = False
        self._closed = False
        self._own = threading.local()
        self._connections: weakref.WeakSet[Connection] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._token: str | None = None
        self._ids: dict[str, int] = {}
        # This one is kept until `close`: the agent forgets a process when its last connection closes.
        self._first = self.connection()
        about = self._first.about
        self.name: str = about["name"]
        """This blade's name."""
        self.node_id: int = about["node_id"]
        """This blade's number in the rack."""
        self._learn(about["nodes"])
        _nodes.add(self)

    # Membership

    def nodes(self) -> list[Member]:
        """All nodes that the rack knows, dead ones too."""
        members = self.call_agent("nodes")["nodes"]
        self._learn(members)
        return [Member(member["name"], member["node_id"], _lives(member)) for member in members]

    # Memory

    def malloc(
        self,
        size: int,
        on: str | Sequence[str] | None = None,
        *,
        spread: bool = False,
        name: str | None = None,
        keep: bool = False,
        permissions: Permission = Permission.USE | Permission.SHARE | Permission.ATOMIC,
    ) -> Lmr:
        """Allocate `size` bytes of zeroed memory somewhere in the rack; this process is its master (LT_malloc).

        on -- a node, or several to choose from; None is this one, or with `spread` all memory blades
        spread -- lay it on the nodes in turn, in blocks of up to 4 MiB, instead of all on the first with room
        name -- under which others map it; unique in the rack
        keep -- it outlives all handles, until a master frees it
        permissions -- what those who map it by name may have at most
        NoMemory, NameTaken, NoSuchNode, NodeDead, ManagerLost.
        """
        nodes = [on] if isinstance(on, str) else None if on is None else list(on)
        fields: dict[str, Any] = {} if name is None else {"name": name}
        about = self.call_agent(
            "malloc", size=size, nodes=nodes, spread=spread, keep=keep, permissions=int(permissions), **fields
        )
        return Lmr(self, about, name)

    def map(self, name: str, permissions: Permission = Permission.USE) -> Lmr:
        """A handle to the LMR called `name` (LT_map). NoSuchName; PermissionDenied if more is asked than is granted."""
        return Lmr(self, self.call_agent("map", name=name, permissions=int(permissions)), name)

    def buffer(self, size: int) -> Buffer:
        """`size` bytes of registered memory for zero-copy reads and writes. NoMemory."""
        with self._lock:
            reply, descriptor = self.connection().call_for_descriptor("buffer", size=size)
            return Buffer(self, reply["id"], descriptor, size)

    def fence(self) -> None:
        """Wait for all operations this thread has started (LT_fence). Raises the first error nobody was told of."""
        self.connection().channel.fence()

    # Messages

    def register(self, port: int, max_message: int = DEFAULT_MESSAGE) -> Port:
        """Serve `port` (0 to 63) of this node for messages up to `max_message` bytes (LT_regRPC). PortTaken."""
        self.call_agent("register", port=port, max_message=max_message)
        return Port(self, port, max_message)

    def call(
        self,
        node: str | int,
        port: int,
        data: Data = b"",
        *,
        timeout: float | None = None,
        max_reply: int = DEFAULT_REPLY,
        priority: Priority | None = None,
    ) -> bytes:
        """Send `data` to a port of a node (name or id) and wait for the reply (LT_RPC).

        timeout -- seconds; None is the agent's default. After TimedOut it is not known whether the server acted.
        max_reply -- bytes; a longer reply is MessageTooLarge, here and at the server
        PortClosed, RingFull (the server does not keep up), NodeDead, NodeUnreachable.
        """
        ticket = self.call_async(node, port, data, timeout=timeout, max_reply=max_reply, priority=priority)
        try:
            return ticket.wait()
        except LiteError:
            raise
        except BaseException:
            self.connection().channel.cancel(ticket)
            raise

    def call_async(
        self,
        node: str | int,
        port: int,
        data: Data = b"",
        *,
        timeout: float | None = None,
        max_reply: int = DEFAULT_REPLY,
        priority: Priority | None = None,
    ) -> Ticket[bytes]:
        """The same without waiting; the ticket's `wait` has the reply."""
        return self.connection().channel.start(
            _CALL,
            Ticket.data,
            handle=self._id_of(node),
            arg0=port,
            arg1=max_reply,
            length=memoryview(data).nbytes,
            out=data,
            room=max_reply,
            priority=self.priority if priority is None else priority,
            timeout_ms=milliseconds(timeout),
        )

    def send(self, node: str | int, port: int, data: Data, *, timeout: float | None = None) -> None:
        """Send a message that gets no reply (LT_send); returns when it is in the memory of the other node.

        If the port is closed by then, or closes before somebody has received it, it is lost.
        """
        self.connection().channel.run(
            _SEND,
            nothing,
            handle=self._id_of(node),
            arg0=port,
            length=memoryview(data).nbytes,
            out=data,
            priority=self.priority,
            timeout_ms=milliseconds(timeout),
        )

    def multicast(
        self,
        nodes: Sequence[str],
        port: int,
        data: Data = b"",
        *,
        timeout: float | None = None,
        max_reply: int = DEFAULT_REPLY,
    ) -> Mapping[str, bytes | LiteError]:
        """Call several nodes at once; for each its reply, or what went wrong with it."""
        outcome: dict[str, bytes | LiteError] = {}
        tickets: dict[str, Ticket[bytes]] = {}
        for node in nodes:
            try:
                tickets[node] = self.call_async(node, port, data, timeout=timeout, max_reply=max_reply)
            except NoSuchNode as failure:
                outcome[node] = failure
        for node, ticket in tickets.items():
            try:
                outcome[node] = ticket.wait()
            except LiteError as failure:
                outcome[node] = failure
        return outcome

    # Synchronisation

    def lock(self, name: str, home: str | None = None) -> Lock:
        """The lock called `name`, made at node `home` (None: here) if there is none yet (LT_createlock)."""
        self.call_agent("lock_create", name=name, **({} if home is None else {"home": home}))
        return Lock(self, name)

    def barrier(self, name: str, count: int, timeout: float | None = None) -> None:
        """Wait until `count` threads of the rack wait at `name` (LT_barrier). BarrierBroken when one of them dies."""
        self.call_agent("barrier", name=name, count=count, timeout_ms=milliseconds(timeout))

    # Underneath

    def stat(self) -> dict[str, Any]:
        """What this blade's agent counts: LMRs, handles, QPs, operations."""
        return self.call_agent("stat")

    def qos(self, mode: str) -> None:
        """How this blade treats priorities, for all its programs: "none", "hw_sep" or "sw_pri"."""
        self.call_agent("qos", mode=mode)

    def connection(self) -> Connection:
        """This thread's connection, made when it is first needed. NotJoined after `close`, and in a forked child."""
        mine: Connection | None = getattr(self._own, "connection", None)
        if mine is None or self._forked or self._closed:
            if self._forked:
                raise NotJoined("this process was forked from the one that connected", hint="call connect() in it too")
            if self._closed:
                raise NotJoined("this node was closed")
            mine = Connection(self._path, self._token, self.regions)
            self._token = mine.about["token"]
            self._own.connection = mine
            self._connections.add(mine)
        return mine

    def call_agent(self, op: str, **fields: Any) -> dict[str, Any]:
        """A control request of this thread."""
        return self.connection().call(op, **fields)

    def unmap_quietly(self, lmr: Lmr) -> None:
        """Unmap, unless the handle has ended otherwise, or the agent."""
        with suppress(BadHandle, Freed, Revoked, NotJoined):
            lmr.unmap()

    def close(self) -> None:
        """Leave: the agent takes back all that this process has. Other threads that wait get NotJoined."""
        if self._closed or self._forked:
            return
        mine = getattr(self._own, "connection", None)
        self._closed = True
        for connection in list(self._connections):
            if connection is mine:
                connection.close()
            else:
                connection.interrupt()

    def __enter__(self) -> Node:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def after_fork(self) -> None:
        """In a child: the connections are the parent's, and while copies are open it could not leave."""
        self._forked = True
        for connection in list(self._connections):
            connection.abandon()

    def _id_of(self, node: str | int) -> int:
        if isinstance(node, int):
            return node
        if node not in self._ids:
            self.nodes()
        try:
            return self._ids[node]
        except KeyError:
            raise NoSuchNode(f"no node called {node!r}", hint=f"there are: {', '.join(sorted(self._ids))}") from None

    def _learn(self, members: list[dict[str, Any]]) -> None:
        self._ids = {member["name"]: member["node_id"] for member in members if _lives(member)}


def connect(path: str | None = None) -> Node:
    """Join LITE as this process (LT_join). NotJoined when this is no blade, or its agent is down.

    path -- the agent's socket; None is $RACKLESS_LITE or its usual place
    """
    return Node(path or os.environ.get("RACKLESS_LITE", SOCKET))


_nodes: weakref.WeakSet[Node] = weakref.WeakSet()


def _lives(member: dict[str, Any]) -> bool:
    return bool(member["state"] == "alive")


def _after_fork() -> None:
    for node in list(_nodes):
        node.after_fork()


def _close_all() -> None:
    """Before the interpreter ends: threads that it stops would take the replies for which the closing ones wait."""
    for node in list(_nodes):
        node.close()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_close_all)
