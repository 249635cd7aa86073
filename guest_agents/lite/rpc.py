"""Serving calls: a port, and the requests that come to it. Calling is `Node.call`, `send` and `multicast`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING

from guest_agents.lite import wire
from guest_agents.lite.channel import Ticket, milliseconds, nothing
from guest_agents.lite.errors import BadArgument, Cancelled, LiteError, NotJoined, PortClosed

if TYPE_CHECKING:
    from typing_extensions import Buffer as Data

    from guest_agents.lite.node import Node

_RECEIVE, _REPLY, _REPLY_RECEIVE = int(wire.Op.RECEIVE), int(wire.Op.REPLY), int(wire.Op.REPLY_RECEIVE)
_NO_WAIT = int(wire.Flag.NO_WAIT)

DEFAULT_MESSAGE = 64 << 10
"""Bytes of the largest message of a port that does not say otherwise."""


class Request:
    """A message that came to a port."""

    __slots__ = ("data", "descriptor", "port", "source")

    def __init__(self, port: Port, data: bytes, source: int, descriptor: int) -> None:
        """Made by the port.

        source -- node id of the sender
        descriptor -- 0 if the sender expects no reply (`Node.send`)
        """
        self.port = port
        self.data = data
        self.source = source
        self.descriptor = descriptor

    def reply(self, data: Data = b"") -> None:
        """Answer (LT_replyRPC). NodeDead when the caller's node has died; a caller that gave up goes unnoticed."""
        self.port.run_reply(self, data)

    def reply_and_receive(self, data: Data = b"", timeout: float | None = None) -> Request:
        """Answer and wait for the port's next request with one crossing instead of two."""
        return self.port.run_reply_receive(self, data, timeout)


Handler = Callable[[Request], "Data | None"]
"""Gets a request and returns the reply; None if it has replied by itself, or later will."""


class Port:
    """A port of this node that this process serves; from `Node.register`."""

    def __init__(self, node: Node, number: int, max_message: int) -> None:
        """Made by the node once the agent has registered it."""
        self.node = node
        self.number = number
        self.max_message = max_message
        self._open = True

    def receive(self, timeout: float | None = None) -> Request:
        """The next message (LT_recvRPC). Any number of threads may do this at once; each message goes to one of them.

        timeout -- seconds, None for no limit, 0 not to wait; TimedOut is raised when it is over
        """
        no_wait = timeout == 0
        return self.node.connection().channel.run(
            _RECEIVE,
            self._request,
            arg0=self.number,
            arg1=self.max_message,
            room=self.max_message,
            flags=_NO_WAIT if no_wait else 0,
            timeout_ms=0 if no_wait else milliseconds(timeout),
            priority=self.node.priority,
        )

    def serve(self, handler: Handler, threads: int = 1) -> None:
        """Answer what comes, in `threads` threads besides this one's wait, until the port is closed.

        An exception in `handler` ends the service and is raised here.
        """
        if threads < 1:
            raise BadArgument(f"{threads} threads cannot serve a port")
        failures: list[BaseException] = []

        def work() -> None:
            try:
                self._pull(handler)
            except BaseException as failure:
                failures.append(failure)
                self.close()

        workers = [threading.Thread(target=work, name=f"port {self.number}") for _ in range(threads - 1)]
        for worker in workers:
            worker.start()
        try:
            self._pull(handler)
        finally:
            self.close()
            for worker in workers:
                worker.join()
        if failures:
            raise failures[0]

    def close(self) -> None:
        """Stop serving: callers get PortClosed, threads that wait in `receive` too."""
        if self._open:
            self._open = False
            with suppress(NotJoined):
                self.node.call_agent("unregister", port=self.number)

    def run_reply(self, request: Request, data: Data) -> None:
        """`Request.reply` is this."""
        self.node.connection().channel.run(
            _REPLY,
            nothing,
            handle=_descriptor(request),
            length=memoryview(data).nbytes,
            out=data,
            priority=self.node.priority,
        )

    def run_reply_receive(self, request: Request, data: Data, timeout: float | None) -> Request:
        """`Request.reply_and_receive` is this."""
        return self.node.connection().channel.run(
            _REPLY_RECEIVE,
            self._request,
            handle=_descriptor(request),
            arg0=self.number,
            arg1=self.max_message,
            length=memoryview(data).nbytes,
            out=data,
            room=self.max_message,
            timeout_ms=milliseconds(timeout),
            priority=self.node.priority,
        )

    def _request(self, ticket: Ticket[Request]) -> Request:
        return Request(self, ticket.data(), ticket.reply.value2, ticket.reply.value)

    def _pull(self, handler: Handler) -> None:
        """Receive, handle, reply; the reply and the next receive are one operation."""
        try:
            request = self.receive()
            while True:
                answer = handler(request)
                if answer is None or not request.descriptor:
                    request = self.receive()
                else:
                    request = self._answer_and_next(request, answer)
        except (PortClosed, Cancelled):
            if self._open:
                raise

    def _answer_and_next(self, request: Request, answer: Data) -> Request:
        try:
            return request.reply_and_receive(answer)
        except (PortClosed, Cancelled):
            raise
        except LiteError:
            # The caller is beyond reach (dead, or its room too small, which it has been told): not the service's end.
            return self.receive()

    def __enter__(self) -> Port:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _descriptor(request: Request) -> int:
    if not request.descriptor:
        raise BadArgument("this message was sent without waiting for a reply")
    return request.descriptor
