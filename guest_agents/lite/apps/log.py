"""LITE-Log: a log in the rack's memory that any number of blades append to, with one-sided operations only.

    python3 -m guest_agents.lite.apps.log create notes --on mb0 --size 1048576
    python3 -m guest_agents.lite.apps.log append notes --batch 4 < lines     # on any blade, at the same time on many
    python3 -m guest_agents.lite.apps.log read notes                         # what is committed
    python3 -m guest_agents.lite.apps.log clean notes --count 100            # take the oldest out and make room
    python3 -m guest_agents.lite.apps.log mend notes                         # without writers that have died
    python3 -m guest_agents.lite.apps.log drop notes

No server takes part. A writer reserves room by adding to the tail (LT_fetch-add), writes all of its transaction but
the first entry's word, and commits by writing that word; so the entries of a transaction appear together or not at all,
and in the order of the reservations. The cleaner clears the words of what it has taken (LT_memset), then moves the head
on.

The words lie in an index of their own, one for each UNIT bytes of the ring, zero where no entry begins. So when a
writer dies between reserving and committing, what comes after the gap can still be found, and the cleaner, who has
waited for it in vain, mends the log: as a master it revokes the rights to write, after which nobody who has not
committed can do so any more, however late he wakes; declares the gaps void; and grants the rights again. Writers who
were only slow learn that their transaction is not in the log, and append it again.
"""

from __future__ import annotations

import argparse
import struct
import sys
import time
import zlib
from collections.abc import Iterator, Sequence

from guest_agents import lite
from guest_agents.lite import Permission

TAIL, HEAD, INDEX = 0, 8, 64  # offsets in the LMR: bytes ever reserved, bytes ever cleaned, the index; then the ring
UNIT = 32  # entries begin at multiples of it
WORD = struct.Struct("<II")  # in the index: length and kind; and a checksum, as a reader may meet a half of the word
FIRST, MORE, VOID = 1 << 30, 2 << 30, 3 << 30  # kind: first of a transaction, one of the others, a gap
LENGTH = FIRST - 1
CHUNK = 64 << 10
WAIT_SECONDS = 0.005
PATIENCE = 15.0
"""Seconds the cleaner waits for a transaction before it takes its writer for dead. Wrong guesses only cost time."""
_CHANGE = Permission.WRITE | Permission.ATOMIC
_USE = Permission.READ | _CHANGE


