"""Programs on this blade: the control socket, who has connected, and what each holds.

A program may have many connections, one for each thread; the first makes it a client, the others join with its token
(from the same process only). When the last one closes, whatever the program held goes back.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from guest_agents.control import Message
from guest_agents.lite.errors import BadArgument, BadHandle, BadMessage, LiteError, NotJoined

MAX_REQUEST = 64 << 10
VOID = 0
"""The ticket of a handle from an earlier life of this blade."""

log = logging.getLogger("rackless.lite")


@dataclass
class Handle:
    """An open handle: the LMR, the directory's ticket for it, and what it allows."""

    lmr: int
    ticket: int
    permissions: int
    size: int
    alone: bool = False
    """The LMR has no name, so this is the only handle there can be."""


@dataclass
class Client:
    """A program."""

    number: int
    pid: int
    token: str
    connections: int = 0
    handles: dict[int, Handle] = field(default_factory=dict)
    locks: set[str] = field(default_factory=set)
    """Names it has used."""
    barriers: bool = False

    def handle(self, number: object) -> Handle:
        """One of its handles. BAD_HANDLE."""
        found = self.handles.get(number) if isinstance(number, int) else None
        if found is None:
            raise BadHandle
        return found


@dataclass
class Request:
    """A control request of a client, and the socket it came by."""

    client: Client
    program: socket.socket
    fields: Message

    def number(self, name: str, low: int = 0, high: int = 1 << 62, default: int | None = None) -> int:
        """An integer field. BAD_ARGUMENT."""
        value = self.fields.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise BadArgument(f"{name}: {value!r} is not a number of {low} to {high}")
        return value

    def text(self, name: str) -> str:
        """A field of 1 to 128 characters. BAD_ARGUMENT."""
        value = self.fields.get(name)
        if not isinstance(value, str) or not 0 < len(value) <= 128:
            raise BadArgument(f"{name}: {str(value)[:40]!r} is not a text of 1 to 128 characters")
        return value

    def seconds(self) -> float | None:
        """Its timeout; None: no limit."""
        milliseconds = self.number("timeout_ms", 0, 0xFFFFFFFF, 0)
        return None if milliseconds in (0, 0xFFFFFFFF) else milliseconds / 1000

    def handle(self, name: str = "handle") -> Handle:
        """The handle a field names. BAD_HANDLE."""
        return self.client.handle(self.fields.get(name))


Reply = Message | tuple[Message, *tuple[int, ...]]
"""Fields, and for some file descriptors, which are closed when they are sent."""
Action = Callable[[Request], Reply]


class Core(Protocol):
    """What of the core this needs."""

    def client_add(self, pid: int) -> int: ...

    def channel_add(self, client: int, fd: int, mailbox: bool = False) -> int | None: ...

    def client_remove(self, client: int) -> None: ...


class Clients:
    """The control socket at `path`, and all clients.

    actions -- what clients may ask for, by name
    greeting -- more fields for the reply to hello; raises NOT_JOINED while the blade has not joined
    gone -- called with each client that has ended, after the core has forgotten it
    """

    def __init__(
        self,
        core: Core,
        path: Path,
        actions: dict[str, Action],
        greeting: Callable[[], Message],
        gone: Callable[[Client], None],
    ) -> None:
        self._core = core
        self._actions = actions
        self._greeting = greeting
        self._gone = gone
        self._clients: dict[str, Client] = {}
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.bind(str(path))
        path.chmod(0o666)  # LITE is for all programs; what they may do, handles say
        self._socket.listen(64)

    def start(self) -> None:
        """Serve in the background."""
        threading.Thread(target=self._accept, name="lite", daemon=True).start()

    def close(self) -> None:
        """Stop accepting programs."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def all(self) -> list[Client]:
        """Everyone who is connected now."""
        with self._lock:
            return list(self._clients.values())

    def _accept(self) -> None:
        while True:
            try:
                program, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(program,), name="lite program", daemon=True).start()

    def _serve(self, program: socket.socket) -> None:
        client: Client | None = None
        try:
            with program:
                while packet := program.recv(MAX_REQUEST):
                    if client is None:
                        client = self._hello(program, packet)
                    else:
                        _send(program, self._answer(client, program, packet))
        except OSError as failure:
            log.info("a program's socket failed: %s", failure)
        finally:
            if client is not None:
                self._leave(client)

    def _answer(self, client: Client, program: socket.socket, packet: bytes) -> Reply:
        """The reply to a request; never raises."""
        try:
            fields = _parse(packet)
            action = self._actions.get(str(fields.get("op")))
            if action is None:
                raise BadMessage(f"unknown request {str(fields.get('op'))[:40]!r}")
            return action(Request(client, program, fields))
        except LiteError as failure:
            return failure.reply()
        except Exception as failure:  # a bug here must reach the program as an error, not as silence
            log.exception("request failed")
            return LiteError(f"{type(failure).__name__}: {failure}").reply()

    def _hello(self, program: socket.socket, packet: bytes) -> Client | None:
        """Make the connection one of a new client, or of the client whose token it has."""
        pid = struct.unpack("3i", program.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        try:
            fields = _parse(packet)
            if fields.get("op") != "hello":
                raise NotJoined("say hello first")
            greeting = self._greeting()
            client = self._join(pid, fields.get("token"))
        except LiteError as failure:
            _send(program, failure.reply())
            return None
        try:
            theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                mailbox = self._core.channel_add(client.number, ours.detach(), fields.get("mailbox") is True)
                files = [os.dup(theirs.fileno())] + ([] if mailbox is None else [mailbox])
                _send(program, ({**greeting, "client": client.number, "token": client.token}, *files))
        except LiteError as failure:
            _send(program, failure.reply())
            self._leave(client)
            return None
        except OSError:
            self._leave(client)
            raise
        return client

    def _join(self, pid: int, token: object) -> Client:
        with self._lock:
            if token is None:
                client = Client(self._core.client_add(pid), pid, secrets.token_hex(16))
                self._clients[client.token] = client
            else:
                found = self._clients.get(token) if isinstance(token, str) else None
                if found is None or found.pid != pid:
                    raise NotJoined("this token is not of this process", hint="say hello without one")
                client = found
            client.connections += 1
            return client

    def _leave(self, client: Client) -> None:
        with self._lock:
            client.connections -= 1
            if client.connections:
                return
            del self._clients[client.token]
        try:
            self._core.client_remove(client.number)
        except LiteError:
            log.exception("client %d", client.number)
        self._gone(client)


def _parse(packet: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(packet)
    except (ValueError, RecursionError):
        raise BadMessage("a request is one JSON object") from None
    if not isinstance(fields, dict):
        raise BadMessage("a request is one JSON object")
    return fields


def _send(program: socket.socket, reply: Reply) -> None:
    fields, *files = reply if isinstance(reply, tuple) else (reply,)
    try:
        socket.send_fds(program, [json.dumps({"ok": True, **fields}).encode()], files)
    finally:
        for file in files:
            os.close(file)
