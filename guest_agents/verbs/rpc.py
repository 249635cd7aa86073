"""Requests and replies between two agents over one RC connection: SEND into posted receive buffers.

A stand-in for LITE's RPC (WRITE-with-immediate into rings), which a later issue builds behind the same two calls:
`Client.call(opcode, header, *parts)` and a service's `handle(opcode, request, reply)`.

Both sides register `SLOTS` buffers. A client has at most SLOTS requests out, each in a slot of its own; the slot's
number travels in the message, and the reply comes back into a receive buffer of any number. So a receive is always
posted, and receiver-not-ready cannot happen.

Answers are waited for by the callers themselves: one of them, the leader, reads what comes for all. A thread of its own
for that would be one more to wake for each answer, and without KVM a wake-up costs a tenth of a millisecond.

Message: u32 opcode (request) or errno (reply), u32 slot, u32 length, u32 length of the second part; then the bytes.
"""

from __future__ import annotations

import logging
import queue
import struct
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from guest_agents import control
from guest_agents.budget import Budget
from guest_agents.verbs.arena import LOCAL, Arena
from guest_agents.verbs.completion import Completions, check
from guest_agents.verbs.connection import Connection, address_of
from guest_agents.verbs.device import Device, VerbsError
from guest_agents.verbs.lost import LostError
from guest_agents.verbs.node import Accepted, Node

log = logging.getLogger("rackless.rpc")

SLOTS = 4
DATA_BYTES = 1 << 20
"""Most bytes of bulk data in one message."""
HEADER_BYTES = 8 << 10
"""Most bytes of the first part (names and numbers)."""
_HEADER = struct.Struct("<IIII")
_SLOT_BYTES = DATA_BYTES + HEADER_BYTES + 4096
_SEND = 1 << 32
"""Flag in wr_id: a SEND, not a receive."""


class RpcError(OSError):
    """The other side answered with an errno."""


class Channel:
    """The buffers of one side, on one connection: half for what comes, half for what goes."""

    def __init__(self, device: Device, completions: Completions | None = None) -> None:
        self.completions = completions or Completions(device, depth=8 * SLOTS, solicited=True)
        self.connection = Connection(device, self.completions, depth=4 * SLOTS)
        self._arena = Arena(device, 2 * SLOTS * _SLOT_BYTES, LOCAL)
        self._sent = 0

    def listen(self) -> None:
        """Post every receive buffer."""
        for index in range(SLOTS):
            self.repost(index)

    def repost(self, index: int) -> None:
        """Offer receive buffer `index` again: what it holds is forgotten."""
        offset = index * _SLOT_BYTES
        self.connection.post_receive(index, self._arena.address + offset, _SLOT_BYTES, self._arena.lkey)

    def received(self, index: int) -> tuple[int, int, memoryview, memoryview]:
        """Code, slot, first and second part of the message in receive buffer `index`."""
        view = self._arena.view[index * _SLOT_BYTES : (index + 1) * _SLOT_BYTES]
        code, slot, first, second = _HEADER.unpack_from(view)
        if first > HEADER_BYTES or second > DATA_BYTES or slot >= SLOTS:
            raise VerbsError(f"malformed message: lengths {first} and {second}, slot {slot}")
        start = _HEADER.size + first
        return code, slot, view[_HEADER.size : start], view[start : start + second]

    def outgoing(self, slot: int) -> memoryview:
        """Send buffer `slot`, after its header."""
        base = (SLOTS + slot) * _SLOT_BYTES
        return self._arena.view[base + _HEADER.size : base + _SLOT_BYTES]

    def send(self, slot: int, code: int, first: int, second: int) -> None:
        """Send what lies in `outgoing(slot)`: `first` then `second` bytes."""
        offset = (SLOTS + slot) * _SLOT_BYTES
        _HEADER.pack_into(self._arena.view, offset, code, slot, first, second)
        length = _HEADER.size + first + second
        self._sent += 1
        self.connection.post_send(
            _SEND | slot,
            self._arena.address + offset,
            length,
            self._arena.lkey,
            solicited=True,
            signaled=self._sent % SLOTS == 0,  # each completion costs, and the answer tells as much
        )

    def close(self) -> None:
        """Release everything."""
        self.connection.close()
        self._arena.close()
        self.completions.close()


