"""Control messages between the orchestrator and the guest agents, and among agents.

This is the only code that host and guest share, so it imports nothing outside the standard library and runs on
Python 3.11 (host) as on 3.13 (blade).

Transport: TCP, port `PORT` of a blade's management address, `multiprocessing.connection` framing (4-byte length),
both sides authenticated by HMAC with the rack's secret. A connection carries any number of requests, one at a time:

    request   {"op": "memory.stats", ...fields}                 one JSON object as UTF-8 bytes
    reply     {"ok": true, ...fields}
              {"ok": false, "error": "one line", "hint": "what to do" | null, "code": number of LITE's error?}

Messages known today (`?` marks an optional field, sizes are bytes, GIDs are strings such as "::ffff:10.77.0.2"):

    op              fields                                        reply
    verbs.accept    service, qpn, psn, gid, client?, life?        qpn, psn, gid, connection, + what the service offers
                    (service "ping": addr, rkey, size; "storage": slots, slot_size)
    verbs.release   connection                                    -
    verbs.ping      peer (address of the other agent), size?      seconds, bytes, peer
    memory.allocate connection, pid, size                         region, addr, rkey, size
    memory.free     connection, region                            -
    memory.stats    -                                             regions, bytes_allocated, bytes_registered,
                                                                  bytes_total, bytes_of_others, buffers, connections,
                                                                  refused, requests (by opcode)
    storage.stats   -                                             requests, by_opcode, bytes_in, bytes_out, bytes_total,
                                                                  bytes_free
    process.stats   -                                             programs, storage, running (with their counters)
    process.kill    id, signal                                    -
    process.drain   memory (a memory blade), cancel?              -
    vnode.create    name, processors?, memory?, storage?,         vnode
                    placement?
    vnode.delete    name                                          -
    vnode.list      name?                                         vnodes
    program.place   vnode?, on?                                   blade, vnode
    program.list    -                                             programs
    managers.stats  -                                             ready, process, memory, storage, requests, ...
    agent.status    -                                             name, kind, version, joined, rdma, ...
    agent.load      -                                             processor time, memory: guest_agents/load.py
    agent.update    link, excache, heartbeat, dead_after,         -
                    pressure?, disk_faults?, clock?
    agent.hosts     hosts                                         -
    agent.resize    before, after, dry?                           -
    agent.wake      entropy (hex), epoch_ns                       -
    member.join     a blade's description, incarnation?, ...      node_id, incarnation, members, dead, version
    member.beat     node_id, incarnation, version                 known, members, dead, version
    member.leave    node_id, incarnation                          -
    member.list     -                                             members, dead, version
    member.events   since?                                        events, next, life, now
    lite.stat       -                                             what a blade's tier of LITE holds and has done
    lite.qos        mode                                          -
    hotpot.start    -                                             - (the service of Hotpot runs when it is answered)
    hotpot.stat     -                                             what a blade has of Hotpot; nothing before it runs
    pmem.stat       -                                             size, usable, mode, device, in_use, hotpot (what it
                                                                  has its media on); nothing without pmem
    pmem.mode       mode ("devdax", "fsdax"), force?              as pmem.stat
    pmem.persist    -                                             bytes (all that was not durable is)
    pmem.erase      -                                             - (all of it is zero, durably)
    pmem.mark       line (hex)                                    - (two lines are stored, the first is persisted)
    pmem.look       -                                             lines (hex; those of pmem.mark)
    holder.*, managers.*                                          among blades and managers: splitkernel/managers/
    lite.*          meant_for (node_id, incarnation), ...         among the tiers: see guest_agents/lite/

Everything the connection `connection` allocated is freed by `verbs.release`, and also when the control connection
over which it was accepted closes, or the life it named is declared dead: a dead client leaves nothing in the books.
"""

from __future__ import annotations

import json
import logging
import os
import select
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from types import TracebackType
from typing import Any

PORT = 7070
"""TCP port on a blade's management address."""

MAX_MESSAGE = 16 << 20
"""Largest message accepted, bytes: a wrong length prefix must not become an allocation."""

HANDSHAKE_TIMEOUT = 10.0
"""Seconds a peer has to prove that it knows the secret."""

Message = dict[str, Any]
Handler = Callable[[Message], Message]

log = logging.getLogger("rackless.control")


