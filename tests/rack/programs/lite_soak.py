"""Random operations of LITE by one process on a blade, for some seconds; every byte it reads is checked.

    python3 lite_soak.py SEED SECONDS HOME[,NODE...]

Nodes, except HOME, may die under it and others may free what it uses: errors with the names that this brings are
expected. Wrong bytes, and a lock that two have, are not: they are printed and make the exit code 1. The last line is a
JSON object: operations done, errors by name.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable

from guest_agents import lite

NAMES = [f"soak-{letter}" for letter in "abcd"]
LARGEST = 300_000
PORT = 9


class WrongError(Exception):
    """LITE returned something that was never written."""


class Owned:
    """An LMR of this process alone, and what must be in it."""

    def __init__(self, lmr: lite.Lmr) -> None:
        self.lmr = lmr
        self.model = bytearray(lmr.size)
        self.known = True
        """False after a write whose outcome is not known."""

    def check(self, at: int, data: bytes) -> None:
        if self.known and data != self.model[at : at + len(data)]:
            raise WrongError(f"{self.lmr!r}: {len(data)} bytes at {at} are not what was written")


class Soak:
    """One process's random life."""

    def __init__(self, seed: int, nodes: list[str]) -> None:
        self.chance = random.Random(seed)
        self.home, self.nodes = nodes[0], nodes
        self.node = lite.connect()
        self.owned: list[Owned] = []
        self.shared: list[lite.Lmr] = []
        self.done: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()

    def run(self, seconds: float) -> None:
        actions: list[tuple[int, Callable[[], None]]] = [
            (3, self.malloc), (10, self.write), (10, self.read), (2, self.memset), (2, self.copy), (1, self.move),
            (1, self.free), (2, self.share), (3, self.use_shared), (2, self.lock), (1, self.forget), (1, self.buffer),
            (2, self.many),
        ]  # fmt: skip
        weights = [weight for weight, _action in actions]
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            action = self.chance.choices(actions, weights)[0][1]
            try:
                action()
                self.done[action.__name__] += 1
            except lite.LiteError as error:
                self.errors[f"{action.__name__}: {error.name}"] += 1
                if error.name in ("FAILED", "BAD_MESSAGE", "BAD_ARGUMENT", "BAD_HANDLE", "OUT_OF_RANGE"):
                    raise WrongError(f"{action.__name__}: {error}") from error
        self.node.close()

    def malloc(self) -> None:
        if len(self.owned) >= 8:
            self.drop(self.chance.choice(self.owned))
        spread = self.chance.random() < 0.3
        some = self.chance.sample(self.nodes, 2)
        on = some if spread else self.chance.choice([None, *self.nodes])
        lmr = self.node.malloc(self.chance.randint(1, LARGEST), on=on, spread=spread)
        self.owned.append(Owned(lmr))
        self.owned[-1].check(0, lmr.read(min(lmr.size, 4096)))

    def write(self) -> None:
        owned, at, length = self.range()
        data = self.chance.randbytes(length)
        with Doubt(owned):
            owned.lmr.write(data, at=at)
            owned.model[at : at + length] = data

    def read(self) -> None:
        owned, at, length = self.range()
        owned.check(at, owned.lmr.read(length, at=at))

    def many(self) -> None:
        """Several reads and writes under way at once."""
        owned, at, length = self.range()
        data = self.chance.randbytes(length)
        pieces = [(start, min(start + 5000, length)) for start in range(0, length, 5000)]
        with Doubt(owned):
            for ticket in [owned.lmr.write_async(data[low:high], at=at + low) for low, high in pieces]:
                ticket.wait()
            owned.model[at : at + length] = data
        reads = [(low, owned.lmr.read_async(high - low, at=at + low)) for low, high in pieces]
        for low, read in reads:
            owned.check(at + low, read.wait())

    def memset(self) -> None:
        owned, at, length = self.range()
        byte = self.chance.randrange(256)
        with Doubt(owned):
            owned.lmr.memset(byte, at=at, length=length)
            owned.model[at : at + length] = bytes([byte]) * length

    def copy(self) -> None:
        source, at, length = self.range()
        target, to, room = self.range()
        length = min(length, room)
        with Doubt(target):
            source.lmr.move_to(target.lmr, at=at, to=to, length=length)
            target.model[to : to + length] = bytes(source.model[at : at + length])
            target.known = source.known and target.known

    def move(self) -> None:
        owned, _at, _length = self.range()
        owned.lmr.move(self.chance.choice(self.nodes))

    def free(self) -> None:
        if self.owned:
            self.drop(self.chance.choice(self.owned))

    def share(self) -> None:
        """Publish an LMR for others, for a while."""
        lmr = self.node.malloc(65536, on=self.chance.choice(self.nodes), name=self.chance.choice(NAMES),
                               permissions=lite.Permission.ALL)  # fmt: skip
        self.shared.append(lmr)

    def use_shared(self) -> None:
        """What others use too, and may free at any moment."""
        if not self.shared or self.chance.random() < 0.2:
            self.shared.append(self.node.map(self.chance.choice(NAMES), lite.Permission.ALL))
        lmr = self.chance.choice(self.shared)
        lmr.fetch_add(8 * self.chance.randrange(512), 1)
        lmr.write(bytes([self.chance.randrange(256)]) * 64, at=4096 + 64 * self.chance.randrange(900))
        lmr.read(4096, at=4096 * self.chance.randrange(1, 15))
        if self.chance.random() < 0.1:
            lmr.free()

    def lock(self) -> None:
        """A counter that is read and written under a lock, not atomically, counts right if the lock excludes."""
        lock = self.node.lock("soak-door", home=self.home)
        lock.acquire(timeout=10)
        try:
            counter = self.node.map("soak-counter")  # nobody kills the node where these two are
            try:
                before = int.from_bytes(counter.read(8), "little")
                counter.write((before + 1).to_bytes(8, "little"))
                if int.from_bytes(counter.read(8), "little") != before + 1:
                    raise WrongError("two have the lock")
            finally:
                self.node.unmap_quietly(counter)
        finally:
            lock.release()

    def buffer(self) -> None:
        owned, at, length = self.range()
        with self.node.buffer(length) as buffer:
            owned.lmr.read_into(buffer.view, at=at)
            owned.check(at, bytes(buffer.view))

    def forget(self) -> None:
        while self.shared:
            self.node.unmap_quietly(self.shared.pop())

    def drop(self, owned: Owned) -> None:
        self.owned.remove(owned)
        try:
            if self.chance.random() < 0.5:
                owned.lmr.free()
        finally:
            self.node.unmap_quietly(owned.lmr)

    def range(self) -> tuple[Owned, int, int]:
        if not self.owned:
            self.malloc()
        owned = self.chance.choice(self.owned)
        at = self.chance.randrange(owned.lmr.size)
        length = min(owned.lmr.size - at, self.chance.choice([8, 64, 4096, 20_000, LARGEST]))
        return owned, at, length


class Doubt:
    """If what is done within fails, it is not known what the LMR holds."""

    def __init__(self, owned: Owned) -> None:
        self.owned = owned

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, *_more: object) -> None:
        if kind is not None:
            self.owned.known = False


def main() -> int:
    seed, seconds, nodes = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3].split(",")
    soak = Soak(seed, nodes)
    wrong = None
    try:
        soak.run(seconds)
    except WrongError as error:
        wrong = str(error)
    print(json.dumps({"seed": seed, "wrong": wrong, "done": soak.done, "errors": soak.errors}), flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
