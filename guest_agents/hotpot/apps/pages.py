"""A dataset as pages of rows, which transactions change whole and which anybody may read by plain loads.

A plain load may come while a commit arrives here; the checksum of the page tells, and `peek` looks again. Pages refer
to each other by address: a dataset is at the same one in every program.
"""

from __future__ import annotations

import struct
import time
import zlib
from dataclasses import dataclass, field

from guest_agents import hotpot

PAGE = 4096
FRESH = 0
"""Kind of a page that was never stored: all zeros."""
Row = tuple[bytes, bytes, bytes]
_HEADER = struct.Struct("<IHHQ")  # checksum of the rest, kind, rows, link
_LENGTHS = struct.Struct("<HHH")
ROOM = PAGE - _HEADER.size
_TORN_SECONDS = 30.0
_PAUSE_SECONDS = 0.0005


@dataclass
class Page:
    """Rows of three byte strings, and the address of another page (0: none)."""

    kind: int = FRESH
    link: int = 0
    rows: list[Row] = field(default_factory=list)

    @property
    def room(self) -> int:
        """Bytes that are free; negative when it has too much to be stored."""
        return ROOM - sum(span(row) for row in self.rows)

    def pack(self) -> bytes:
        """Its bytes."""
        body = b"".join(_LENGTHS.pack(*map(len, row)) + b"".join(row) for row in self.rows)
        rest = _HEADER.pack(0, self.kind, len(self.rows), self.link)[4:] + body.ljust(ROOM, b"\0")
        return zlib.crc32(rest).to_bytes(4, "little") + rest

    @classmethod
    def unpack(cls, data: bytes) -> Page:
        """The page of these bytes; hotpot.Corrupt if they do not have their checksum."""
        checksum, kind, count, link = _HEADER.unpack_from(data)
        if not checksum and not any(data):
            return cls()
        if zlib.crc32(memoryview(data)[4:]) != checksum:
            raise hotpot.Corrupt
        rows, at = [], _HEADER.size
        for _ in range(count):
            one, two, three = _LENGTHS.unpack_from(data, at)
            at += _LENGTHS.size
            rows.append((data[at : at + one], data[at + one : at + one + two],
                         data[at + one + two : at + one + two + three]))  # fmt: skip
            at += one + two + three
        return cls(kind, link, rows)


def span(row: Row) -> int:
    """Bytes that a row takes."""
    return _LENGTHS.size + sum(map(len, row))


def peek(dataset: hotpot.Dataset, address: int) -> Page:
    """A page by plain loads: committed, or just being committed by a program of this blade. Corrupt, if it stays so."""
    at, deadline = address - dataset.address, time.monotonic() + _TORN_SECONDS
    while True:
        try:
            return Page.unpack(bytes(dataset.memory[at : at + PAGE]))
        except hotpot.Corrupt:
            if time.monotonic() > deadline:
                raise hotpot.Corrupt(f"the page at {at} of {dataset.name} does not have its checksum") from None
            time.sleep(_PAUSE_SECONDS)


class Work:
    """The pages of one transaction; a page is acquired when it is first loaded or stored."""

    def __init__(self, transaction: hotpot.Transaction) -> None:
        self._transaction = transaction
        self._dataset = transaction.dataset
        self._views: dict[int, memoryview] = {}

    def load(self, address: int) -> Page:
        """The page as it will be if the transaction is committed."""
        return Page.unpack(bytes(self._view(address)))

    def store(self, address: int, page: Page) -> None:
        """Replace the page."""
        self._view(address)[:] = page.pack()

    def _view(self, address: int) -> memoryview:
        if address not in self._views:
            self._views[address] = self._transaction.acquire(address - self._dataset.address, PAGE)
        return self._views[address]


class Allocator:
    """Pages of a dataset that nobody uses yet, one after the other; none comes back.

    address -- of the page that says which is next
    """

    def __init__(self, dataset: hotpot.Dataset, address: int) -> None:
        self._address = address
        self._end = dataset.address + dataset.size

    def format(self, work: Work, first: int) -> None:
        """The first free page is at address `first`."""
        work.store(self._address, Page(1, first))

    def take(self, work: Work) -> int:
        """Address of a page for this transaction. hotpot.NoSpace."""
        address = work.load(self._address).link
        if address + PAGE > self._end:
            raise hotpot.NoSpace("the dataset has no free page left")
        work.store(self._address, Page(1, address + PAGE))
        return address