class Log:
    """A log on an LMR. Positions are bytes since the log was made."""

    def __init__(self, memory: lite.Lmr) -> None:
        self.memory = memory
        units = (memory.size - INDEX) // (UNIT + WORD.size)
        self.capacity = units * UNIT
        self._ring = INDEX + units * WORD.size
        self._head = 0  # as last seen: it only grows
        self._stuck = (-1, 0.0)  # where the cleaner waits, and since when

    @classmethod
    def create(cls, node: lite.Node, name: str, size: int, on: str | None = None) -> Log:
        """Make a log for `size` bytes of entries at node `on`. It stays until somebody drops it."""
        units = -(-size // UNIT)
        needed = INDEX + units * (UNIT + WORD.size)
        return cls(node.malloc(needed, on, name=name, keep=True, permissions=Permission.ALL))

    @classmethod
    def open(cls, node: lite.Node, name: str) -> Log:
        """A log that is there."""
        return cls(node.map(name, _USE))

    def append(self, entries: Sequence[bytes], timeout: float = 60) -> int:
        """Append entries as one transaction; returns its position. TimedOut when nobody cleans a full log."""
        data = b"".join(entry + bytes(_span(entry) - len(entry)) for entry in entries)
        if not 0 < len(data) <= self.capacity:
            raise lite.BadArgument(f"a transaction of {len(data)} bytes in a log of {self.capacity}")
        words = b"".join(_word(entry, MORE if turn else FIRST) + bytes((_span(entry) // UNIT - 1) * WORD.size)
                         for turn, entry in enumerate(entries))  # fmt: skip
        deadline = time.monotonic() + timeout
        while True:
            try:
                return self._append(data, words, deadline)
            except (lite.Revoked, lite.PermissionDenied):  # the log was mended: nothing of this is in it
                self._open_again(deadline)

    def _append(self, data: bytes, words: bytes, deadline: float) -> int:
        position = self.memory.fetch_add(TAIL, len(data))
        while position + len(data) > self._head + self.capacity:
            self._head = self.number(HEAD)
            if time.monotonic() > deadline:
                raise lite.TimedOut("the log is full and nobody cleans it")
            time.sleep(WAIT_SECONDS)
        rest = words[WORD.size :]
        self.memory.scatter([*self._split(self._data(position, len(data)), data),
                             *self._split(self._index(position + UNIT, len(data) - UNIT), rest)])  # fmt: skip
        ((commit, _),) = self._index(position, UNIT)
        self.memory.write(words[: WORD.size], commit)
        return position

    def _open_again(self, deadline: float) -> None:
        while True:
            try:
                fresh = self.memory.node.map(self._name(), _USE)
                break
            except lite.PermissionDenied:
                if time.monotonic() > deadline:
                    raise lite.TimedOut("the log is being mended, and nobody ends that") from None
                time.sleep(WAIT_SECONDS)
        self.memory.unmap()
        self.memory = fresh

    def committed(self, position: int) -> Iterator[tuple[int, bytes]]:
        """The entries from `position` on, as far as they are committed, each with the position after it.

        OutOfRange when a cleaner has been there.
        """
        return ((end, entry) for end, entry in self._follow(position) if entry is not None)

    def _follow(self, position: int) -> Iterator[tuple[int, bytes | None]]:
        """Entries, and gaps (None)."""
        words = data = b""
        start = position
        while True:
            at = position - start
            word = words[at // UNIT * WORD.size :][: WORD.size]
            kind, length, checksum = _parse(word) if word else (FIRST, 1, 0)
            if not kind:
                return
            end = position + (length if kind == VOID else _span_of(length))
            if not word or end > start + len(data):
                tail, head = struct.unpack("<QQ", self.memory.read(16, TAIL))
                if position < head:
                    raise lite.OutOfRange(f"what was at {position} has been cleaned")
                # Not beyond one turn of the ring: there the oldest entries lie, until the head has moved.
                most = min(max(CHUNK, end - position), min(tail, head + self.capacity) - position)
                if most <= start + len(data) - position:
                    return
                words, data, start = *self._read(position, most), position
                continue
            entry = data[at : at + length]
            if checksum != (0 if kind == VOID else zlib.crc32(entry)):
                return  # only a part of the word is there
            position = end
            yield position, None if kind == VOID else entry

    def clean(self, most: int, patience: float = PATIENCE) -> list[bytes]:
        """Take out up to `most` of the oldest entries and make room. Only one cleaner at a time: Cancelled if not.

        When the oldest transaction stays uncommitted for `patience` seconds over several calls, the log is mended.
        """
        start = end = self.number(HEAD)
        taken: list[bytes] = []
        for end, entry in self._follow(start):  # noqa: B007
            if entry is not None:
                taken.append(entry)
            if len(taken) == most:
                break
        for at, length in self._index(start, end - start):
            self.memory.memset(0, at, length)
        if self.memory.compare_swap(HEAD, start, end) != start:
            raise lite.Cancelled("another cleaner is at work")
        if taken or self.number(TAIL) == end:
            self._stuck = (-1, 0.0)
        elif self._stuck[0] != end:
            self._stuck = (end, time.monotonic())
        elif time.monotonic() - self._stuck[1] >= patience:
            self.mend()
        return taken

    def mend(self) -> None:
        """Declare void what is reserved and not committed. If the mender dies at it, writers wait until somebody mends
        again."""
        node, name = self.memory.node, self._name()
        with node.lock(f"mend {name}"), node.map(name, Permission.ADMIN) as master:
            master.grant(_CHANGE)  # which a mender who died may have revoked
            with node.map(name, _USE | Permission.ADMIN) as memory:
                memory.revoke(_CHANGE)  # from everybody but this handle
                try:
                    Log(memory)._mend()
                finally:
                    memory.grant(_CHANGE)
        self._open_again(time.monotonic())
        self._stuck = (-1, 0.0)

    def _mend(self) -> None:
        """Nobody else changes the log meanwhile."""
        tail, head = struct.unpack("<QQ", self.memory.read(16, TAIL))
        begin, end = head, min(tail, head + self.capacity)
        words = self._gather(self._index(head, end - head))
        gaps: list[tuple[int, int]] = []
        while begin < end:
            begin = max((position for position, _entry in self._follow(begin)), default=begin)
            after = begin
            while after < end and (after == begin or _parse(words[(after - head) // UNIT * WORD.size :])[0] != FIRST):
                after += UNIT
            if after > begin:
                gaps.append((begin, after))
            begin = after
        for begin, after in gaps:
            for at, length in self._index(begin, after - begin):
                self.memory.memset(0, at, length)
            if after < end:
                ((place, _),) = self._index(begin, UNIT)
                self.memory.write(WORD.pack(after - begin | VOID, 0), place)
        if gaps and gaps[-1][1] >= end:
            self.memory.write(gaps[-1][0].to_bytes(8, "little"), TAIL)  # all reserved from there on is void

    def _name(self) -> str:
        assert self.memory.name is not None
        return self.memory.name

    def number(self, at: int) -> int:
        """TAIL or HEAD as they are now."""
        return int.from_bytes(self.memory.read(8, at), "little")

    def _data(self, position: int, length: int) -> list[tuple[int, int]]:
        """Where `length` bytes at `position` lie in the ring: one range, or two if they go around its end."""
        at = position % self.capacity
        first = min(length, self.capacity - at)
        return [(start, size) for start, size in ((self._ring + at, first), (self._ring, length - first)) if size > 0]

    def _index(self, position: int, length: int) -> list[tuple[int, int]]:
        """Where the words of these bytes lie."""
        return [(INDEX + (at - self._ring) // UNIT * WORD.size, size // UNIT * WORD.size)
                for at, size in self._data(position, length)]  # fmt: skip

    @staticmethod
    def _split(ranges: list[tuple[int, int]], data: bytes) -> list[tuple[int, bytes]]:
        parts, done = [], 0
        for at, length in ranges:
            parts.append((at, data[done : done + length]))
            done += length
        return parts

    def _read(self, position: int, length: int) -> tuple[bytes, bytes]:
        """The words and the bytes of a range."""
        index = self._index(position, length)
        both = self._gather([*index, *self._data(position, length)])
        words = sum(size for _at, size in index)
        return both[:words], both[words:]

    def _gather(self, ranges: list[tuple[int, int]]) -> bytes:
        return b"".join(self.memory.gather(ranges)) if ranges else b""


def _span(entry: bytes) -> int:
    return _span_of(len(entry))


def _span_of(length: int) -> int:
    """Bytes an entry takes in the ring."""
    return max(1, -(-length // UNIT)) * UNIT


def _word(entry: bytes, kind: int) -> bytes:
    return WORD.pack(len(entry) | kind, zlib.crc32(entry))


def _parse(word: bytes) -> tuple[int, int, int]:
    """Kind (0: none), length, checksum."""
    length, checksum = WORD.unpack_from(word)
    return length & ~LENGTH, length & LENGTH, checksum


def main(words: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="log", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("do", choices=["create", "append", "read", "clean", "mend", "drop"])
    parser.add_argument("name")
    parser.add_argument("--on", help="create: the node whose memory holds the log (this one)")
    parser.add_argument("--size", type=int, default=1 << 20, help="create: bytes (1 MiB)")
    parser.add_argument("--batch", type=int, default=1, help="append: lines per transaction (1)")
    parser.add_argument("--count", type=int, help="clean: stop after so many entries, waiting for them (what is there)")
    patience = "clean --count: seconds to wait for a writer before the log is mended (%(default)g)"
    parser.add_argument("--patience", type=float, default=PATIENCE, help=patience)
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
        if asked.do == "mend":
            log.mend()
        elif asked.do == "append":
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
                taken = log.clean(1000 if left is None else min(left, 1000), asked.patience)
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
