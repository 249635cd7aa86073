"""Requests between the tiers of LITE, over the control channels of their agents.

A request names the life it is meant for: an agent that has begun another since answers NODE_DEAD. Connections are kept
open, and each carries one request at a time, so as many are made as are needed at once. When a node is declared dead
the requests that wait for it end at once.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import closing, suppress

from guest_agents import control
from guest_agents.control import Handler, Message
from guest_agents.lite.errors import LiteError, NodeDead, NodeUnreachable, error_for
from guest_agents.membership import Life

_IDLE_MOST = 2
_SECONDS = 30.0
_NEWS_SECONDS, _NEWS_TRIES = 0.1, 30


class Links:
    """To all nodes of the rack.

    own -- this blade's present life; its requests to itself are handled on the spot
    address_of -- where a life's agent listens, None if it is not (or no longer) a member
    """

    def __init__(
        self,
        secret: bytes,
        own: Callable[[], Life | None],
        address_of: Callable[[Life], tuple[str, int] | None],
        seconds: float = _SECONDS,
    ) -> None:
        self._secret = secret
        self._own = own
        self._address_of = address_of
        self._seconds = seconds
        self._idle: dict[Life, list[control.ControlClient]] = defaultdict(list)
        self._busy: dict[Life, set[control.ControlClient]] = defaultdict(set)
        self._opening: dict[Life, set[socket.socket]] = defaultdict(set)
        """Sockets of connections that are being made."""
        self._dead: dict[int, int] = {}
        self._lock = threading.Lock()
        self.handlers: Mapping[str, Handler] = {}

    def call(self, life: Life, op: str, timeout: float | None = None, /, **fields: object) -> Message:
        """One request to the tier of that life; returns the reply's fields.

        NODE_DEAD when that life is over, NODE_UNREACHABLE when it does not answer (in `timeout` seconds) though it is
        not known to be dead; else the error the tier answered.
        """
        request = {"meant_for": [life.node, life.incarnation], **fields}
        if life == self._own():
            reply = control.dispatch(self.handlers, {"op": op, **request})
            if not reply.pop("ok"):
                raise error_for(reply.get("code", LiteError.code), reply["error"], hint=reply["hint"])
            return reply
        client = self._take(life)
        try:
            reply = client.call(op, self._seconds if timeout is None else timeout, **request)
        except control.LostError as failure:
            client.close()
            raise self._lost(life, failure) from None
        except control.ControlError as failure:
            raise error_for(LiteError.code if failure.code is None else failure.code, failure.error,
                            hint=failure.hint) from None  # fmt: skip
        else:
            return reply
        finally:
            self._put_back(life, client)

    def is_over(self, life: Life) -> bool:
        """Whether that life is known to be over."""
        return life.incarnation <= self._dead.get(life.node, 0)

    def end(self, node: int, incarnation: int) -> None:
        """That life and earlier ones are over: requests to them end."""
        with self._lock:
            if incarnation <= self._dead.get(node, 0):
                return
            self._dead[node] = incarnation
            for life in [life for life in self._idle if self.is_over(life)]:
                for client in self._idle.pop(life):
                    client.close()
            for life in [life for life in self._busy if self.is_over(life)]:
                for client in self._busy[life]:
                    client.abort()
            for life in [life for life in self._opening if self.is_over(life)]:
                for guard in self._opening[life]:
                    with suppress(OSError):
                        guard.shutdown(socket.SHUT_RDWR)

    def _take(self, life: Life) -> control.ControlClient:
        while True:
            with self._lock:
                if self.is_over(life):
                    raise _dead(life)
                if not self._idle[life]:
                    break
                client = self._idle[life].pop()
                if not client.stale():
                    self._busy[life].add(client)
                    return client
                client.close()
        address = self._find(life)
        try:
            client = self._open(life, address)
        except control.ControlError as failure:
            raise self._lost(life, failure) from None
        with self._lock:
            self._busy[life].add(client)
            if self.is_over(life):
                client.abort()
        return client

    def _open(self, life: Life, address: tuple[str, int]) -> control.ControlClient:
        """A new connection. A blade without power does not refuse it: the attempt, too, ends when that life does."""
        with closing(socket.socket()) as plain, closing(plain.dup()) as guard:

            def connect(where: tuple[str, int], seconds: float) -> socket.socket:
                plain.settimeout(seconds)
                plain.connect(where)
                return plain

            with self._lock:
                if self.is_over(life):
                    raise _dead(life)
                self._opening[life].add(guard)
            try:
                return control.ControlClient(address, self._secret, self._seconds, connect)
            finally:
                with self._lock:
                    self._opening[life].discard(guard)
                    if not self._opening[life]:
                        del self._opening[life]

    def _find(self, life: Life) -> tuple[str, int]:
        """Its address; news of a member may come a moment after the first request that has to do with it."""
        for _ in range(_NEWS_TRIES):
            if self.is_over(life):
                raise _dead(life)
            address = self._address_of(life)
            if address is not None:
                return address
            time.sleep(_NEWS_SECONDS)
        raise NodeUnreachable(f"node {life.node} (incarnation {life.incarnation}) is not a member as far as known here")

    def _put_back(self, life: Life, client: control.ControlClient) -> None:
        with self._lock:
            self._busy[life].discard(client)
            if not self._busy[life]:
                del self._busy[life]
            if client.stale() or self.is_over(life) or len(self._idle[life]) >= _IDLE_MOST:
                client.close()
            else:
                self._idle[life].append(client)

    def _lost(self, life: Life, failure: control.ControlError) -> LiteError:
        if self.is_over(life):
            return _dead(life)
        return NodeUnreachable(failure.error, hint="it may be declared dead soon")


def _dead(life: Life) -> NodeDead:
    return NodeDead(f"node {life.node} (incarnation {life.incarnation}) is dead")


def guarded(own: Callable[[], Life | None], handlers: Mapping[str, Handler]) -> dict[str, Handler]:
    """Handlers that answer only requests meant for this life, and name LITE's errors."""

    def guard(handler: Handler) -> Handler:
        def handle(request: Message) -> Message:
            try:
                life = own()
                if life is None or request["meant_for"] != [life.node, life.incarnation]:
                    raise NodeDead(f"this is {life}, not {request['meant_for']}")
                return handler(request)
            except LiteError as failure:
                return failure.reply()

        return handle

    return {op: guard(handler) for op, handler in handlers.items()}
