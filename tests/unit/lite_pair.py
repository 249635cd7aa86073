"""Two LITE cores in this process, joined by stand-in verbs (native/fake_verbs.c), and programs that use them."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from guest_agents.hotpot.records import SETTINGS
from guest_agents.lite import abi, wire
from guest_agents.lite.core import Config, Core, Event
from guest_agents.lite.errors import LiteError
from guest_agents.lite.wire import Flag, Op, Reply

NATIVE = Path(__file__).parents[2] / "guest_agents" / "native"
FAKE = Path(__file__).parent / "native" / "fake_verbs.c"
LIBHOTPOT = ("libhotpot/hotpot.c", "libhotpot/watch.c", "liblite/json.c")
SECONDS = 20.0
ALL = 31
"""Every permission."""
PORT = 5

# What must be back at zero when every program, LMR and peer has gone.
BOOKS = ("clients", "channels", "lmrs", "handles", "buffers", "ports", "ops", "pieces", "rings_in", "rings_out",
         "descriptors", "slots_used", "slots_quarantined", "bytes_slabs", "bytes_buffers", "bytes_rings")  # fmt: skip


def missing() -> str | None:
    """Why the native core cannot be built here, or None."""
    if shutil.which("cc") is None:
        return "no C compiler"
    probe = subprocess.run(["cc", "-E", "-include", "infiniband/verbs.h", "-x", "c", "/dev/null"], capture_output=True)
    return "no headers of libibverbs" if probe.returncode else None


def build(folder: Path) -> Path:
    """The core with the stand-in verbs in one library, compiled unless it is there; and libhotpot beside it."""
    library = folder / "lite_core.so"
    if library.exists():
        return library
    core = [*sorted((NATIVE / "lite").glob("*.c")), FAKE]
    hotpot = [f"-DHP_PROTOCOL={SETTINGS['protocol']}", *(NATIVE / name for name in LIBHOTPOT)]
    flags = ["-std=gnu17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-fvisibility=hidden",
             "-fsanitize=undefined", "-fno-sanitize-recover=undefined"]  # fmt: skip
    for made, sources in ((folder / "libhotpot.so", hotpot), (library, core)):
        subprocess.run(["cc", *flags, "-o", made, *sources, "-lpthread"], check=True)
    return library


def address_of(memory: bytearray) -> int:
    """Where its bytes are; it must stay and not change its size."""
    return ctypes.addressof((ctypes.c_char * len(memory)).from_buffer(memory))


class Program:
    """A program on a node: one data channel, used by one thread at a time."""

    def __init__(self, node: Core, client: int | None = None) -> None:
        self.node = node
        self.client = node.client_add(os.getpid()) if client is None else client
        self.socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(SECONDS)
        node.channel_add(self.client, other.detach())
        self._tags = itertools.count(1)
        self.last = 0

    def post(self, op: int, data: bytes = b"", /, **fields: int) -> int:
        """Send a request; its tag."""
        tag = self.last = next(self._tags)
        self.socket.send(wire.request(op, tag, **fields) + data)
        return tag

    def next(self) -> tuple[Reply, bytes]:
        """The next reply and its inline data."""
        packet = self.socket.recv(wire.PACKET)
        return wire.reply(packet), packet[wire.REPLY.size :]

    def ask(self, op: int, data: bytes = b"", /, **fields: int) -> tuple[Reply, bytes]:
        """Request and reply."""
        tag = self.post(op, data, **fields)
        reply, more = self.next()
        assert reply.tag == tag
        return reply, more

    def write(self, handle: int, offset: int, data: bytes, **fields: int) -> int:
        """WRITE, inline if it is small, else from this process's memory; its status."""
        if len(data) <= wire.INLINE:
            return self.ask(Op.WRITE, data, handle=handle, offset=offset, length=len(data), flags=Flag.INLINE_DATA,
                            **fields)[0].status  # fmt: skip
        memory = ctypes.create_string_buffer(data, len(data))
        return self.ask(Op.WRITE, handle=handle, offset=offset, length=len(data), address=ctypes.addressof(memory),
                        **fields)[0].status  # fmt: skip

    def read(self, handle: int, offset: int, length: int) -> bytes:
        """READ; AssertionError if it fails."""
        if length <= wire.INLINE:
            reply, data = self.ask(Op.READ, handle=handle, offset=offset, length=length, flags=Flag.INLINE_REPLY)
            assert (reply.status, reply.length) == (0, length)
            return data
        memory = ctypes.create_string_buffer(length)
        reply, _ = self.ask(Op.READ, handle=handle, offset=offset, length=length, address=ctypes.addressof(memory))
        assert (reply.status, reply.length) == (0, length)
        return memory.raw

    def call(self, node: int, port: int, data: bytes, most: int = wire.INLINE, **fields: int) -> tuple[Reply, bytes]:
        """CALL with inline data both ways."""
        return self.ask(Op.CALL, data, handle=node, arg0=port, arg1=most, length=len(data),
                        flags=Flag.INLINE_DATA | Flag.INLINE_REPLY, **fields)  # fmt: skip

    def receive(self, port: int, most: int = wire.INLINE, flags: int = 0, **fields: int) -> tuple[Reply, bytes]:
        """RECEIVE inline."""
        return self.ask(Op.RECEIVE, arg0=port, arg1=most, flags=Flag.INLINE_REPLY | flags, **fields)

    def reply(self, descriptor: int, data: bytes) -> int:
        """REPLY inline; its status."""
        return self.ask(Op.REPLY, data, handle=descriptor, length=len(data), flags=Flag.INLINE_DATA)[0].status

    def close(self) -> None:
        """As when the program is killed."""
        self.socket.close()


