"""YCSB's core workloads A to F (Cooper et al., SoCC 2010, section 4 and table 2): which operation on which record next.

Records are numbered; those from `records` on are inserted while the workload runs. Their keys are hashes of the
numbers, so neighbours in the order of keys have nothing to do with each other. Pure: every client has its own seed.
Needs nothing but Python: it runs on blades.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

THETA = 0.99
"""YCSB's zipfian constant."""
SCAN_MOST = 100
VALUE_BYTES = 1000
"""A record: YCSB's ten fields of 100 bytes, read and written as one."""
_SCRAMBLED_ITEMS = 10_000_000_000
_SCRAMBLED_ZETA = 26.46902820178302
"""zeta(10^10, 0.99), as in YCSB's ScrambledZipfianGenerator."""


class Mix(NamedTuple):
    """Shares of operations, and how records are chosen."""

    shares: dict[str, float]
    chosen: str


WORKLOADS = {
    "A": Mix({"read": 0.5, "update": 0.5}, "zipfian"),
    "B": Mix({"read": 0.95, "update": 0.05}, "zipfian"),
    "C": Mix({"read": 1.0}, "zipfian"),
    "D": Mix({"read": 0.95, "insert": 0.05}, "latest"),
    "E": Mix({"scan": 0.95, "insert": 0.05}, "zipfian"),
    "F": Mix({"read": 0.5, "modify": 0.5}, "zipfian"),
}


class Operation(NamedTuple):
    """One thing to do: read, update, insert, modify (read, then write) or scan."""

    what: str
    key: bytes
    length: int = 0
    """Of a scan: how many records."""


def fnv64(number: int) -> int:
    """FNV-1a of a number's eight bytes, by which YCSB scatters keys."""
    value = 0xCBF29CE484222325
    for shift in range(0, 64, 8):
        value = (value ^ number >> shift & 0xFF) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return value


def key_of(number: int) -> bytes:
    """The key of a record."""
    return b"user%020d" % fnv64(number)


def zeta(items: int) -> float:
    """The sum of 1 / i ** THETA for i from 1 to `items`."""
    return float(sum(1 / i**THETA for i in range(1, items + 1)))


class Zipfian:
    """Numbers from 0 on, the first most often: i with a probability proportional to 1 / (i + 1) ** THETA.

    The algorithm of Gray et al., "Quickly generating billion-record synthetic databases", SIGMOD 1994, as YCSB has it.
    """

    def __init__(self, items: int, sum_of_all: float | None = None) -> None:
        self.items = items
        self._zeta = zeta(items) if sum_of_all is None else sum_of_all
        self._eta = (1 - (2 / items) ** (1 - THETA)) / (1 - zeta(2) / self._zeta) if items > 2 else 0.0

    def grow(self) -> None:
        """One item more."""
        self.__init__(self.items + 1, self._zeta + 1 / (self.items + 1) ** THETA)  # type: ignore[misc]

    def pick(self, rand: random.Random) -> int:
        """The next number."""
        share = rand.random()
        if share * self._zeta < 1:
            return 0
        if share * self._zeta < 1 + 0.5**THETA:
            return 1
        return min(int(self.items * (self._eta * share - self._eta + 1) ** (1 / (1 - THETA))), self.items - 1)


def scrambled(items: int) -> Callable[[random.Random], int]:
    """Numbers below `items`, zipfian, but the popular ones are scattered: YCSB's ScrambledZipfianGenerator."""
    zipfian = Zipfian(_SCRAMBLED_ITEMS, _SCRAMBLED_ZETA)
    return lambda rand: fnv64(zipfian.pick(rand)) % items


def operations(workload: str, records: int, count: int, client: int = 0, clients: int = 1) -> Iterator[Operation]:
    """`count` operations of one client of several, by a seed of its own.

    Each client inserts numbers of its own; with `latest`, it prefers those it has inserted last.
    """
    mix, rand = WORKLOADS[workload], random.Random(f"{workload} {client}")
    inserted = 0

    def number(index: int) -> int:
        return index if index < records else records + client + (index - records) * clients

    latest, anywhere = Zipfian(records), scrambled(records)
    for _ in range(count):
        [what] = rand.choices([*mix.shares], [*mix.shares.values()])
        if what == "insert":
            yield Operation(what, key_of(number(records + inserted)))
            inserted += 1
            latest.grow()
            continue
        index = latest.items - 1 - latest.pick(rand) if mix.chosen == "latest" else anywhere(rand)
        yield Operation(what, key_of(number(index)), rand.randint(1, SCAN_MOST) if what == "scan" else 0)
