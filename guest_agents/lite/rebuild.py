"""What the members of a restarted manager report about LITE, put together again."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from guest_agents.control import Message
from guest_agents.lite.records import Record
from guest_agents.membership import Life

Claim = tuple[Life, int, int]
"""A handle: life, client, permissions."""


class Rebuild:
    """Collects reports (tier.report) of lives that go on."""

    def __init__(self) -> None:
        self._reports: dict[Life, Message] = {}
        self._kept: set[tuple[Life, int]] = set()

    def add(self, life: Life, report: Message) -> None:
        """What that life holds; a later report of the same life replaces it."""
        self._reports[life] = report

    def drop(self, life: Life) -> None:
        """That life is over."""
        self._reports.pop(life, None)

    def records(self, is_alive: Callable[[Life], bool]) -> Iterator[tuple[Record, dict[int, Claim]]]:
        """Every LMR, in its newest version, with its handles by ticket.

        An LMR of which a living host has not all blocks any more was being freed when the manager died: it is left out.
        """
        newest: dict[int, Record] = {}
        for report in self._reports.values():
            for data in report["records"]:
                record = Record.from_json(data)
                if record.lmr not in newest or newest[record.lmr].version < record.version:
                    newest[record.lmr] = record
        handles: dict[int, dict[int, Claim]] = {}
        for life, report in self._reports.items():
            for lmr, ticket, client, permissions in report["handles"]:
                handles.setdefault(lmr, {})[ticket] = (life, client, permissions)
        there = {(life, address) for life, _lmr, address in self._blocks()}
        self._kept = set()
        for record in newest.values():
            if all((piece.life, piece.address) in there for piece in record.blocks if is_alive(piece.life)):
                self._kept |= {(piece.life, piece.address) for piece in record.blocks}
                yield record, handles.get(record.lmr, {})

    def strays(self) -> list[tuple[Life, int, int]]:
        """Blocks of no LMR (life, lmr, address), after `records` was read to its end."""
        return [(life, lmr, address) for life, lmr, address in self._blocks() if (life, address) not in self._kept]

    @property
    def frozen(self) -> list[tuple[int, Life]]:
        """LMRs that wait for the end of a move that the last manager began."""
        return [(lmr, life) for life, report in self._reports.items() for lmr in report["frozen"]]

    @property
    def idle(self) -> list[tuple[int, Life]]:
        """LMRs known to lives in which nobody has a handle: the last manager died in the middle of a map."""
        return [(lmr, life) for life, report in self._reports.items() for lmr in report["idle"]]

    @property
    def locks(self) -> list[tuple[str, Life, int, int]]:
        """name, home, address, rkey."""
        return [(name, life, address, rkey)
                for life, report in self._reports.items() for name, address, rkey in report["locks"]]  # fmt: skip

    @property
    def lock_users(self) -> list[tuple[str, Life, int]]:
        """name, life, client."""
        return [(name, life, client)
                for life, report in self._reports.items() for name, client in report["lock_users"]]  # fmt: skip

    def _blocks(self) -> Iterator[tuple[Life, int, int]]:
        for life, report in self._reports.items():
            for lmr, address in report["blocks"]:
                yield life, lmr, address