class ControlError(Exception):
    """A request failed: `error` says what happened in one line, `hint` what to do about it (or None).

    `code` is the number of a named error of LITE (guest_agents/lite/errors.py); other errors have none.
    """

    def __init__(self, error: str, hint: str | None = None, code: int | None = None) -> None:
        super().__init__(error)
        self.error = error
        self.hint = hint
        self.code = code


class LostError(ControlError):
    """The other agent does not answer, or went away in the middle of a request: it may have been carried out."""


class Peer:
    """The client at the other end of one control connection; handlers may ask to be told when it goes away."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._on_close: list[Callable[[], None]] = []

    def on_close(self, action: Callable[[], None]) -> None:
        """Run `action` when this client disconnects or dies (books of remote memory are returned this way)."""
        self._on_close.append(action)

    def closed(self) -> None:
        """Run what `on_close` collected, latest first; one failing action does not hide the others."""
        while self._on_close:
            try:
                self._on_close.pop()()
            except Exception:
                log.exception("clean-up after %s failed", self.address)


_current = threading.local()


def current_peer() -> Peer | None:
    """The client whose request the calling thread is serving; None outside a handler."""
    return getattr(_current, "peer", None)


def dispatch(handlers: Mapping[str, Handler], request: Message) -> Message:
    """Run the handler of `request["op"]`; every exception becomes an error reply, none escapes."""
    op = request.get("op")
    handler = handlers.get(op) if isinstance(op, str) else None
    if handler is None:
        known = ", ".join(sorted(handlers))
        return {"ok": False, "error": f"unknown operation {op!r}", "hint": f"this agent knows: {known}"}
    try:
        return {"ok": True, **handler(request)}
    except ControlError as failure:
        reply = {"ok": False, "error": failure.error, "hint": failure.hint}
        return reply if failure.code is None else {**reply, "code": failure.code}
    except KeyError as missing:
        log.exception("%s failed", op)
        return {"ok": False, "error": f"{op}: field {missing} is missing", "hint": None}
    except Exception as failure:  # a handler's bug must not take the agent down, nor look like success
        log.exception("%s failed", op)
        text = " ".join(f"{type(failure).__name__}: {failure}".split())
        return {"ok": False, "error": f"{op}: {text}", "hint": getattr(failure, "hint", None)}


class Server:
    """Listens on `address`; one daemon thread per client. Port 0 takes a free one, see `address` afterwards."""

    def __init__(self, address: tuple[str, int], secret: bytes, handlers: Mapping[str, Handler]) -> None:
        self._secret = secret
        self._handlers = handlers
        self._socket = socket.create_server(address, backlog=64)
        name = self._socket.getsockname()
        self.address: tuple[str, int] = (name[0], name[1])

    def run(self) -> None:
        """Accept clients until `close`."""
        while True:
            try:
                client, name = self._socket.accept()
            except OSError:
                return
            threading.Thread(
                target=self._serve, args=(client, f"{name[0]}:{name[1]}"), name=f"control {name[0]}", daemon=True
            ).start()

    def start(self) -> Server:
        """Run in a daemon thread; returns itself."""
        threading.Thread(target=self.run, name="control", daemon=True).start()
        return self

    def close(self) -> None:
        """Stop accepting; connections that are open stay so."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _serve(self, client: socket.socket, name: str) -> None:
        peer = Peer(name)
        _current.peer = peer
        try:
            with _authenticated(client, self._secret, server=True) as connection:
                while True:
                    try:
                        request = json.loads(connection.recv_bytes(MAX_MESSAGE))
                    except ValueError:
                        reply: Message = {"ok": False, "error": "request is not JSON", "hint": None}
                    else:
                        if isinstance(request, dict):
                            reply = dispatch(self._handlers, request)
                        else:
                            reply = {"ok": False, "error": "request is not a JSON object", "hint": None}
                    connection.send_bytes(json.dumps(reply).encode())
        except (EOFError, OSError):
            pass
        except AuthenticationError:
            log.warning("%s does not know this rack's secret", name)
        finally:
            peer.closed()


def serve(address: tuple[str, int], secret: bytes, handlers: Mapping[str, Handler]) -> None:
    """Serve control requests on `address` for ever: one thread per connection.

    A handler gets the request and returns the reply's fields; it raises ControlError(error, hint) to refuse.
    """
    Server(address, secret, handlers).run()


