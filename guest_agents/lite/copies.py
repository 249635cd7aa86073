"""memset, memcpy and memmove, executed at the nodes that have the data.

The program's tier cuts the ranges by blocks and asks the nodes; both LMRs stay as they are meanwhile (`Lmrs.use`).
A copy is done by the target's node, which reads the source over RDMA. (In LITE the source's writes.) So if the program
and its blade die in the middle, the node whose memory is written is the one that knows, and does not give it to others
before the copy has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import NamedTuple, Protocol

from guest_agents.control import Handler, Message
from guest_agents.lite.blocks import Blocks
from guest_agents.lite.links import Links
from guest_agents.lite.records import Part, Piece, Record
from guest_agents.membership import Life

_SECONDS = 30.0
_SECONDS_PER_BYTE = 1 / (1 << 20)
"""A blade without KVM copies faster, but others want to run too."""


class Copier(Protocol):
    """What of the core this needs."""

    def memset_local(self, address: int, byte: int, length: int) -> None: ...

    def memmove_local(self, target: int, source: int, length: int) -> None: ...

    def read_into(self, node: int, address: int, rkey: int, target: int, length: int) -> None: ...


class Copies:
    """Both sides.

    own -- this node's life
    connect -- connects to a node if that is not done yet
    """

    def __init__(
        self, core: Copier, blocks: Blocks, links: Links, own: Callable[[], Life], connect: Callable[[Life], None]
    ) -> None:
        self._core = core
        self._blocks = blocks
        self._links = links
        self._own = own
        self._connect = connect

    def handlers(self) -> dict[str, Handler]:
        """Control operations of other tiers, and of the directory when a block moves."""
        return {"lite.memory.set": self.set_here, "lite.memory.copy": self.copy_here,
                "lite.block.copy": self.fetch_block}  # fmt: skip

    def memset(self, record: Record, offset: int, length: int, byte: int) -> None:
        """Fill a range of an LMR."""
        for life, parts in _by_node(record.parts(offset, length)):
            ranges = [(part.address, part.length) for part in parts]
            self._links.call(life, "lite.memory.set", _patience(length), lmr=record.lmr, ranges=ranges, byte=byte)

    def memmove(self, source: Record, soffset: int, target: Record, toffset: int, length: int) -> None:
        """Copy a range of an LMR to another, or to another place in the same, as if by way of a third place."""
        pairs = list(_pairs(source, soffset, target, toffset, length))
        if source.lmr == target.lmr and soffset < toffset:
            pairs.reverse()  # what lies in the way is copied before it is overwritten
        for life, group in groupby(pairs, lambda pair: pair[1].piece.life):
            jobs = [(_place(a.piece), a.address, b.address, b.length) for a, b in group]
            self._links.call(life, "lite.memory.copy", _patience(length), lmr=target.lmr, jobs=jobs)

    def set_here(self, request: Message) -> Message:
        """lite.memory.set: fill ranges of our blocks."""
        for address, length in request["ranges"]:
            with self._blocks.using(request["lmr"], address, length):
                self._core.memset_local(address, int(request["byte"]), length)
        return {}

    def copy_here(self, request: Message) -> Message:
        """lite.memory.copy: copy into our blocks, in the order given."""
        for place, source, target, length in request["jobs"]:
            self._fetch(request["lmr"], Place(*place), source, target, length)
        return {}

    def fetch_block(self, request: Message) -> Message:
        """lite.block.copy: a block moves here; nobody uses it meanwhile."""
        piece = Piece(*request["source"])
        self._fetch(request["lmr"], _place(piece), piece.address, request["address"], piece.length)
        return {}

    def _fetch(self, lmr: int, place: Place, source: int, target: int, length: int) -> None:
        life = Life(place.node, place.incarnation)
        with self._blocks.using(lmr, target, length):
            if life == self._own():
                self._core.memmove_local(target, source, length)
            else:
                self._connect(life)
                self._core.read_into(place.node, source, place.rkey, target, length)


class Place(NamedTuple):
    """Whose memory an address is in."""

    node: int
    incarnation: int
    rkey: int


def _place(piece: Piece) -> Place:
    return Place(piece.node, piece.incarnation, piece.rkey)


def _by_node(parts: Iterator[Part]) -> Iterator[tuple[Life, list[Part]]]:
    found: dict[Life, list[Part]] = {}
    for part in parts:
        found.setdefault(part.piece.life, []).append(part)
    yield from found.items()


def _pairs(source: Record, soffset: int, target: Record, toffset: int, length: int) -> Iterator[tuple[Part, Part]]:
    """The ranges, cut where a block of either LMR ends: parts of equal length."""
    for theirs in source.parts(soffset, length):
        begin = toffset + theirs.offset - soffset
        for ours in target.parts(begin, theirs.length):
            skip = ours.offset - begin
            yield Part(theirs.piece, theirs.address + skip, ours.length, theirs.offset + skip), ours


def _patience(length: int) -> float:
    return _SECONDS + length * _SECONDS_PER_BYTE
