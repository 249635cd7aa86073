"""A stand-in for a blade's LITE agent on a real SEQPACKET socket: one node, memory in a bytearray, no RDMA.

It speaks what guest_agents/lite/wire.py and the control socket say, reads and writes its clients' memory as the core
does, and fails on request. It checks little: the clients are under test, not it.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import mmap
import os
import queue
import socket
import struct
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guest_agents.lite import wire
from guest_agents.lite.errors import (
    BadHandle,
    BadMessage,
    Cancelled,
    LiteError,
    MessageTooLarge,
    NameTaken,
    NoSuchName,
    NotHeld,
    OutOfRange,
    PermissionDenied,
    PortClosed,
    TimedOut,
)
from guest_agents.lite.wire import Flag, Op

_libc = ctypes.CDLL(None, use_errno=True)
NODE_ID = 3


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _remote(pid: int, address: int, data: bytearray, *, write: bool) -> None:
    local = _Vector(ctypes.addressof(ctypes.c_char.from_buffer(data)), len(data))
    far = _Vector(address, len(data))
    move = _libc.process_vm_writev if write else _libc.process_vm_readv
    if move(pid, ctypes.byref(local), 1, ctypes.byref(far), 1, 0) != len(data):
        raise BadMessage(f"the memory of process {pid}: {os.strerror(ctypes.get_errno())}")


@dataclass
class Memory:
    """An LMR."""

    data: bytearray
    name: str | None
    permissions: int


@dataclass
class Process:
    """A client."""

    pid: int
    token: str
    connections: int = 0
    handles: dict[int, tuple[Memory, int]] = field(default_factory=dict)
    buffers: dict[int, mmap.mmap] = field(default_factory=dict)


@dataclass
class Message:
    """A request on its way to a server, or its reply."""

    data: bytes
    room: int
    reply: queue.Queue[bytes | LiteError] | None


class StandIn:
    """The agent. `fail[op]` makes data operations end with that error; nothing is answered while `go` is clear."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fail: dict[Op, LiteError] = {}
        self.go = threading.Event()
        self.go.set()
        self.requests: list[tuple[Op, int]] = []  # (op, buffer id) of the data requests that came
        self.processes: dict[str, Process] = {}
        self.memories: list[Memory] = []
        self.ports: dict[int, queue.Queue[Message]] = {}
        self.waiting: dict[int, Message] = {}
        self.locks: dict[str, threading.Lock] = {}
        self.barriers: dict[str, threading.Barrier] = {}
        self._numbers = itertools.count(100)
        self._lock = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.bind(str(path))
        self._socket.listen()
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """As if the agent died."""
        for each in (self._socket, *self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                control, _ = self._socket.accept()
            except OSError:
                return
            self._open.append(control)
            threading.Thread(target=self._control, args=(control,), daemon=True).start()

    # The control socket

    def _control(self, control: socket.socket) -> None:
        pid = struct.unpack("3i", control.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        process: Process | None = None
        try:
            while packet := control.recv(1 << 20):
                request = json.loads(packet)
                files: list[int] = []
                try:
                    if request["op"] == "hello":
                        process = self._hello(pid, request, files)
                        reply = self._about(process)
                    else:
                        assert process is not None
                        reply = getattr(self, f"do_{request['op']}")(process, request, files) or {}
                    answer = {"ok": True, **reply}
                except LiteError as failure:
                    answer = failure.reply()
                socket.send_fds(control, [json.dumps(answer).encode()], files)
                for file in files:
                    os.close(file)
        except OSError:
            pass
        if process:
            process.connections -= 1
            if not process.connections:
                del self.processes[process.token]

    def _hello(self, pid: int, request: dict[str, Any], files: list[int]) -> Process:
        token = request.get("token") or f"token-{next(self._numbers)}"
        process = self.processes.setdefault(token, Process(pid, token))
        process.connections += 1
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._open.append(ours)
        files.append(theirs.detach())
        threading.Thread(target=self._channel, args=(process, ours), daemon=True).start()
        return process

    def _about(self, process: Process) -> dict[str, Any]:
        return {"client": 1, "token": process.token, "node_id": NODE_ID, "incarnation": 1, "name": "pb0",
                **self.do_nodes(process, {}, [])}  # fmt: skip

    def do_nodes(self, _process: Process, _request: dict[str, Any], _files: list[int]) -> dict[str, Any]:
        return {"nodes": [{"name": "pb0", "node_id": NODE_ID, "state": "alive"},
                          {"name": "mb0", "node_id": 4, "state": "dead"}]}  # fmt: skip

    def do_malloc(self, process: Process, request: dict[str, Any], _files: list[int]) -> dict[str, Any]:
        name = request.get("name")
        if name and any(memory.name == name for memory in self.memories):
            raise NameTaken(f"there is an LMR called {name}")
        memory = Memory(bytearray(request["size"]), name, request.get("permissions", 3))
        self.memories.append(memory)
        handle = next(self._numbers)
        process.handles[handle] = (memory, 31)
        return {"handle": handle, "size": len(memory.data), "permissions": 31, "lmr": handle,
                "blocks": [{"node": "pb0", "length": len(memory.data)}]}  # fmt: skip

    def do_map(self, process: Process, request: dict[str, Any], _files: list[int]) -> dict[str, Any]:
        for memory in self.memories:
            if memory.name == request["name"]:
                if request["permissions"] & ~memory.permissions:
                    raise PermissionDenied("more than is granted")
                handle = next(self._numbers)
                process.handles[handle] = (memory, request["permissions"])
                return {"handle": handle, "size": len(memory.data), "permissions": request["permissions"]}
        raise NoSuchName(f"no LMR is called {request['name']}")

    def do_unmap(self, process: Process, request: dict[str, Any], _files: list[int]) -> None:
        if not process.handles.pop(request["handle"], None):
            raise BadHandle

    def do_memset(self, process: Process, request: dict[str, Any], _files: list[int]) -> None:
        memory, _ = process.handles[request["handle"]]
        at, length = request["offset"], request["length"]
        memory.data[at : at + length] = bytes([request["byte"]]) * length

    def do_memmove(self, process: Process, request: dict[str, Any], _files: list[int]) -> None:
        source, _ = process.handles[request["source"]]
        target, _ = process.handles[request["target"]]
        data = source.data[request["soffset"] : request["soffset"] + request["length"]]
        target.data[request["toffset"] : request["toffset"] + request["length"]] = data

    do_memcpy = do_memmove

    def do_buffer(self, process: Process, request: dict[str, Any], files: list[int]) -> dict[str, Any]:
        file = os.memfd_create("buffer")
        os.ftruncate(file, request["size"])
        number = next(self._numbers)
        process.buffers[number] = mmap.mmap(file, request["size"])
        files.append(file)
        return {"id": number}

    def do_buffer_drop(self, process: Process, request: dict[str, Any], _files: list[int]) -> None:
        del process.buffers[request["id"]]

    def do_register(self, _process: Process, request: dict[str, Any], _files: list[int]) -> None:
        self.ports[request["port"]] = queue.Queue()

    def do_unregister(self, _process: Process, request: dict[str, Any], _files: list[int]) -> None:
        del self.ports[request["port"]]

    def do_lock_create(self, _process: Process, request: dict[str, Any], _files: list[int]) -> None:
        self.locks.setdefault(request["name"], threading.Lock())

    def do_lock(self, _process: Process, request: dict[str, Any], _files: list[int]) -> None:
        wait = request["timeout_ms"]
        if not self.locks[request["name"]].acquire(timeout=wait / 1000 if wait else -1):
            raise TimedOut(f"lock {request['name']}")

    def do_unlock(self, _process: Process, request: dict[str, Any], _files: list[int]) -> None:
        try:
            self.locks[request["name"]].release()
        except RuntimeError:
            raise NotHeld(f"lock {request['name']}") from None

    def do_barrier(self, _process: Process, request: dict[str, Any], _files: list[int]) -> None:
        with self._lock:
            barrier = self.barriers.setdefault(request["name"], threading.Barrier(request["count"]))
        barrier.wait(60)

    def do_free(self, process: Process, request: dict[str, Any], _files: list[int]) -> None:
        self.memories.remove(process.handles[request["handle"]][0])

    # The data channel: a thread per request, so that replies come in any order

    def _channel(self, process: Process, channel: socket.socket) -> None:
        cancelled: set[int] = set()
        while True:
            try:
                packet = channel.recv(1 << 20)
            except OSError:
                return
            if not packet:
                return
            arguments = (process, channel, packet, cancelled)
            threading.Thread(target=self._data, args=arguments, daemon=True).start()

    def _data(self, process: Process, channel: socket.socket, packet: bytes, cancelled: set[int]) -> None:
        header = wire.REQUEST.unpack_from(packet)
        op, _priority, flags, tag, handle, offset, length, arg0, arg1, address, buffer, timeout = header
        self.requests.append((Op(op), buffer))
        payload = packet[wire.REQUEST.size :]
        status = value = value2 = 0
        data, out = b"", b""
        room = arg1 if op in (Op.CALL, Op.RECEIVE, Op.REPLY_RECEIVE) else length
        place = offset if op in (Op.CALL, Op.REPLY_RECEIVE) else address
        try:
            if op == Op.CANCEL:
                cancelled.add(arg0)
            else:
                self.go.wait()
                if op in self.fail:
                    raise self.fail[Op(op)]
                segments = payload[: arg0 * 16] if op in (Op.READV, Op.WRITEV) else b""
                if flags & Flag.INLINE_DATA:
                    data = payload[len(segments) :]
                elif op in (Op.WRITE, Op.WRITEV, Op.CALL, Op.SEND, Op.REPLY, Op.REPLY_RECEIVE):
                    data = self._fetch(process, address, buffer, length)
                if op == Op.CALL:
                    out = self._call(arg0, data, arg1, timeout)
                elif op == Op.SEND:
                    self._port(arg0).put(Message(data, 0, None))
                elif op in (Op.REPLY, Op.REPLY_RECEIVE):
                    self._answer(handle, data)
                if op in (Op.RECEIVE, Op.REPLY_RECEIVE):
                    out, value = self._receive(arg0, arg1, flags, timeout, tag, cancelled)
                    value2 = NODE_ID
                elif op <= Op.WRITEV:
                    out, value = self._memory(process, Op(op), handle, offset, length, arg0, arg1, data, segments)
                if out and not flags & Flag.INLINE_REPLY:
                    self._store(process, place, buffer, out[:room])
                length = len(out) or len(data)
        except LiteError as failure:
            status, out = failure.code, b""
        answer = wire.REPLY.pack(tag, status, length, value, value2)
        with self._lock, contextlib.suppress(OSError):
            channel.send(answer + out if flags & Flag.INLINE_REPLY else answer)

    def _memory(
        self, process: Process, op: Op, handle: int, offset: int, length: int, arg0: int, arg1: int,
        data: bytes, segments: bytes,
    ) -> tuple[bytes, int]:  # fmt: skip
        if handle not in process.handles:
            raise BadHandle
        memory, permissions = process.handles[handle]
        need = {Op.READ: 1, Op.READV: 1, Op.WRITE: 2, Op.WRITEV: 2}.get(op, 16)
        if not permissions & need:
            raise PermissionDenied
        content = memory.data
        if op in (Op.FETCH_ADD, Op.CAS):
            with self._lock:
                before: int = struct.unpack_from("<Q", content, offset)[0]
                if op == Op.FETCH_ADD:
                    struct.pack_into("<Q", content, offset, (before + arg0) % 2**64)
                elif before == arg0:
                    struct.pack_into("<Q", content, offset, arg1)
                return b"", before
        ranges = list(wire.SEGMENT.iter_unpack(segments)) or [(offset, length)]
        if any(start + size > len(content) for start, size in ranges):
            raise OutOfRange
        if op in (Op.READ, Op.READV):
            return b"".join(content[start : start + size] for start, size in ranges), 0
        done = 0
        for start, size in ranges:
            content[start : start + size] = data[done : done + size]
            done += size
        return b"", 0

    def _call(self, port: int, data: bytes, room: int, timeout: int) -> bytes:
        message = Message(data, room, queue.Queue())
        self._port(port).put(message)
        assert message.reply is not None
        try:
            answer = message.reply.get(timeout=timeout / 1000 if timeout else 10)
        except queue.Empty:
            raise TimedOut from None
        if isinstance(answer, LiteError):
            raise answer
        return answer

    def _port(self, port: int) -> queue.Queue[Message]:
        if port not in self.ports:
            raise PortClosed
        return self.ports[port]

    def _answer(self, descriptor: int, data: bytes) -> None:
        message = self.waiting.pop(descriptor, None)
        if message is None or message.reply is None:
            raise BadHandle
        if len(data) > message.room:
            message.reply.put(MessageTooLarge())
            raise MessageTooLarge
        message.reply.put(data)

    def _receive(
        self, port: int, room: int, flags: int, timeout: int, tag: int, cancelled: set[int]
    ) -> tuple[bytes, int]:
        waited = 0
        while True:
            messages = self._port(port)
            try:
                message = messages.get(timeout=0.01)
                break
            except queue.Empty:
                waited += 10
                if tag in cancelled:
                    raise Cancelled from None
                if flags & Flag.NO_WAIT or (timeout and waited >= timeout):
                    raise TimedOut from None
        if len(message.data) > room:
            raise MessageTooLarge
        if message.reply is None:
            return message.data, 0
        descriptor = next(self._numbers)
        self.waiting[descriptor] = message
        return message.data, descriptor

    def _fetch(self, process: Process, address: int, buffer: int, length: int) -> bytes:
        if buffer:
            return process.buffers[buffer][address : address + length]
        data = bytearray(length)
        _remote(process.pid, address, data, write=False)
        return bytes(data)

    def _store(self, process: Process, address: int, buffer: int, data: bytes) -> None:
        if buffer:
            process.buffers[buffer][address : address + len(data)] = data
        else:
            _remote(process.pid, address, bytearray(data), write=True)