class Pair:
    """Nodes 1 and 2, connected; binds are served as the tier would."""

    def __init__(self, library: Path, config: Config) -> None:
        abi.LIBRARY = library
        self.fake = ctypes.CDLL(str(library))
        self._others: int = self.fake.fake_registrations()  # of cores that tests before this could not close
        self.nodes = {1: Core(config), 2: Core(config)}
        self.events: list[tuple[int, Event]] = []
        self._stop = threading.Event()
        for number, node in self.nodes.items():
            node.join(number, 1)
        self.connect()
        self._threads = [threading.Thread(target=self._serve, args=(n,), daemon=True) for n in self.nodes]
        for thread in self._threads:
            thread.start()

    def connect(self, incarnation: int = 1) -> None:
        """Connect 1 with 2 (of the given incarnation), or connect them anew."""
        first = self.nodes[1].peer_prepare(2, incarnation)
        second = self.nodes[2].peer_prepare(1, 1)
        self.addresses = {1: first, 2: second}
        self.nodes[1].peer_connect(2, incarnation, second)
        self.nodes[2].peer_connect(1, 1, first)

    def _serve(self, number: int) -> None:
        node = self.nodes[number]
        while not self._stop.is_set():
            event = node.next_event(0.05)
            if event is None:
                continue
            self.events.append((number, event))
            if event.kind != "bind":
                continue
            try:
                ring = self.nodes[event.node].ring_offer(number, 1, event.port)
                node.ring_attach(event.node, event.incarnation, event.port, ring)
            except LiteError as error:
                with suppress(LiteError):  # the peer has gone meanwhile, and its requests with it
                    node.ring_refuse(event.node, event.incarnation, event.port, error.code)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nothing moves on the fabric meanwhile."""
        self.fake.fake_hold(1)
        try:
            yield
        finally:
            self.fake.fake_hold(0)

    def lmr(self, number: int, *lengths_by_node: tuple[int, int]) -> list[tuple[int, int]]:
        """An LMR known to both nodes, of (node, length) blocks; (node, address) of each."""
        blocks = []
        for node, length in lengths_by_node:
            slab = self.nodes[node].slab(length)
            blocks.append((node, slab.address, slab.rkey, length))
        for core_ in self.nodes.values():
            core_.lmr_put(number, blocks)
        return [(node, address) for node, address, _, _ in blocks]

    def clean_up(self, *programs: Program) -> None:
        """Remove the programs and everything of theirs; the books must balance."""
        for program in programs:
            program.close()
        for client, node in {(p.client, p.node) for p in programs}:
            node.client_remove(client)
        for node in self.nodes.values():
            for lmr in range(1, 20):
                node.lmr_kill(lmr, -4)
        for number, node in self.nodes.items():
            node.peer_dead(3 - number, 99)
            node.peer_dead(number, 99)
            for slab in list(node._slabs.values()):
                slab.close()
        for number, node in self.nodes.items():
            stats = node.stats()
            assert {name: stats[name] for name in BOOKS if stats[name]} == {}, f"node {number}"

    def close(self) -> None:
        """Everything registered must have been given back."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        for node in self.nodes.values():
            node.close()
        assert self.fake.fake_registrations() == self._others


class Server(threading.Thread):
    """Answers every call with its data reversed."""

    def __init__(self, program: Program) -> None:
        super().__init__(daemon=True)
        self.program = program
        self.seen = 0

    def run(self) -> None:
        with suppress(OSError, struct.error):  # its channel closes in the end
            self._serve()

    def _serve(self) -> None:
        reply, data = self.program.receive(PORT)
        while reply.status == 0:
            self.seen += 1
            if reply.value == 0:
                reply, data = self.program.receive(PORT)
                continue
            reply, data = self.program.ask(
                Op.REPLY_RECEIVE, data[::-1], handle=reply.value, arg0=PORT, arg1=wire.INLINE, length=len(data),
                flags=Flag.INLINE_DATA | Flag.INLINE_REPLY)  # fmt: skip


def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition; the test fails when it does not come."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.005)
