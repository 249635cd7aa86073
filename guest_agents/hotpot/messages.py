"""Messages between the Hotpot services of blades, over two ports of LITE.

A message is a JSON header and bytes: 4 bytes of the header's length, the header, the rest. `PORT` serves whoever asks
something that may need others in turn; `LEAF` serves what needs nobody, so no circle of services waits for itself.
"""

from __future__ import annotations

import json
import logging
import struct
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from guest_agents import lite
from guest_agents.hotpot import steps
from guest_agents.hotpot.errors import BadArgument, HotpotError, NodeLost, NoSpace, TooLarge, from_reply

PORT, LEAF = 60, 61
MAX_MESSAGE = 1 << 20
"""Bytes of a message, header and all."""
MAX_REPLY = 256 << 10
_LENGTH = struct.Struct("<I")
_THREADS = {PORT: 8, LEAF: 4}

Message = dict[str, Any]
Handler = Callable[[int, Message, memoryview], Message]
"""Gets the asking node's id, the header and the bytes; returns the reply's header."""

Call = tuple[int, str, Message, bytes]
"""Node, operation, header, bytes."""
Ticket = lite.Ticket[bytes]

log = logging.getLogger("rackless.hotpot")


def pack(header: Message, payload: bytes = b"") -> bytes:
    """Header and bytes as one message."""
    text = json.dumps(header, separators=(",", ":")).encode()
    return _LENGTH.pack(len(text)) + text + payload


def unpack(message: bytes) -> tuple[Message, memoryview]:
    """The header and the bytes. BadArgument when it is none of our messages."""
    try:
        end = _LENGTH.size + _LENGTH.unpack_from(message)[0]
        header = json.loads(message[_LENGTH.size : end])
    except (struct.error, ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise BadArgument("a message that is not Hotpot's")
    return header, memoryview(message)[end:]


def guard(handler: Callable[[], Message]) -> Message:
    """The handler's reply; its errors, also unforeseen ones, as a reply."""
    try:
        return handler()
    except HotpotError as failure:
        return failure.reply()
    except lite.NoMemory as failure:
        return NoSpace(failure.message).reply()
    except lite.LiteError as failure:
        return NodeLost(str(failure)).reply()
    except KeyError as missing:
        log.exception("a request")
        return BadArgument(f"field {missing} is missing").reply()
    except Exception as failure:  # a bug here must not look like success there
        log.exception("a request")
        return HotpotError(f"{type(failure).__name__}: {failure}").reply()


def _lost(node: int, failure: lite.LiteError) -> NodeLost:
    lost = NodeLost(f"node {node}: {failure}")
    lost.__cause__ = failure
    return lost


def has_no_service(answer: Message | HotpotError) -> bool:
    """Whether a node has not answered because there is no Hotpot on it now: nobody there has anything open."""
    return isinstance(answer, NodeLost) and isinstance(answer.__cause__, lite.PortClosed)


class Links:
    """To the services of all nodes, this one included.

    handlers -- by port, then by operation; set before `start`
    """

    def __init__(self, node: lite.Node) -> None:
        self.node = node
        self.handlers: dict[int, Mapping[str, Handler]] = {PORT: {}, LEAF: {}}
        self._ports: list[lite.Port] = []
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Serve. lite.PortTaken when somebody else has our ports."""
        for number, threads in _THREADS.items():
            port = self.node.register(number, MAX_MESSAGE)
            self._ports.append(port)
            thread = threading.Thread(target=self._serve, args=(port, threads), name=f"hotpot {number}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def close(self) -> None:
        """Stop serving."""
        for port in self._ports:
            port.close()
        for thread in self._threads:
            thread.join()

    def call(
        self, node: int, op: str, header: Message | None = None, payload: bytes = b"", port: int = PORT
    ) -> Message:
        """Ask a node; the reply's header. What it answers as an error is raised; NodeLost, TooLarge."""
        [reply] = self.call_all([(node, op, header or {}, payload)], port)
        if isinstance(reply, HotpotError):
            raise reply
        return reply

    def call_all(self, calls: Iterable[Call], port: int = PORT) -> list[Message | HotpotError]:
        """Several at once; for each its reply, or what went wrong. What this node asks itself runs in this thread."""
        started = [(call, self._start(*call, port)) for call in calls]
        return [self._finish(call, ticket, port) for call, ticket in started]

    def _start(self, node: int, op: str, header: Message, payload: bytes, port: int) -> Ticket | HotpotError | None:
        if node == self.node.node_id:
            return None
        message = pack({"op": op, **header}, payload)
        if len(message) > MAX_MESSAGE:
            return TooLarge(f"{len(message)} bytes for one node, at most {MAX_MESSAGE} go in a message")
        steps.at("send", op)
        try:
            return self.node.call_async(node, port, message, max_reply=MAX_REPLY)
        except lite.LiteError as failure:
            return _lost(node, failure)

    def _finish(self, call: Call, ticket: Ticket | HotpotError | None, port: int) -> Message | HotpotError:
        node, op, header, payload = call
        if isinstance(ticket, HotpotError):
            return ticket
        if ticket is None:
            reply = self._dispatch(port, node, {"op": op, **header}, memoryview(payload))
        else:
            try:
                reply, _ = unpack(ticket.wait())
                steps.at("sent", op)
            except lite.LiteError as failure:
                return _lost(node, failure)
        return from_reply(reply) if "error" in reply else reply

    def living(self) -> set[int]:
        """Nodes that LITE takes for alive."""
        return {member.node_id for member in self.node.nodes() if member.alive}

    def _serve(self, port: lite.Port, threads: int) -> None:
        try:
            port.serve(self._handle, threads)
        except lite.LiteError as failure:
            log.error("Hotpot does not serve port %d any more: %s", port.number, failure)

    def _handle(self, request: lite.Request) -> bytes:
        def answer() -> Message:
            header, payload = unpack(request.data)
            op = str(header.get("op"))
            steps.at("serve", op)
            reply = self._dispatch(request.port.number, request.source, header, payload)
            steps.at("served", op)
            return reply

        return pack(guard(answer))

    def _dispatch(self, port: int, source: int, header: Message, payload: memoryview) -> Message:
        handler = self.handlers[port].get(header.get("op", ""))
        if handler is None:
            return BadArgument(f"unknown operation {header.get('op')!r}").reply()
        return guard(lambda: handler(source, header, payload))
