"""The file buffer cache of a memory blade: data goes processor -> memory -> storage (LegoOS, section 4.3 and 4.4).

A processor blade sends READs and WRITEs of files here and all else to the storage blade itself. A READ says which
version of the contents the processor blade knows; what is kept of exactly that version is answered from here, and
anything else is asked of the storage blade. So what is kept may be anything and anywhere: coherence is the versions'
matter, and this blade needs to be told of no change, whoever makes it. A WRITE goes through to the storage blade
before it is answered, and what is kept of the version before it becomes the version after it.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from guest_agents.budget import Budget
from guest_agents.splitkernel.memory.blocks import BLOCK, Blocks
from guest_agents.splitkernel.opcodes import BUFFERED, STORAGE, Tally
from guest_agents.splitkernel.storage import wire
from guest_agents.splitkernel.storage.wire import Op, Request, Version
from guest_agents.verbs.lost import Caller, LostError

SERVICE = "buffers"
SHARE = 4
"""One of so many parts of a blade's memory may be buffers. They give way to programs and LITE."""
MAYBE, NOT_SENT = errno.ECOMM, wire.NOT_NOW
"""Answers when the storage blade gives none: it may have carried the request out, or has not had it."""
COUNTED = ("hits", "misses", "bytes_hit", "bytes_missed", "bytes_written")


class Buffers:
    """Answers READs and WRITEs; any number of threads may ask.

    storage -- asks the file service of a storage blade
    """

    def __init__(self, budget: Budget, storage: Callable[[str], Caller]) -> None:
        self._storage = storage
        self._callers: dict[str, Caller] = {}
        self.blocks = Blocks(budget, budget.total // SHARE)
        budget.spare = self.blocks.shrink
        self.tally = Tally()
        self._counts = dict.fromkeys(COUNTED, 0)
        self._lock = threading.Lock()

    def stats(self) -> dict[str, int]:
        """READs answered from here alone and others, and bytes; what is kept."""
        with self._lock:
            return {**self._counts, **self.blocks.counts()}

    def handle(self, opcode: int, first: memoryview, second: memoryview, out: memoryview) -> tuple[int, int]:
        """One request of the RPC service; see rpc.Handle."""
        request = wire.decode(first)
        if opcode not in BUFFERED or not request.second or not request.identity:
            raise OSError(errno.ENOSYS, f"request {opcode} is not for a memory blade")
        op = Op(opcode)
        self.tally.add(BUFFERED[op])
        try:
            return self._write(request, second, out) if op is Op.WRITE else self._read(request, second, out)
        except LostError as lost:
            if op is Op.WRITE:
                self.blocks.drop(_key(request))
            raise OSError(MAYBE if lost.sent else NOT_SENT, str(lost)) from lost

    def _read(self, r: Request, known: memoryview, out: memoryview) -> tuple[int, int]:
        """Reply: version, bytes that the storage blade was asked for; the data."""
        version = wire.unpack_version(known) if len(known) == wire.VERSION_BYTES else None
        room = out[wire.VERSION_BYTES + wire.COUNT.size :][: min(r.b, wire.MAX_REPLY)]
        if version is not None:
            data = room[: max(0, version.size - r.a)]
            missing = self.blocks.read(_key(r), version, r.a, data)
            if missing is not None and all(self._fill(r, version, one, data) for one in _pieces(missing)):
                asked = sum(past - first for first, past in missing)
                return self._reply(version, asked, len(data), out)
        start, past = r.a // BLOCK * BLOCK, -(-(r.a + len(room)) // BLOCK) * BLOCK
        if past - start > wire.MAX_REPLY:
            start, past = r.a, r.a + len(room)

        def take(head: memoryview, found: memoryview) -> tuple[Version, int, int]:
            label = wire.unpack_version(head)
            self.blocks.keep(_key(r), label, start, found)
            wanted = found[r.a - start :][: len(room)]
            room[: len(wanted)] = wanted
            return label, max(len(found), 1), len(wanted)

        label, asked, length = self._ask(Op.READ, r, start, past - start, take)
        return self._reply(label, asked, length, out)

    def _fill(self, r: Request, version: Version, piece: tuple[int, int], data: memoryview) -> bool:
        """Read a missing piece into its place; False if the storage blade has another version now."""
        first, past = piece

        def take(head: memoryview, found: memoryview) -> bool:
            label = wire.unpack_version(head)
            self.blocks.keep(_key(r), label, first, found)
            if label != version or len(found) < past - first:
                return False
            low, high = max(first, r.a), min(past, r.a + len(data))
            data[low - r.a : high - r.a] = found[low - first : high - first]
            return True

        return bool(self._ask(Op.READ, r, first, past - first, take))

    def _reply(self, version: Version, asked: int, length: int, out: memoryview) -> tuple[int, int]:
        head = version.pack() + wire.COUNT.pack(asked)
        out[: len(head)] = head
        with self._lock:
            self._counts["misses" if asked else "hits"] += 1
            self._counts["bytes_missed"] += asked
            self._counts["bytes_hit"] += max(length - asked, 0)
        return len(head), length

    def _write(self, r: Request, data: memoryview, out: memoryview) -> tuple[int, int]:
        def take(head: memoryview, _none: memoryview) -> int:
            done, at, _ = wire.WRITTEN.unpack_from(head)
            before, after = (wire.unpack_version(head, wire.WRITTEN.size + n * wire.VERSION_BYTES) for n in (0, 1))
            self.blocks.written(_key(r), before, after, at, data[:done])
            out[: len(head)] = head
            with self._lock:
                self._counts["bytes_written"] += done
            return len(head)

        return int(self._ask(Op.WRITE, r, r.a, r.b, take, data)), 0

    def _ask(
        self, op: Op, r: Request, a: int, b: int, take: Callable[[memoryview, memoryview], Any],
        data: memoryview = memoryview(b""),  # noqa: B008  # nothing, and never changed
    ) -> Any:  # fmt: skip
        self.tally.add(STORAGE[op])
        with self._lock:
            caller = self._callers.get(r.second)
            if caller is None:
                caller = self._callers[r.second] = self._storage(r.second)
        request = wire.encode(r.path, a=a, b=b, c=r.c, flags=r.flags, identity=r.identity)
        return caller.call(op, request, data, take)


def _pieces(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The same in pieces that one READ brings."""
    for first, past in ranges:
        for start in range(first, past, wire.MAX_REPLY):
            yield start, min(start + wire.MAX_REPLY, past)


def _key(r: Request) -> tuple[str, int]:
    return r.second, r.identity
