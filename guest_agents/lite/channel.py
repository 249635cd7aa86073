"""A thread's data channel to the LITE core of its blade: requests go out, replies come back in any order.

Data up to `wire.INLINE` bytes travel in the packet. Of larger data only the address is said, and the core copies from
or to this process's memory; if the address is in a registered buffer, RDMA goes straight to it.
"""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Callable
from threading import get_ident
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from guest_agents.lite import wire
from guest_agents.lite.errors import BadArgument, BadMessage, LiteError, NotJoined, TimedOut, error_for

if TYPE_CHECKING:
    from typing_extensions import Buffer as Data

    from guest_agents.lite.memory import Pinned

T = TypeVar("T")

_HEADER = wire.REPLY.size
_INLINE_DATA, _INLINE_REPLY = int(wire.Flag.INLINE_DATA), int(wire.Flag.INLINE_REPLY)
_CANCEL = int(wire.Op.CANCEL)

Regions = list[tuple[int, int, int]]
"""Registered buffers of this process: first address, address after the last, id."""


class Ticket(Generic[T]):
    """An operation under way. `wait` in the thread that started it; buffers it uses must stay until then."""

    __slots__ = ("_channel", "_finish", "_inline", "_into", "_pins", "_reply", "_tag")

    def __init__(self, channel: Channel, finish: Callable[[Ticket[T]], T]) -> None:
        self._channel = channel
        self._finish = finish
        self._tag = 0
        self._into: memoryview | bytearray | None = None
        self._pins: tuple[Pinned, ...] = ()
        self._inline = b""
        self._reply: wire.Reply | None = None

    @property
    def done(self) -> bool:
        """Whether `wait` would return (or raise) at once."""
        if self._reply is None:
            self._channel.take_what_came()
        return self._reply is not None

    def wait(self, timeout: float | None = None) -> T:
        """The operation's result (LT_wait); its error is raised.

        TimedOut after `timeout` seconds: the operation goes on, and can be waited for again.
        """
        if self._reply is None:
            self._channel.receive_until(self, timeout)
        reply = self.reply
        if reply.status:
            self._channel.forget_failure(self)
            raise error_for(reply.status)
        return self._finish(self)

    @property
    def reply(self) -> wire.Reply:
        """The core's answer to an operation that has ended."""
        assert self._reply is not None
        return self._reply

    def data(self) -> bytes:
        """The bytes that came back, of an operation that was given no place for them."""
        if self._into is None:
            return self._inline
        return bytes(memoryview(self._into)[: self.reply.length])

    def _settle(self, reply: wire.Reply, packet: memoryview) -> None:
        if len(packet):
            if self._into is not None:
                self._into[: len(packet)] = packet
            else:
                self._inline = bytes(packet)
        self._release()
        self._reply = reply

    def _release(self) -> None:
        for pin in self._pins:
            pin.release()
        self._pins = ()


