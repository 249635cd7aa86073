"""What is said of a dataset: its record, which every node has while the dataset is open, and ranges of bytes in it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from guest_agents.hotpot.blocks import PAGE, STRIDE
from guest_agents.hotpot.errors import BadArgument, NotMapped, Overlap

REGION = 0x2000_0000_0000
REGION_BYTES = 1 << 40
"""Where datasets are mapped in every program: a TiB that Linux gives to nobody by itself on 47-bit and larger systems
(programs and their heaps begin at 0x5555..., libraries end at 0x7fff...)."""
ALIGN = 1 << 30
CHUNK = 4 << 20
"""Default size of a chunk (the paper's data region)."""
SETTINGS = {"protocol": 3, "page": PAGE, "stride": STRIDE}
"""What must be the same in all parts of Hotpot of a rack."""
MODES = ("mrmw", "mrsw")
MAX_NAME = 128

Area = tuple[int, int]
"""Offset in the dataset and length, bytes."""


@dataclass(frozen=True)
class Record:
    """A dataset. Sizes in bytes."""

    id: int
    name: str
    size: int
    mode: str
    """mrmw: many writers at a time, who find out at the commit; mrsw: one writer per page at a time."""
    chunk: int
    address: int
    homes: tuple[int, ...]
    """Node id of the home of each part. Chunk n is of part n modulo the number of parts."""
    moves: tuple[int, ...] = ()
    """How often each part has got another home."""
    adapt: bool = False
    """Parts move to the nodes that use them most."""

    @property
    def pages(self) -> int:
        """Pages it has."""
        return self.size // PAGE

    @property
    def chunk_pages(self) -> int:
        """Pages of a chunk; the last chunk may have fewer."""
        return self.chunk // PAGE

    @property
    def chunks(self) -> int:
        """Chunks it has."""
        return -(-self.size // self.chunk)

    @property
    def owners(self) -> tuple[int, ...]:
        """Node id of the owner of each chunk."""
        return tuple(self.homes[chunk % len(self.homes)] for chunk in range(self.chunks))

    def epoch(self, part: int) -> int:
        """How often a part has got another home."""
        return self.moves[part] if self.moves else 0

    def part(self, page: int) -> int:
        """The part to which a page belongs: pages that have their home together."""
        return page // self.chunk_pages % len(self.homes)

    def owner(self, page: int) -> int:
        """Node id of a page's owner."""
        return self.homes[self.part(page)]

    def slot(self, page: int) -> int:
        """Where the page lies among those of its part, whose chunks lie one after the other."""
        chunk, rest = divmod(page, self.chunk_pages)
        return chunk // len(self.homes) * self.chunk_pages + rest

    def slots(self, part: int) -> int:
        """Pages for which the home of a part has room."""
        return len(range(part, self.chunks, len(self.homes))) * self.chunk_pages

    def pages_of(self, part: int) -> Iterator[int]:
        """The pages of a part."""
        for chunk in range(part, self.chunks, len(self.homes)):
            yield from self.pages_in(chunk)

    def pages_in(self, chunk: int) -> range:
        """The pages of a chunk."""
        return range(chunk * self.chunk_pages, min((chunk + 1) * self.chunk_pages, self.pages))

    def moved(self, part: int, node: int) -> Record:
        """The same with another home for a part."""
        homes, moves = list(self.homes), list(self.moves or [0] * len(self.homes))
        homes[part], moves[part] = node, moves[part] + 1
        return replace(self, homes=tuple(homes), moves=tuple(moves))

    def to_json(self) -> dict[str, Any]:
        """For messages."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Record:
        """Back from `to_json`."""
        return cls(**{**fields, "homes": tuple(fields["homes"]), "moves": tuple(fields["moves"])})


class Piece(NamedTuple):
    """The part of an area in one page."""

    offset: int
    """In the page."""
    length: int


def check_areas(record: Record, areas: Iterable[Sequence[int]]) -> list[Area]:
    """The areas, sorted. NotMapped, Overlap, BadArgument."""
    given = list(areas)
    if not given:
        raise BadArgument("no range is given")
    if not all(len(area) == 2 and all(type(number) is int for number in area) for area in given):
        raise BadArgument("a range is an offset and a length")
    sorted_areas = sorted((offset, length) for offset, length in given)
    end = 0
    for offset, length in sorted_areas:
        if length <= 0:
            raise BadArgument(f"a range of {length} bytes")
        if offset < 0 or offset + length > record.size:
            raise NotMapped(f"{length} bytes at {offset} are not in {record.name}, which has {record.size}")
        if offset < end:
            raise Overlap(f"two ranges have byte {offset}")
        end = offset + length
    return sorted_areas


def by_page(areas: Iterable[Area]) -> dict[int, list[Piece]]:
    """The parts of areas in each page they touch."""
    pieces: dict[int, list[Piece]] = defaultdict(list)
    for offset, length in areas:
        for page, piece in _pieces(offset, length):
            pieces[page].append(piece)
    return dict(pieces)


def _pieces(offset: int, length: int) -> Iterator[tuple[int, Piece]]:
    while length:
        page, start = divmod(offset, PAGE)
        part = min(length, PAGE - start)
        yield page, Piece(start, part)
        offset, length = offset + part, length - part


def patched(data: bytes, pieces: Iterable[tuple[Piece, bytes | memoryview]]) -> bytes:
    """A page with some of its bytes replaced."""
    page = bytearray(data)
    for piece, new in pieces:
        page[piece.offset : piece.offset + piece.length] = new
    return bytes(page)
