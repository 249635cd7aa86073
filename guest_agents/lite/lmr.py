"""Memory of the rack under a handle: read, write, atomics, copies and rights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from guest_agents.lite import wire
from guest_agents.lite.channel import Channel, Ticket, nothing
from guest_agents.lite.errors import BadArgument, OutOfRange
from guest_agents.lite.permissions import Permission, Priority

if TYPE_CHECKING:
    from typing_extensions import Buffer as Data

    from guest_agents.lite.node import Node

_READ, _WRITE, _READV, _WRITEV = int(wire.Op.READ), int(wire.Op.WRITE), int(wire.Op.READV), int(wire.Op.WRITEV)
_FETCH_ADD, _CAS = int(wire.Op.FETCH_ADD), int(wire.Op.CAS)


class Lmr:
    """A LITE memory region as this process may use it; from `Node.malloc` or `Node.map`.

    Offsets and lengths are bytes. `priority` is that of the node unless it is given. Every operation can raise:
    PermissionDenied, OutOfRange, BadHandle (closed), Freed, Revoked, NodeDead, NodeUnreachable, TimedOut, NotJoined.
    """

    def __init__(self, node: Node, about: dict[str, Any], name: str | None) -> None:
        """Made by the node from the agent's reply."""
        self.node = node
        self.handle: int = about["handle"]
        """What the agent knows it by; valid in this process only."""
        self.size: int = about["size"]
        """Bytes."""
        self.permissions = Permission(about["permissions"])
        """What was granted."""
        self.name = name
        """Its name in the rack, None if it has none."""
        self.blocks: list[tuple[str, int]] = [(block["node"], block["length"]) for block in about.get("blocks", ())]
        """Where it lay when it was allocated: (node, bytes), in order. Empty if it was mapped."""

    # One-sided reads and writes

    def read(self, length: int | None = None, at: int = 0, *, priority: Priority | None = None) -> bytes:
        """The `length` bytes (None: all to the end) from `at` (LT_read)."""
        return self.read_async(length, at, priority=priority).wait()

    def read_into(self, target: Data, at: int = 0, *, priority: Priority | None = None) -> None:
        """Fill `target`, anything writable with contiguous bytes, from `at` on (LT_read)."""
        self.read_into_async(target, at, priority=priority).wait()

    def write(self, data: Data, at: int = 0, *, priority: Priority | None = None) -> None:
        """Write the bytes of `data` to `at` (LT_write). They are in the LMR when this returns."""
        self.write_async(data, at, priority=priority).wait()

    def read_async(self, length: int | None = None, at: int = 0, *, priority: Priority | None = None) -> Ticket[bytes]:
        """Start a read; the ticket's `wait` has the bytes (LT_read, asynchronous)."""
        wanted = self.size - at if length is None else length
        if wanted < 0 or at < 0:
            raise OutOfRange(f"{wanted} bytes at {at} of an LMR of {self.size}")
        return self._channel().start(
            _READ,
            Ticket.data,
            handle=self.handle,
            offset=at,
            length=wanted,
            room=wanted,
            priority=self._urgency(priority),
        )

    def read_into_async(self, target: Data, at: int = 0, *, priority: Priority | None = None) -> Ticket[None]:
        """Start a read into `target`, which must be left alone until the ticket is done."""
        length = _bytes_in(target)
        return self._channel().start(
            _READ, nothing, handle=self.handle, offset=at, length=length, room=length,
            into=target if length else None, priority=self._urgency(priority),
        )  # fmt: skip

    def write_async(self, data: Data, at: int = 0, *, priority: Priority | None = None) -> Ticket[None]:
        """Start a write; `data` must not change until the ticket is done (LT_write, asynchronous).

        Operations under way at the same time have no order: `Node.fence` between them makes one.
        """
        length = _bytes_in(data)
        return self._channel().start(
            _WRITE, nothing, handle=self.handle, offset=at, length=length, out=data, priority=self._urgency(priority)
        )

    def gather(self, ranges: Iterable[tuple[int, int]], *, priority: Priority | None = None) -> list[bytes]:
        """Read several (offset, length) ranges in one operation."""
        wanted = list(ranges)
        lengths = [length for _offset, length in wanted]
        total = sum(lengths)
        data = memoryview(
            self._channel().run(
                _READV, Ticket.data, handle=self.handle, length=total, room=total, arg0=len(wanted),
                segments=_segments(wanted), priority=self._urgency(priority),
            )
        )  # fmt: skip
        parts, start = [], 0
        for length in lengths:
            parts.append(bytes(data[start : start + length]))
            start += length
        return parts

    def scatter(self, parts: Iterable[tuple[int, Data]], *, priority: Priority | None = None) -> None:
        """Write several (offset, data) in one operation. If ranges overlap, which one wins is not said."""
        pieces = [(offset, memoryview(data).cast("B")) for offset, data in parts]
        data = b"".join(piece for _offset, piece in pieces)
        self._channel().run(
            _WRITEV, nothing, handle=self.handle, length=len(data), out=data, arg0=len(pieces),
            segments=_segments([(offset, len(piece)) for offset, piece in pieces]), priority=self._urgency(priority),
        )  # fmt: skip

    # Atomics: 8 bytes, little endian, at offsets divisible by 8; atomic among all threads of all nodes that use these.

    def fetch_add(self, at: int, addend: int = 1, *, priority: Priority | None = None) -> int:
        """Add to the unsigned 64-bit word at `at`, modulo 2**64, and return what it was (LT_fetch-add)."""
        return self._channel().run(
            _FETCH_ADD, _value, handle=self.handle, offset=at, arg0=addend & _WORD, priority=self._urgency(priority)
        )

    def compare_swap(self, at: int, expected: int, new: int, *, priority: Priority | None = None) -> int:
        """Set the word at `at` to `new` if it is `expected`; returns what it was (LT_test-set)."""
        return self._channel().run(
            _CAS, _value, handle=self.handle, offset=at, arg0=expected & _WORD, arg1=new & _WORD,
            priority=self._urgency(priority),
        )  # fmt: skip

    # Executed where the data are

    def memset(self, byte: int, at: int = 0, length: int | None = None) -> None:
        """Set `length` bytes (None: all to the end) to `byte`, at the nodes that hold them (LT_memset)."""
        self._call("memset", byte=byte, offset=at, length=self.size - at if length is None else length)

    def copy_to(self, target: Lmr, *, at: int = 0, to: int = 0, length: int | None = None) -> None:
        """Copy `length` bytes (None: all to the end) from `at` to `to` of `target`, between the nodes that hold
        them (LT_memcpy). Ranges that overlap are `move_to`'s business."""
        self._copy("memcpy", target, at, to, length)

    def move_to(self, target: Lmr, *, at: int = 0, to: int = 0, length: int | None = None) -> None:
        """The same for ranges that may overlap (LT_memmove)."""
        self._copy("memmove", target, at, to, length)

    # Masters

    def move(self, to: str | Sequence[str], *, block: int | None = None) -> None:
        """Move the LMR (or one of its blocks) to other nodes while it is in use; handles stay valid. Needs ADMIN."""
        fields = {} if block is None else {"block": block}
        self._call("move", to=[to] if isinstance(to, str) else list(to), **fields)

    def grant(self, permissions: Permission, to: str = "*") -> None:
        """Let programs on node `to` ("*": all) map it by name with these rights. Needs ADMIN."""
        self._call("grant", permissions=int(permissions), to=to)

    def revoke(self, permissions: Permission, to: str = "*") -> None:
        """Take rights back, also from handles that are open: they get Revoked. Needs ADMIN."""
        self._call("revoke", permissions=int(permissions), to=to)

    def free(self) -> None:
        """Free the LMR now; every handle to it gets Freed (LT_free). Needs ADMIN."""
        self._call("free")

    def unmap(self) -> None:
        """Close this handle (LT_unmap). An LMR made without `keep` goes with its last handle."""
        self._call("unmap")

    def __enter__(self) -> Lmr:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.node.unmap_quietly(self)

    def __len__(self) -> int:
        return self.size

    def __repr__(self) -> str:
        named = f" {self.name!r}" if self.name else ""
        return f"<Lmr{named} of {self.size} bytes, {self.permissions!r}>"

    def _channel(self) -> Channel:
        return self.node.connection().channel

    def _urgency(self, priority: Priority | None) -> int:
        return self.node.priority if priority is None else priority

    def _call(self, op: str, **fields: Any) -> None:
        self.node.call_agent(op, handle=self.handle, **fields)

    def _copy(self, op: str, target: Lmr, at: int, to: int, length: int | None) -> None:
        self.node.call_agent(
            op, source=self.handle, soffset=at, target=target.handle, toffset=to,
            length=self.size - at if length is None else length,
        )  # fmt: skip


_WORD = 0xFFFFFFFFFFFFFFFF


def _value(ticket: Ticket[int]) -> int:
    return ticket.reply.value


def _bytes_in(data: Data) -> int:
    return len(data) if isinstance(data, bytes) else memoryview(data).nbytes


def _segments(ranges: Sequence[tuple[int, int]]) -> bytes:
    if not 0 < len(ranges) <= wire.SEGMENTS:
        raise BadArgument(f"{len(ranges)} ranges; 1 to {wire.SEGMENTS} go in one operation")
    if any(offset < 0 or length < 0 for offset, length in ranges):
        raise OutOfRange("a range has a negative offset or length")
    return b"".join(wire.SEGMENT.pack(offset, length) for offset, length in ranges)
