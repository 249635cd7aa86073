"""What concurrent transactions must have been like for what they saw to be possible: the checker of the random tests.

A dataset is divided into cells. A cell says how often it was written and by which transaction; each transaction reads
and writes some cells, and notes what it read before it commits, and that it was told of success after it. From the
notes of all and the cells at the end, `check` says what is wrong.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

_CELL = struct.Struct("<QQI")
CELL = _CELL.size
STRIDE = 1000
"""From one cell to the next: some lie on two pages, of which each may have another owner."""
NOBODY = 0


@dataclass(frozen=True)
class Cell:
    """Written `count` times, last by `writer`."""

    count: int
    writer: int

    def pack(self) -> bytes:
        """Its bytes, with a checksum."""
        return _CELL.pack(self.count, self.writer, self._checksum())

    def _checksum(self) -> int:
        return zlib.crc32(struct.pack("<QQ", self.count, self.writer)) if self.count else 0

    @classmethod
    def unpack(cls, data: bytes | memoryview) -> Cell | None:
        """None: it is torn."""
        count, writer, checksum = _CELL.unpack(data)
        cell = cls(count, writer)
        return cell if cell._checksum() == checksum else None


@dataclass
class Attempt:
    """A transaction that wanted to commit."""

    number: int
    read: dict[int, Cell]
    """What it found in each of its cells; it wrote count + 1 and its number."""
    acknowledged: bool = False


def attempts_of(lines: Iterable[str]) -> list[Attempt]:
    """From what a writer prints: `try NUMBER {cell: [count, writer]}`, then perhaps `done NUMBER` or `not NUMBER`."""
    found: dict[int, Attempt] = {}
    for line in lines:
        word, number, *rest = line.split(" ", 2)
        if word == "try":
            read = {int(cell): Cell(*values) for cell, values in json.loads(rest[0]).items()}
            found[int(number)] = Attempt(int(number), read)
        elif word == "done":
            found[int(number)].acknowledged = True
        else:
            del found[int(number)]
    return list(found.values())


def check(attempts: Iterable[Attempt], final: Mapping[int, Cell | None]) -> list[str]:
    """Everything that is wrong: commits that were lost, torn, or not in any order."""
    wrong = [f"cell {number} is torn at the end" for number, cell in final.items() if cell is None]
    every = {attempt.number: attempt for attempt in attempts}
    effective = _effective(every, final)
    chains: dict[int, dict[int, int]] = defaultdict(dict)
    for number in sorted(effective):
        for cell, found in every[number].read.items():
            other = chains[cell].setdefault(found.count + 1, number)
            if other != number:
                wrong.append(
                    f"cell {cell}: {other:x} and {number:x} both made it {found.count + 1}: an update was lost"
                )
    order: TopologicalSorter[int] = TopologicalSorter()
    for number in effective:
        for cell, found in every[number].read.items():
            before = chains[cell].get(found.count, NOBODY)
            if before != found.writer:
                wrong.append(f"cell {cell}: {number:x} read {found}, which {before:x} wrote")
            if before:
                order.add(number, before)
    for cell, last in final.items():
        if last is not None:
            top = max(chains[cell], default=0)
            if (last.count, last.writer) != (top, chains[cell].get(top, NOBODY)):
                wrong.append(
                    f"cell {cell} is {last} at the end, and should be the {top}th by {chains[cell].get(top, 0):x}"
                )
    try:
        order.prepare()
    except CycleError as cycle:
        wrong.append(f"each of these came before the next: {[hex(number) for number in cycle.args[1]]}")
    return wrong


def _effective(every: Mapping[int, Attempt], final: Mapping[int, Cell | None]) -> set[int]:
    """Attempts that took place: those acknowledged, and those of which anything was seen."""
    seen = {cell.writer for cell in final.values() if cell is not None and cell.writer}
    seen |= {attempt.number for attempt in every.values() if attempt.acknowledged}
    waiting = list(seen)
    while waiting:
        for found in every[waiting.pop()].read.values():
            if found.writer and found.writer not in seen:
                seen.add(found.writer)
                waiting.append(found.writer)
    return seen