class Channel:
    """The data channel of one thread."""

    def __init__(self, connected: socket.socket, regions: Regions) -> None:
        """`regions` is shared with whoever adds and drops registered buffers."""
        self._socket = connected
        self._regions = regions
        self._thread = get_ident()
        self._pending: dict[int, Ticket[Any]] = {}
        self._failed: list[Ticket[Any]] = []  # ended with an error while nobody waited
        self._packet = memoryview(bytearray(_HEADER + wire.INLINE))
        self._tag = 0

    def start(
        self,
        op: int,
        finish: Callable[[Ticket[T]], T],
        *,
        handle: int = 0,
        offset: int = 0,
        length: int = 0,
        arg0: int = 0,
        arg1: int = 0,
        segments: bytes = b"",
        out: Data | None = None,
        into: Data | None = None,
        room: int = 0,
        flags: int = 0,
        priority: int = 0,
        timeout_ms: int = 0,
    ) -> Ticket[T]:
        """Send a request.

        out -- outgoing data, `length` bytes
        into -- where incoming data go; without it `Ticket.data` has them
        room -- the most bytes that can come in
        finish -- makes the result from the ticket
        """
        ticket = Ticket(self, finish)
        address = buffer = 0
        packet: list[Data] = [b"", segments] if segments else [b""]
        if out is not None:
            if length + len(segments) <= wire.INLINE:
                flags |= _INLINE_DATA
                packet.append(out)
            else:
                address, buffer = self._place(ticket, out, length, writable=False, buffers=not room)
        if room:
            if into is None and room > wire.INLINE:
                into = bytearray(room)
            if room <= wire.INLINE:
                flags |= _INLINE_REPLY
                if into is not None:
                    ticket._into = memoryview(into).cast("B")
            else:
                place, buffer = self._place(ticket, into, room, writable=True, buffers=out is None)
                if out is None:
                    address = place
                else:
                    offset = place
                if isinstance(into, bytearray):
                    ticket._into = into
        while len(self._pending) >= wire.WINDOW - 1 and op != _CANCEL:
            self._receive()
        self._tag = tag = (self._tag + 1) & 0xFFFFFFFF
        ticket._tag = tag
        try:
            packet[0] = wire.REQUEST.pack(
                op, priority, flags, tag, handle, offset, length, arg0, arg1, address, buffer, timeout_ms
            )
        except struct.error as wrong:
            ticket._release()
            raise BadArgument(f"a number is negative or too large: {wrong}") from None
        self._pending[tag] = ticket
        try:
            self._socket.sendmsg(packet)
        except BaseException as failure:
            del self._pending[tag]
            ticket._release()
            if isinstance(failure, OSError):
                raise _gone(failure) from failure
            raise
        return ticket

    def run(self, op: int, finish: Callable[[Ticket[T]], T], **fields: Any) -> T:
        """Send a request and wait for its result. If the wait is interrupted, the request is cancelled."""
        ticket = self.start(op, finish, **fields)
        try:
            return ticket.wait()
        except LiteError:
            raise
        except BaseException:
            self.cancel(ticket)
            raise

    def cancel(self, ticket: Ticket[Any]) -> None:
        """End an operation that waits; returns when it has ended, as it had or as Cancelled."""
        if ticket._reply is None:
            self.start(_CANCEL, nothing, arg0=ticket._tag).wait()
            self.receive_until(ticket, None)
            self.forget_failure(ticket)

    def fence(self) -> None:
        """Wait for all that is under way; raises the error of the first that failed and was not waited for."""
        while self._pending:
            self._receive()
        failed, self._failed = self._failed, []
        if failed:
            failed[0].wait()

    def forget_failure(self, ticket: Ticket[Any]) -> None:
        """Someone has been told that this operation failed: `fence` need not say it."""
        if ticket in self._failed:
            self._failed.remove(ticket)

    def receive_until(self, ticket: Ticket[Any], timeout: float | None) -> None:
        """Take replies until `ticket` has its own. TimedOut after `timeout` seconds."""
        if get_ident() != self._thread:
            raise BadArgument("a ticket can only be waited for in the thread that started its operation")
        if timeout is not None:
            poll = select.poll()
            poll.register(self._socket, select.POLLIN)
        while ticket._reply is None:
            if timeout is not None and not poll.poll(timeout * 1000):
                raise TimedOut(f"the operation goes on after {timeout:g} s")
            self._receive()

    def take_what_came(self) -> None:
        """Take the replies that are here, without waiting."""
        while self._pending and self._receive(socket.MSG_DONTWAIT):
            pass

    def close(self) -> None:
        """End what waits, let what is on the fabric end, and close: after this nobody writes to our memory."""
        self._thread = get_ident()  # the garbage collector may run this for a thread that has ended
        try:
            for ticket in list(self._pending.values()):
                self.cancel(ticket)
        except LiteError:
            pass  # the agent has gone, and with it whoever could
        finally:
            self.abandon()

    def interrupt(self) -> None:
        """From another thread: whoever waits in this channel gets NotJoined."""
        self._socket.shutdown(socket.SHUT_RDWR)

    def abandon(self) -> None:
        """Close without a word."""
        for ticket in self._pending.values():
            ticket._release()
        self._pending.clear()
        self._socket.close()

    def _receive(self, how: int = 0) -> bool:
        """Take one reply; False if there is none (only with MSG_DONTWAIT)."""
        try:
            got = self._socket.recv_into(self._packet, 0, how)
        except BlockingIOError:
            return False
        except OSError as failure:
            raise _gone(failure) from failure
        if not got:
            raise _gone(None)
        try:
            reply = wire.Reply(*wire.REPLY.unpack_from(self._packet))
            ticket = self._pending.pop(reply.tag)
        except (struct.error, KeyError):
            raise BadMessage("the core answered what was not asked") from None
        ticket._settle(reply, self._packet[_HEADER:got])
        if reply.status:
            self._failed.append(ticket)
        return True

    def _place(
        self, ticket: Ticket[Any], data: Data | None, length: int, *, writable: bool, buffers: bool
    ) -> tuple[int, int]:
        """Where `data` lie: (address, 0), or (offset, id) in a registered buffer; they stay there for the ticket."""
        from guest_agents.lite.memory import Pinned

        assert data is not None
        pin = Pinned(data, writable=writable)
        ticket._pins = (*ticket._pins, pin)
        if buffers:
            for first, end, number in self._regions:
                if first <= pin.address and pin.address + length <= end:
                    return pin.address - first, number
        return pin.address, 0


def milliseconds(timeout: float | None) -> int:
    """A time in seconds as the wire has it; None is the core's default (for `receive`: no limit)."""
    if timeout is None:
        return 0
    if timeout < 0:
        raise BadArgument(f"a timeout of {timeout:g} s")
    return min(max(1, round(timeout * 1000)), wire.NO_LIMIT) if timeout < wire.NO_LIMIT / 1000 else wire.NO_LIMIT


def nothing(_ticket: Ticket[None]) -> None:
    """The result of an operation that has none."""


def _gone(failure: BaseException | None) -> LiteError:
    reason = f": {failure}" if failure else ""
    return NotJoined(
        f"the agent has closed the data channel{reason}", hint="it was restarted or has died; connect again"
    )