class ControlClient:
    """A control connection that is kept open: requests are answered one at a time (thread-safe).

    `connect` replaces the plain TCP connection, for callers whose socket must be made elsewhere, such as inside
    the rack's network namespace.
    """

    def __init__(
        self,
        address: tuple[str, int],
        secret: bytes,
        timeout: float = 30.0,
        connect: Callable[[tuple[str, int], float], socket.socket] | None = None,
    ) -> None:
        self._lock = threading.Lock()
        self._ending = threading.Lock()
        self._timeout = timeout
        self.address = address
        where = f"{address[0]}:{address[1]}"
        try:
            plain = (connect or socket.create_connection)(address, timeout)
            self._connection = _authenticated(plain, secret, server=False, timeout=timeout)
            self._poll = select.poll()  # Connection.poll makes a selector each time
            self._poll.register(self._connection.fileno(), select.POLLIN)
        except AuthenticationError:
            raise ControlError(f"the agent at {where} has another secret", "is it a blade of this rack?") from None
        except (OSError, EOFError) as failure:
            raise LostError(
                f"no agent answers at {where}: {failure or type(failure).__name__}", "is the blade up?"
            ) from failure

    def call(self, op: str, timeout: float | None = None, **fields: Any) -> Message:
        """Send one request and return the reply's fields; ControlError if it is refused or the agent is gone.

        timeout -- seconds to wait for the reply; after it the connection is closed, as its reply may still come.
        """
        wait = self._timeout if timeout is None else timeout
        where = f"{self.address[0]}:{self.address[1]}"
        with self._lock:
            try:
                self._connection.send_bytes(json.dumps({"op": op, **fields}).encode())
                if not self._poll.poll(wait * 1000):
                    self.close()
                    raise LostError(f"{op}: no reply from {where} in {wait:g} s", "is the blade up?")
                reply: Message = json.loads(self._connection.recv_bytes(MAX_MESSAGE))
            except (OSError, EOFError) as failure:
                raise LostError(f"{op}: the agent at {where} has gone: {failure}", "see its log") from failure
        if not reply.pop("ok", False):
            raise ControlError(reply.get("error", "no error given"), reply.get("hint"), reply.get("code"))
        return reply

    def close(self) -> None:
        """Close the connection; the agent then frees what belonged to it."""
        with self._ending:
            self._connection.close()

    def stale(self) -> bool:
        """Whether a new request cannot succeed: the connection is closed, here or there."""
        # An agent says nothing unasked: what can be read is the end.
        return self._connection.closed or bool(self._poll.poll(0))

    def abort(self) -> None:
        """Make the request that another thread waits for fail now; the connection is of no use afterwards."""
        # The thread that waits would not notice a close, and closing under it would give its descriptor away.
        with (
            self._ending,
            suppress(OSError),
            socket.socket(fileno=os.dup(self._connection.fileno())) as guard,
        ):
            guard.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def call(address: tuple[str, int], secret: bytes, op: str, timeout: float = 30.0, **fields: Any) -> Message:
    """One request over a connection of its own."""
    with ControlClient(address, secret, timeout) as client:
        return client.call(op, **fields)


def _authenticated(
    plain: socket.socket, secret: bytes, *, server: bool, timeout: float = HANDSHAKE_TIMEOUT
) -> Connection:
    """Wrap a connected socket and run the HMAC handshake of `multiprocessing.connection`, both ways.

    The handshake is done here and not by `Listener`, because `Listener.accept` lets one silent client stop all
    others. A watchdog cuts the socket if the peer says nothing.
    """
    plain.settimeout(None)
    if plain.family in (socket.AF_INET, socket.AF_INET6):
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    guard = plain.dup()
    connection = Connection(plain.detach())
    watchdog = threading.Timer(timeout, _cut, (guard,))
    watchdog.daemon = True
    watchdog.start()
    try:
        if server:
            deliver_challenge(connection, secret)
            answer_challenge(connection, secret)
        else:
            answer_challenge(connection, secret)
            deliver_challenge(connection, secret)
    except BaseException:
        connection.close()
        raise
    finally:
        watchdog.cancel()
        guard.close()
    return connection


def _cut(guard: socket.socket) -> None:
    with suppress(OSError):
        guard.shutdown(socket.SHUT_RDWR)