Handle = Callable[[int, memoryview, memoryview, memoryview], tuple[int, int]]
"""(opcode, first part, second part, buffer for the reply) -> lengths of the reply's two parts.
Raise OSError to answer with its errno."""


CHANNEL_BYTES = 2 * SLOTS * _SLOT_BYTES
"""What each side of a connection registers."""


def offer(
    node: Node, service: str, handle: Handle, slow: Collection[int] = (), workers: int = SLOTS,
    account: tuple[Budget, str] | None = None,
) -> None:  # fmt: skip
    """Serve `handle` to whoever connects to `service`: one thread per connection.

    slow -- opcodes that may take long: others do not wait for these
    workers -- threads for those, of all connections
    account -- what connections register is taken from that budget, for that user; else it is not accounted for
    """
    aside = ThreadPoolExecutor(workers, f"rpc {service} slow")

    def prepare(accepted: Accepted, device: Device) -> None:
        if account is not None:
            budget, user = account
            if not budget.take(user, CHANNEL_BYTES):
                raise control.ControlError(f"no memory for a connection of {service}", "add a memory blade")
            accepted.on_close.append(lambda: budget.give(user, CHANNEL_BYTES))
        channel = Channel(device)
        accepted.connection.close()  # the node's own has no receive buffers
        accepted.connection = channel.connection
        channel.listen()

        def answer(index: int) -> None:
            if channel.received(index)[0] in slow:
                aside.submit(_answer, channel, handle, index)
            else:
                _answer(channel, handle, index)

        stopped = threading.Event()
        worker = threading.Thread(
            target=_serve, args=(channel, answer, stopped, accepted.client), name=f"rpc {service}", daemon=True
        )
        accepted.on_close.append(stopped.set)
        worker.start()
        accepted.offer.update(slots=SLOTS, slot_size=_SLOT_BYTES)

    node.services[service] = prepare


def _serve(channel: Channel, answer: Callable[[int], None], stopped: threading.Event, client: str) -> None:
    try:
        while not stopped.is_set():
            for entry in channel.completions.wait(timeout=1.0):
                if stopped.is_set():
                    return
                check(entry, client)
                if not entry.wr_id & _SEND:
                    answer(int(entry.wr_id))
    except Exception as failure:
        if not stopped.is_set():
            log.warning("connection of %s ended: %s", client, failure)


def _answer(channel: Channel, handle: Handle, index: int) -> None:
    opcode, slot, first, second = channel.received(index)
    try:
        code, (length, more) = 0, handle(opcode, first, second, channel.outgoing(slot))
    except OSError as failure:
        code, length, more = failure.errno or 5, 0, 0
    except Exception:
        log.exception("request %d failed", opcode)
        code, length, more = 5, 0, 0  # EIO
    channel.repost(index)
    channel.send(slot, code, length, more)


class Client:
    """The asking side; any number of threads may call at once.

    Every call ends within `timeout` seconds of getting a slot: a blade that is gone is a LostError, never a hang.
    After that the connection is made again by the next call.
    """

    def __init__(
        self, node: Node, service: str, connect: Callable[[], control.ControlClient], timeout: float = 20.0
    ) -> None:
        self._node = node
        self._service = service
        self._connect = connect
        self._timeout = timeout
        self._lock = threading.Lock()
        self._link: _Link | None = None

    def call(
        self, opcode: int, first: bytes, second: bytes | memoryview = b"", into: Callable[..., Any] | None = None
    ) -> Any:
        """Ask and wait. Returns `into(first part, second part)` of the reply (both views into its buffer, valid
        only during the call of `into`), or None; RpcError if the other side says so, LostError if it says nothing."""
        link = self._ready()
        try:
            return link.call(opcode, first, second, into)
        except VerbsError as failure:
            log.warning("%s: %s", self._service, failure)
            with self._lock:
                if self._link is link:
                    self._link = None
            link.close()
            raise LostError(str(failure), sent=True) from failure

    def _ready(self) -> _Link:
        with self._lock:
            if self._link is None:
                try:
                    self._link = _Link(self._node, self._service, self._connect(), self._timeout)
                except (control.ControlError, VerbsError) as failure:
                    log.warning("no connection to %s: %s", self._service, failure)
                    raise LostError(str(failure), sent=False) from failure
            return self._link


