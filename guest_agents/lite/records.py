"""What the directory and the tiers say about an LMR, and how its bytes are cut into blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from guest_agents.lite.blocks import UNIT
from guest_agents.membership import Life

BLOCK = 4 << 20
"""Largest block of an LMR, bytes, as in LITE."""
PAGE = 4096
"""When an LMR is spread, blocks are multiples of this."""


class Piece(NamedTuple):
    """A block of an LMR: where it is in which life of which node."""

    node: int
    incarnation: int
    address: int
    rkey: int
    length: int

    @property
    def life(self) -> Life:
        """Whose memory it is."""
        return Life(self.node, self.incarnation)


class Part(NamedTuple):
    """A range of bytes in one block, and where that range begins in the LMR."""

    piece: Piece
    address: int
    length: int
    offset: int


@dataclass
class Record:
    """An LMR. Everyone who hosts or maps it has a copy; the directory's is the newest, by `version`."""

    lmr: int
    size: int
    blocks: list[Piece]
    name: str | None = None
    keep: bool = False
    permissions: int = 0
    """Of whoever maps it by its name."""
    grants: dict[str, int] = field(default_factory=dict)
    """More, by "*", node name or "node/client"."""
    version: int = 1

    def to_json(self) -> dict[str, Any]:
        """For a control message."""
        return {**vars(self), "blocks": list(self.blocks), "grants": dict(self.grants)}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Record:
        """What `to_json` made."""
        return Record(**{**data, "blocks": [Piece(*piece) for piece in data["blocks"]]})

    def hosts(self) -> set[Life]:
        """The lives that have its blocks."""
        return {piece.life for piece in self.blocks}

    def allowed(self, node: str, client: int) -> int:
        """What a client of a node may map it for."""
        return self.permissions | self.grants.get("*", 0) | self.grants.get(node, 0) | self.grants.get(
            f"{node}/{client}", 0)  # fmt: skip

    def parts(self, offset: int, length: int) -> Iterator[Part]:
        """The range block by block, in order."""
        begin = 0
        for piece in self.blocks:
            low, high = max(offset, begin), min(offset + length, begin + piece.length)
            if low < high:
                yield Part(piece, piece.address + low - begin, high - low, low)
            begin += piece.length


def cut(size: int, ways: int) -> list[int]:
    """Lengths of the blocks of an LMR that goes to `ways` nodes in turn: as even as pages allow, at most BLOCK."""
    even = -(-size // ways)
    length = min(BLOCK, -(-even // PAGE) * PAGE) if ways > 1 else BLOCK
    whole, rest = divmod(size, length)
    return [length] * whole + ([rest] if rest else [])


def room(lengths: Iterable[int]) -> int:
    """Bytes that blocks of these lengths take."""
    return sum(-(-length // UNIT) * UNIT for length in lengths)
