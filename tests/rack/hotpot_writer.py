"""A program of the crash matrix on a blade: transactions on shared cells (tests/unit/hotpot_history.py), when told.

It reads lines: `run NAME SEED REPLICAS...` opens a dataset and goes on with transactions until `stop`; `read` prints
the dataset's bytes; `close`, `create NAME SIZE MODE OWNER...` and `delete NAME` do that. It prints what attempts_of
reads, and `ok WORD` or `failed WORD ERROR` when it has done what it was told.
"""

from __future__ import annotations

import json
import queue
import random
import sys
import threading
import time

from guest_agents import hotpot
from tests.unit.hotpot_history import CELL, STRIDE, Cell

CELLS = 32
PAGE = 4096
SIZE = 8 * PAGE
REFUSED = (hotpot.Retry, hotpot.NodeLost, hotpot.TooFewNodes, hotpot.TooLarge, hotpot.Isolated, hotpot.PagesLost)
"""After which nothing has taken place."""
PAUSE = 0.02


def say(*words: object) -> None:
    """What was said is out when this returns."""
    print(*words, flush=True)


def transact(dataset: hotpot.Dataset, rand: random.Random, replicas: int) -> None:
    """One transaction."""
    cells = sorted(rand.sample(range(CELLS), rand.randint(1, 3)))
    number = rand.getrandbits(48) | 1
    transaction = dataset.transaction(replicas)
    try:
        views = dict(zip(cells, transaction.acquire_all(*((cell * STRIDE, CELL) for cell in cells)), strict=True))
    except hotpot.HotpotError:
        transaction.abort()
        return
    read = {cell: Cell.unpack(view) for cell, view in views.items()}
    for cell, view in views.items():
        found = read[cell]
        if found is None:  # others commit just now: this one cannot be committed any more
            transaction.abort()
            return
        view[:] = Cell(found.count + 1, number).pack()
    say("try", number, json.dumps({cell: (found.count, found.writer) for cell, found in read.items() if found}))
    try:
        transaction.commit()
    except REFUSED:
        say("not", number)
    except (hotpot.InDoubt, hotpot.FewerCopies) as doubt:
        say("doubt", number, type(doubt).__name__)
    else:
        say("done", number)


class Writer:
    """What it is doing."""

    def __init__(self) -> None:
        self.session = hotpot.connect()
        self.dataset: hotpot.Dataset | None = None
        self.rand = random.Random()
        self.degrees = [1]
        self.running = False

    def told(self, word: str, *words: str) -> None:
        """Do what a line says."""
        if word == "run":
            self.rand, self.degrees = random.Random(words[1]), [int(degree) for degree in words[2:]]
            if self.dataset is None:
                self.dataset = self.session.open(words[0])
            self.running = True
        elif word == "stop":
            self.running = False
        elif word == "read":
            assert self.dataset is not None
            say("data", bytes(self.dataset.memory).hex())
        elif word == "close" and self.dataset is not None:
            self.dataset.close()
            self.dataset = None
        elif word == "create":
            self.session.create(words[0], int(words[1]), mode=words[2], chunk=PAGE,
                                owners=[int(node) for node in words[3:]]).close()  # fmt: skip
        elif word == "delete":
            self.session.delete(words[0])

    def turn(self) -> None:
        """A transaction, if it runs."""
        if self.running and self.dataset is not None:
            try:
                transact(self.dataset, self.rand, self.rand.choice(self.degrees))
            except hotpot.NotJoined:
                raise
            except hotpot.HotpotError:
                pass  # before it had begun to commit
            time.sleep(self.rand.uniform(0, PAUSE))


def main() -> None:
    """Do what comes on standard input, until that ends."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            lines.put(line)
        lines.put("")

    threading.Thread(target=listen, daemon=True).start()
    writer = Writer()
    say("ok begin")
    while True:
        if writer.running and lines.empty():
            writer.turn()
            continue
        line = lines.get()
        if not line:
            return
        word, *rest = line.split()
        try:
            writer.told(word, *rest)
        except hotpot.HotpotError as failure:
            say("failed", word, type(failure).__name__, failure.message)
        else:
            say("ok", word)


if __name__ == "__main__":
    main()
