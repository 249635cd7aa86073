"""What a transaction wants of pages, as it goes in messages and in logs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from guest_agents.hotpot.blocks import PAGE, Copy
from guest_agents.hotpot.errors import BadArgument
from guest_agents.hotpot.records import Piece, patched


@dataclass(frozen=True)
class Change:
    """What a transaction wants of one page."""

    page: int
    expected: int
    """Version that must be the present one; -1: any."""
    pieces: Sequence[tuple[Piece, bytes | memoryview]]
    """Empty: the page was only read."""

    def onto(self, copy: Copy, xid: int, degree: int) -> Copy:
        """The page after it."""
        return Copy(self.expected + 1, patched(copy.data, self.pieces), xid, max(degree, copy.degree))


def encode(changes: Iterable[Change]) -> tuple[list[Any], bytes]:
    """For a message: what goes in its header, and its bytes."""
    listed = list(changes)
    header = [[c.page, c.expected, [list(piece) for piece, _ in c.pieces]] for c in listed]
    return header, b"".join(data for c in listed for _, data in c.pieces)


def decode(header: list[Any], payload: memoryview) -> list[Change]:
    """Back from `encode`. BadArgument."""
    changes, at = [], 0
    for page, expected, pieces in header:
        taken = []
        for offset, length in pieces:
            if not 0 <= offset <= offset + length <= PAGE:
                raise BadArgument(f"{length} bytes at {offset} of a page")
            taken.append((Piece(offset, length), payload[at : at + length]))
            at += length
        changes.append(Change(page, expected, taken))
    if at != len(payload):
        raise BadArgument("the bytes do not fit the ranges")
    return changes