_LEAD = -1
"""Instead of an answer: read yourself, the leader has got its own."""


class _Link:
    """One connection's life."""

    def __init__(self, node: Node, service: str, peer: control.ControlClient, timeout: float) -> None:
        self._peer = peer
        self._timeout = timeout
        self._where = peer.address[0]
        self._channel = Channel(node.device)
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._replies: list[queue.SimpleQueue[int | None]] = [queue.SimpleQueue() for _ in range(SLOTS)]
        self._lock = threading.Lock()
        self._waiting: set[int] = set()
        self._leader: int | None = None
        self._closed = False
        self._channel.listen()
        reply = peer.call(
            "verbs.accept", service=service, client=str(node.device.gid), **node.introduction(),
            **self._channel.connection.address.fields(),
        )
        self._channel.connection.connect(address_of(reply))
        for slot in range(SLOTS):
            self._free.put(slot)

    def call(self, opcode: int, first: bytes, second: bytes | memoryview, into: Callable[..., Any] | None) -> Any:
        try:
            slot = self._free.get(timeout=self._timeout)
        except queue.Empty:
            raise VerbsError(f"{self._where} does not answer") from None
        buffer = self._channel.outgoing(slot)
        length, more = len(first), len(second)
        buffer[:length] = first
        buffer[length : length + more] = second
        self._channel.send(slot, opcode, length, more)
        index = self._answer(slot)
        if index is None:
            raise VerbsError(f"the connection to {self._where} is lost")
        try:
            code, _, head, data = self._channel.received(index)
            if code:
                raise RpcError(code, "")
            return into(head, data) if into else None
        finally:
            self._channel.repost(index)
            self._free.put(slot)

    def _answer(self, slot: int) -> int | None:
        """The receive buffer with the answer to `slot`; None if the connection is lost."""
        deadline = time.monotonic() + self._timeout
        mine = self._replies[slot]
        with self._lock:
            self._waiting.add(slot)
            if self._leader is None:
                self._leader = slot
                mine.put(_LEAD)
        try:
            while True:
                index = mine.get(timeout=max(0.0, deadline - time.monotonic()))
                if index != _LEAD:
                    return index
                if self._leader == slot:  # and not a word for the last call of this slot, answered meanwhile
                    self._lead(mine, deadline)
        except queue.Empty:
            raise VerbsError(f"{self._where} has not answered for {self._timeout:g} s") from None
        finally:
            with self._lock:
                self._waiting.discard(slot)
                if self._leader == slot:
                    self._leader = next(iter(self._waiting), None)
                    if self._leader is not None:
                        self._replies[self._leader].put(_LEAD)

    def _lead(self, mine: queue.SimpleQueue[int | None], deadline: float) -> None:
        """Hand out what comes until there is something in `mine`."""
        while mine.empty() and not self._closed:
            entries = self._channel.completions.wait(timeout=max(0.0, deadline - time.monotonic()))
            if not entries:
                return
            for entry in entries:
                check(entry, self._where)
                if not entry.wr_id & _SEND:
                    index = int(entry.wr_id)
                    self._replies[self._channel.received(index)[1]].put(index)

    def close(self) -> None:
        """Wake whoever waits; the queue pair goes with the last reference, as the leader may be using it."""
        self._closed = True
        self._peer.close()
        for waiting in self._replies:
            waiting.put(None)
