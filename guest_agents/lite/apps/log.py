"""LITE-Log: a log in the rack's memory that any number of blades append to, with one-sided operations only.

    python3 -m guest_agents.lite.apps.log create notes --on mb0 --size 1048576
    python3 -m guest_agents.lite.apps.log append notes --batch 4 < lines     # on any blade, at the same time on many
    python3 -m guest_agents.lite.apps.log read notes                         # what is committed
    python3 -m guest_agents.lite.apps.log clean notes --count 100            # take the oldest out and make room
    python3 -m guest_agents.lite.apps.log drop notes

No server takes part. A writer reserves room by adding to the tail (LT_fetch-add), writes all of its transaction but
the first word, and commits by writing that word; so the entries of a transaction appear together or not at all, and
in the order of the reservations. The cleaner clears what it has taken (LT_memset), then moves the head on.

A writer that dies between reserving and committing leaves a gap at which readers stop: LITE's log has no repair.
"""

from __future__ import annotations

import argparse
import struct
import sys
import time
import zlib
from collections.abc import Iterator, Sequence

from guest_agents import lite

TAIL, HEAD, RING = 0, 8, 64  # offsets in the LMR: bytes ever reserved, bytes ever cleaned, the ring itself
WORD = struct.Struct("<II")  # before each entry: its length + 1, and a checksum: a reader may meet a half of it
CHUNK = 64 << 10
WAIT_SECONDS = 0.005


class Log:
    """A log on an LMR. Positions are bytes since the log was made."""

    def __init__(self, memory: lite.Lmr) -> None:
        self.memory = memory
        self.capacity = (memory.size - RING) // 8 * 8
        self._head = 0  # as last seen: it only grows

    @classmethod
    def create(cls, node: lite.Node, name: str, size: int, on: str | None = None) -> Log:
        """Make a log for `size` bytes of entries at node `on`. It stays until somebody drops it."""
        return cls(node.malloc(RING + size, on, name=name, keep=True, permissions=lite.Permission.ALL))

    @classmethod
    def open(cls, node: lite.Node, name: str) -> Log:
        """A log that is there."""
        return cls(node.map(name, lite.Permission.USE | lite.Permission.ATOMIC))

    def append(self, entries: Sequence[bytes], timeout: float = 60) -> int:
        """Append entries as one transaction; returns its position. TimedOut when nobody cleans a full log."""
        record = b"".join(_word(entry) + entry + bytes(-len(entry) % 8) for entry in entries)
        if not 0 < len(record) <= self.capacity:
            raise lite.BadArgument(f"a transaction of {len(record)} bytes in a log of {self.capacity}")
        position = self.memory.fetch_add(TAIL, len(record))
        deadline = time.monotonic() + timeout
        while position + len(record) > self._head + self.capacity:
            self._head = self.number(HEAD)
            if time.monotonic() > deadline:
                raise lite.TimedOut("the log is full and nobody cleans it")
            time.sleep(WAIT_SECONDS)
        if len(record) > WORD.size:
            self._write(position + WORD.size, record[WORD.size :])
        self._write(position, record[: WORD.size])
        return position

    def committed(self, position: int) -> Iterator[tuple[int, bytes]]:
        """The entries from `position` on, as far as they are committed, each with the position after it.

        OutOfRange when a cleaner has been there.
        """
        data, start = b"", position
        while True:
            word = data[position - start :][: WORD.size]
            length, checksum = WORD.unpack(word) if len(word) == WORD.size else (1, 0)
            if not length:
                return
            end = position + WORD.size + length - 1
            if len(word) < WORD.size or end > start + len(data):
                tail, head = struct.unpack("<QQ", self.memory.read(16, TAIL))
                if position < head:
                    raise lite.OutOfRange(f"what was at {position} has been cleaned")
                # Not beyond one turn of the ring: there the oldest entries lie, until the head has moved.
                more = self._read(position, min(max(CHUNK, end - position), min(tail, head + self.capacity) - position))
                if len(more) <= start + len(data) - position:
                    return
                data, start = more, position
                continue
            entry = data[position - start + WORD.size : end - start]
            if zlib.crc32(entry) != checksum:
                return  # not all of it is there yet
            position = end + -len(entry) % 8
            yield position, entry

    def clean(self, most: int) -> list[bytes]:
        """Take out up to `most` of the oldest entries and make room. Only one cleaner at a time: Cancelled if not."""
        start = self.number(HEAD)
        end, taken = start, []
        for end, entry in self.committed(start):  # noqa: B007
            taken.append(entry)
            if len(taken) == most:
                break
        for at, length in self._places(start, end - start):
            self.memory.memset(0, at, length)
        if self.memory.compare_swap(HEAD, start, end) != start:
            raise lite.Cancelled("another cleaner is at work")
        return taken

    def number(self, at: int) -> int:
        """TAIL or HEAD as they are now."""
        return int.from_bytes(self.memory.read(8, at), "little")

    def _places(self, position: int, length: int) -> list[tuple[int, int]]:
        """Where `length` bytes at `position` lie in the ring: one range, or two if they go around its end."""
        at = position % self.capacity
        first = min(length, self.capacity - at)
        ranges = [(RING + at, first), (RING, length - first)]
        return [(start, size) for start, size in ranges if size]

    def _write(self, position: int, data: bytes) -> None:
        parts, done = [], 0
        for at, length in self._places(position, len(data)):
            parts.append((at, data[done : done + length]))
            done += length
        self.memory.scatter(parts)

    def _read(self, position: int, length: int) -> bytes:
        return b"".join(self.memory.gather(self._places(position, length))) if length > 0 else b""


def _word(entry: bytes) -> bytes:
    return WORD.pack(len(entry) + 1, zlib.crc32(entry))


def main(words: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="log", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("do", choices=["create", "append", "read", "clean", "drop"])
    parser.add_argument("name")
    parser.add_argument("--on", help="create: the node whose memory holds the log (this one)")
    parser.add_argument("--size", type=int, default=1 << 20, help="create: bytes (1 MiB)")
    parser.add_argument("--batch", type=int, default=1, help="append: lines per transaction (1)")
    parser.add_argument("--count", type=int, help="clean: stop after so many entries, waiting for them (what is there)")
    asked = parser.parse_args(words)
    out = sys.stdout.buffer
    with lite.connect() as node:
        if asked.do == "create":
            Log.create(node, asked.name, asked.size, asked.on)
            return
        if asked.do == "drop":
            node.map(asked.name, lite.Permission.ADMIN).free()
            return
        log = Log.open(node, asked.name)
        if asked.do == "append":
            lines = sys.stdin.buffer.read().splitlines()
            began = time.monotonic()
            for start in range(0, len(lines), asked.batch):
                log.append(lines[start : start + asked.batch])
            seconds = time.monotonic() - began
            print(f"{len(lines)} entries in {-(-len(lines) // asked.batch)} transactions, {seconds:.2f} s")
        elif asked.do == "read":
            for _position, entry in log.committed(log.number(HEAD)):
                out.write(entry + b"\n")
        else:
            left = asked.count
            while left is None or left > 0:
                taken = log.clean(1000 if left is None else min(left, 1000))
                out.write(b"".join(entry + b"\n" for entry in taken))
                if left is None:
                    if not taken:
                        return
                else:
                    left -= len(taken)
                    if left and not taken:
                        time.sleep(WAIT_SECONDS)


if __name__ == "__main__":
    main()
