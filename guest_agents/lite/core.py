"""The native core of LITE (native/lite/), which alone holds queue pairs and keys, as Python sees it.

One C thread serves the data channels of all programs of this blade, and all of its peers; the calls here change its
tables. They may come from any thread, do not hold the interpreter lock, and raise LiteError.

How the tier brings things up: `Core(config)`, `join(node, incarnation)` (which also connects the loopback queue
pairs), then for each peer `peer_prepare` on both sides, an exchange of what it returned, and `peer_connect`.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from threading import Lock
from types import TracebackType
from typing import Any, Literal, NamedTuple

from guest_agents.lite import abi
from guest_agents.lite.errors import BadArgument, OutOfRange, TimedOut, error_for

Address = dict[str, Any]
"""What a peer must know of our queue pairs; goes through JSON unharmed."""
QosMode = Literal["none", "hw_sep", "sw_pri"]
QOS_MODES: tuple[QosMode, ...] = ("none", "hw_sep", "sw_pri")


@dataclass(frozen=True)
class Config:
    """Limits of a core. Sizes in bytes."""

    device: str = "rxe0"
    queue_pairs: int = 4
    """Queue pairs per peer (K), 1 to 8; hw_sep needs 2."""
    qos: QosMode = "none"
    pool: int = 8 << 20
    """Most registered memory for data on their way between programs and the fabric. Comes on demand."""
    slots: int = 16 << 20
    """Most registered memory for the replies of calls under way. Comes on demand."""
    buffers: int = 64 << 20
    """Most registered memory for the buffers of one client."""
    timeout_ms: int = 30_000
    """For requests that give none: how long they may wait (for a ring, a reply, an LMR that moves)."""
    spin_us: int = 5000
    """How long the thread looks around before it sleeps, at most; it adapts below that. Between two calls a server of
    emulated blades has 2 to 3 ms of nothing; a core that slept then cost each call 500 to 900 us."""


class Block(NamedTuple):
    """A piece of an LMR: `length` bytes at `address` of `node`, reached with `rkey`."""

    node: int
    address: int
    rkey: int
    length: int


@dataclass
class Slab:
    """Registered memory of this node, zeroed; remote nodes may read, write and do atomics on it with `rkey`."""

    address: int
    bytes: int
    rkey: int
    _core: Core | None = field(repr=False)
    _number: int = field(repr=False)

    def close(self) -> None:
        """Give the memory back. What still arrives for it breaks the sender's queue pairs, so drain first.

        BAD_ARGUMENT while an LMR that this node knows (and that is not killed) has a block in it.
        """
        if self._core is not None:
            self._core._slab_close(self._number)
            self._core = None


class Ring(NamedTuple):
    """Where the messages of one client node to one port go (server's side)."""

    address: int
    rkey: int
    size: int
    max_message: int
    generation: int
    lost: int
    """Mask of programs of the client node whose one-way messages, in the rings before this, nobody has read."""


class Event(NamedTuple):
    """Something the tier must see to.

    kind          what happened
    peer_broken   a queue pair to `node` failed: its operations ended NODE_UNREACHABLE; connect anew if it lives
    bind          a CALL or SEND to `port` of `node` found no ring, or one of a port that was closed: ring_offer there,
                  ring_attach or ring_refuse here
    channel_closed  a data channel of `client` closed (its program ended, closed it, or broke the protocol)
    """

    kind: Literal["peer_broken", "bind", "channel_closed"]
    node: int
    incarnation: int
    port: int
    client: int


_EVENT_KINDS: tuple[Literal["peer_broken", "bind", "channel_closed"], ...] = ("peer_broken", "bind", "channel_closed")


def _blocks(blocks: Iterable[Block | tuple[int, int, int, int]]) -> ctypes.Array[abi.Block]:
    items = [abi.Block(address, length, node, rkey) for node, address, rkey, length in blocks]
    return (abi.Block * len(items))(*items)


class Core:
    """The core of this blade. Use as a context manager, or close()."""

    def __init__(self, config: Config | None = None) -> None:
        """Open the device and start the thread. NotJoined if there is no RDMA device of this name."""
        self.config = config or Config()
        self._library = abi.load()
        self._core = ctypes.c_void_p()
        self._slabs: dict[int, Slab] = {}
        self._lock = Lock()
        native = abi.Config(
            self.config.device.encode(),
            self.config.queue_pairs,
            QOS_MODES.index(self.config.qos),
            self.config.pool,
            self.config.slots,
            self.config.buffers,
            self.config.timeout_ms,
            self.config.spin_us,
        )
        code = self._library.lite_open(ctypes.byref(native), ctypes.byref(self._core))
        if code:
            reason = os.strerror(ctypes.get_errno())
            raise error_for(code, f"RDMA device {self.config.device} cannot be used: {reason}")

    def close(self) -> None:
        """End the thread, every connection and all memory. No other call may be under way or come after."""
        if self._core:
            self._library.lite_close(self._core)
            self._core = ctypes.c_void_p()

    def __enter__(self) -> Core:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, name: str, *arguments: Any, about: str | None = None) -> None:
        code = getattr(self._library, f"lite_{name}")(self._core, *arguments)
        if code:
            raise error_for(code, about)

    # Own life

    def join(self, node: int, incarnation: int) -> None:
        """This node's id and incarnation, as the manager gave them; connects the loopback queue pairs.

        Joining anew with another incarnation drops every peer (their operations end NODE_UNREACHABLE). LMRs, handles
        and clients stay: the tier decides what becomes of them. Before the first join requests get NOT_JOINED.
        """
        self._call("join", node, incarnation)

    # Memory of this node

    def slab(self, size: int) -> Slab:
        """Registered memory for blocks: `size` bytes (rounded up to pages), zeroed, pinned. NO_MEMORY."""
        out = abi.Slab()
        self._call("slab_open", size, ctypes.byref(out), about=f"{size} bytes cannot be registered")
        slab = Slab(out.address, out.bytes, out.rkey, self, out.number)
        with self._lock:
            self._slabs[out.number] = slab
        return slab

    def _slab_close(self, number: int) -> None:
        self._call("slab_close", number, about="an LMR of this node still uses the slab")
        with self._lock:
            self._slabs.pop(number, None)

    def _check(self, address: int, length: int) -> None:
        with self._lock:
            slabs = list(self._slabs.values())
        if length < 0 or not any(s.address <= address and address + length <= s.address + s.bytes for s in slabs):
            raise OutOfRange(f"{length} bytes at {address:#x} are not in one slab of this node")

    def read_local(self, address: int, length: int) -> bytes:
        """Bytes of a slab. OUT_OF_RANGE if they are not all in one."""
        self._check(address, length)
        return ctypes.string_at(address, length)

    def write_local(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Store bytes in a slab. OUT_OF_RANGE if they do not all fit in one."""
        view = memoryview(data).cast("B")
        self._check(address, len(view))
        source = view.tobytes() if view.readonly else (ctypes.c_char * len(view)).from_buffer(view)
        ctypes.memmove(address, source, len(view))

    def memset_local(self, address: int, byte: int, length: int) -> None:
        """Fill a range of a slab. OUT_OF_RANGE if it is not all in one."""
        self._check(address, length)
        ctypes.memset(address, byte, length)

    def memmove_local(self, target: int, source: int, length: int) -> None:
        """Copy between ranges of slabs, which may overlap. OUT_OF_RANGE as above."""
        self._check(target, length)
        self._check(source, length)
        ctypes.memmove(target, source, length)

    # Peers

    def peer_prepare(self, node: int, incarnation: int) -> Address:
        """Make the queue pairs for a peer, and say what the peer needs for its `peer_connect`.

        Queue pairs that were there for the node are destroyed before; their operations end NODE_UNREACHABLE (same
        incarnation) or NODE_DEAD (an older one). NODE_DEAD if the incarnation is older than the one known.
        """
        out = abi.Address()
        self._call("peer_prepare", node, incarnation, ctypes.byref(out))
        return {
            "gid": bytes(out.gid).hex(),
            "qps": [[out.qpn[i], out.psn[i]] for i in range(out.count)],
            "heads": out.heads,
            "heads_rkey": out.heads_rkey,
        }

    def peer_connect(self, node: int, incarnation: int, remote: Address) -> None:
        """Connect the prepared queue pairs to what the peer's `peer_prepare` returned. The numbers of queue pairs
        must be equal. NODE_UNREACHABLE if the peer was not prepared here, or its GID cannot be reached."""
        native = abi.Address()
        try:
            native.gid[:] = bytes.fromhex(remote["gid"])
            pairs = remote["qps"]
            native.count = len(pairs)
            native.heads, native.heads_rkey = int(remote["heads"]), int(remote["heads_rkey"])
            for i, (qpn, psn) in enumerate(pairs):
                native.qpn[i], native.psn[i] = int(qpn), int(psn)
        except (KeyError, TypeError, ValueError, IndexError) as failure:
            raise BadArgument(f"a peer's address makes no sense: {failure}") from failure
        self._call("peer_connect", node, incarnation, ctypes.byref(native))

    def peer_dead(self, node: int, incarnation: int) -> None:
        """The node's life is over: its queue pairs are destroyed (nothing of it can arrive any more), everything in
        flight or waiting for it ends with NODE_DEAD, and so does every later request until a new incarnation connects.
        An incarnation older than the one known is ignored."""
        self._call("peer_dead", node, incarnation)

    # Clients

    def client_add(self, pid: int) -> int:
        """A program; `pid` is the process whose memory its unregistered addresses mean."""
        out = ctypes.c_uint64()
        self._call("client_add", pid, ctypes.byref(out))
        return out.value

    def channel_add(self, client: int, fd: int, mailbox: bool = False) -> int | None:
        """Serve requests on the SEQPACKET socket `fd`, which belongs to the core from now on (also on errors).

        With `mailbox`: also those in memory shared with the program (struct lite_mailbox); returns its file, which is
        the caller's, or None if it cannot be made.
        """
        file = ctypes.c_int(-1)
        self._call("channel_add", client, fd, ctypes.byref(file) if mailbox else None)
        return None if file.value < 0 else file.value

    def client_remove(self, client: int) -> None:
        """Forget a program: close its channels, ports (callers get PORT_CLOSED), handles and buffers.

        Returns when nothing of it is in flight, so that its memory may be given to others.
        """
        self._call("client_remove", client)

    # LMRs

    def lmr_put(self, lmr: int, blocks: Iterable[Block | tuple[int, int, int, int]]) -> None:
        """Make an LMR known: blocks as (node, address, rkey, length), in order. If it is known, nothing changes."""
        native = _blocks(blocks)
        self._call("lmr_put", lmr, native, len(native))

    def lmr_freeze(self, lmr: int, timeout: float = 30.0) -> None:
        """Park new requests on the LMR; returns when none is in flight any more.

        TIMED_OUT (and thawed again) if that takes longer than `timeout` seconds.
        """
        self._call("lmr_freeze", lmr, int(timeout * 1000))

    def lmr_replace(self, lmr: int, blocks: Iterable[Block | tuple[int, int, int, int]]) -> None:
        """Give a frozen LMR new blocks of the same total length. BAD_ARGUMENT if it is not frozen."""
        native = _blocks(blocks)
        self._call("lmr_replace", lmr, native, len(native))

    def lmr_thaw(self, lmr: int) -> None:
        """Let parked requests go on."""
        self._call("lmr_thaw", lmr)

    def lmr_kill(self, lmr: int, code: int) -> None:
        """The LMR is gone: parked and later requests end with `code` (such as FREED); returns when none is in flight.

        The LMR is forgotten when its last handle is dropped, at once if it has none. Not known: nothing happens.
        """
        self._call("lmr_kill", lmr, code)

    # Handles

    def handle_add(self, client: int, lmr: int, permissions: int) -> int:
        """A capability of one client for an LMR; never 0, and never the number of an earlier handle of the client."""
        out = ctypes.c_uint64()
        self._call("handle_add", client, lmr, permissions, ctypes.byref(out))
        return out.value

    def handle_set(self, client: int, handle: int, permissions: int) -> None:
        """Change what the handle permits; 0 revokes it (requests then get REVOKED)."""
        self._call("handle_set", client, handle, permissions)

    def handle_drop(self, client: int, handle: int) -> None:
        """Forget the handle; requests that began go on."""
        self._call("handle_drop", client, handle)

    # Registered buffers

    def buffer_add(self, client: int, size: int) -> tuple[int, int]:
        """Memory shared with the program and registered: (id, memfd). The caller closes the memfd when it is sent."""
        number, fd = ctypes.c_uint32(), ctypes.c_int(-1)
        self._call("buffer_add", client, size, ctypes.byref(number), ctypes.byref(fd))
        return number.value, fd.value

    def buffer_drop(self, client: int, number: int) -> None:
        """Give a buffer back; returns when no operation uses it any more."""
        self._call("buffer_drop", client, number)

    # RPC

    def port_open(self, client: int, port: int, max_message: int) -> None:
        """The client receives what is sent to `port` of this node. PORT_TAKEN, BAD_ARGUMENT (port, size)."""
        self._call("port_open", client, port, max_message)

    def port_close(self, client: int, port: int) -> None:
        """Waiting receives end CANCELLED, callers get PORT_CLOSED."""
        self._call("port_close", client, port)

    def ring_offer(self, node: int, incarnation: int, port: int) -> Ring:
        """Server's side of a bind: the ring for messages from `node` to `port`. PORT_CLOSED, NODE_DEAD, NO_MEMORY."""
        out = abi.Ring()
        self._call("ring_offer", node, incarnation, port, ctypes.byref(out))
        return Ring(out.address, out.rkey, out.size, out.max_message, out.generation, out.lost)

    def ring_attach(self, node: int, incarnation: int, port: int, ring: Ring) -> None:
        """Client's side: the ring that `node` offered for `port`; what waits for it goes on, but who has lost a
        one-way message in a ring before gets PORT_CLOSED for the next."""
        native = abi.Ring(ring.address, ring.size, ring.max_message, ring.lost, ring.rkey, ring.generation)
        self._call("ring_attach", node, incarnation, port, ctypes.byref(native))

    def ring_refuse(self, node: int, incarnation: int, port: int, code: int) -> None:
        """There will be no ring: what waits for it ends with `code`. The next CALL asks again."""
        self._call("ring_refuse", node, incarnation, port, code)

    # Operations of the tier itself: on raw addresses, with the caller's memory, one at a time per calling thread

    def _raw(self, op: int, place: tuple[int, int, int], data: Any, length: int, arg0: int = 0, arg1: int = 0) -> int:
        node, address, rkey = place
        value = ctypes.c_uint64()
        self._call("raw", op, node, address, rkey, data, length, arg0, arg1, ctypes.byref(value))
        return value.value

    def read(self, node: int, address: int, rkey: int, length: int) -> bytearray:
        """Bytes of a node's registered memory. NODE_DEAD, NODE_UNREACHABLE."""
        data = bytearray(length)
        if length:
            self._raw(1, (node, address, rkey), (ctypes.c_char * length).from_buffer(data), length)
        return data

    def write(self, node: int, address: int, rkey: int, data: bytes | bytearray | memoryview) -> None:
        """Store bytes in a node's registered memory."""
        view = memoryview(data).cast("B")
        if len(view):
            source = view.tobytes() if view.readonly else (ctypes.c_char * len(view)).from_buffer(view)
            self._raw(2, (node, address, rkey), source, len(view))

    def read_into(self, node: int, address: int, rkey: int, target: int, length: int) -> None:
        """Copy from a node's registered memory to a slab of this node, such as a block that moves here."""
        self._check(target, length)
        self._raw(1, (node, address, rkey), target, length)

    def write_from(self, node: int, address: int, rkey: int, source: int, length: int) -> None:
        """Copy from a slab of this node to a node's registered memory, such as a memcpy whose target is elsewhere."""
        self._check(source, length)
        self._raw(2, (node, address, rkey), source, length)

    def fetch_add(self, node: int, address: int, rkey: int, addend: int) -> int:
        """The value before. BAD_ARGUMENT if the address is not divisible by 8."""
        return self._raw(3, (node, address, rkey), None, 8, addend & (1 << 64) - 1)

    def cas(self, node: int, address: int, rkey: int, guess: int, value: int) -> int:
        """Store `value` if `guess` is there; the value before."""
        return self._raw(4, (node, address, rkey), None, 8, guess, value)

    # The rest

    def qos_set(self, mode: QosMode) -> None:
        """none; hw_sep: low priority on queue pair 0, the others on the rest; sw_pri: low priority makes way while
        there is, or was a moment ago, a high-priority operation."""
        self._call("qos_set", QOS_MODES.index(mode))

    def next_event(self, timeout: float) -> Event | None:
        """The next event, or None after `timeout` seconds."""
        out = abi.Event()
        try:
            self._call("next_event", int(timeout * 1000), ctypes.byref(out))
        except TimedOut:
            return None
        return Event(_EVENT_KINDS[out.kind], out.node, out.incarnation, out.port, out.client)

    def stats(self) -> dict[str, Any]:
        """Counters since the start and amounts now (names: `abi.COUNTERS`), and `peers`: node -> incarnation, state,
        queue_pairs, in_flight, waiting, bytes_out, bytes_in."""
        out = abi.Stats()
        self._call("stats", ctypes.byref(out))
        peers = {
            peer.node: {
                "incarnation": peer.incarnation,
                "state": abi.PEER_STATES[peer.state],
                "queue_pairs": peer.queue_pairs,
                "in_flight": peer.in_flight,
                "waiting": peer.waiting,
                "bytes_out": peer.bytes_out,
                "bytes_in": peer.bytes_in,
            }
            for peer in out.peers[: out.n_peers]
        }
        return {**{name: int(getattr(out, name)) for name in abi.COUNTERS}, "peers": peers}
