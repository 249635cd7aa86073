"""A program of the random tests: transactions on shared cells, and plain stores to bytes of its own beside others'.

    python -m tests.unit.hotpot_writer DATASET CELLS SLOT SEED TRANSACTIONS REPLICAS REOPEN

Every REOPEN transactions it closes the dataset and opens it again, so that it has to fetch what others are committing.
It prints what hotpot_history.attempts_of reads, and at its end `slot COUNT`.
"""

from __future__ import annotations

import json
import random
import sys
from contextlib import suppress

from guest_agents import hotpot
from tests.unit.hotpot_history import CELL, STRIDE, Cell

SLOT = 40
PAGE = 4096


def say(*words: object) -> None:
    """What was said is out when this returns, whatever happens to this process then."""
    print(*words, flush=True)


def transact(dataset: hotpot.Dataset, cells: list[int], replicas: int, number: int, *, abort: bool) -> None:
    """Write all of the cells; Retry."""
    with dataset.transaction(replicas) as transaction:
        views = {cell: transaction.acquire(cell * STRIDE, CELL) for cell in cells}
        read = {cell: Cell.unpack(view) for cell, view in views.items()}
        for cell, view in views.items():
            found = read[cell]
            if found is None:  # others commit just now: this one cannot be committed any more, so what it does is gone
                transaction.abort()
                return
            view[:] = Cell(found.count + 1, number).pack()
        if abort:
            transaction.abort()
            return
        say("try", number, json.dumps({cell: (found.count, found.writer) for cell, found in read.items() if found}))
        try:
            transaction.commit()
        except hotpot.Retry:
            say("not", number)
            raise
        say("done", number)


def main() -> None:
    """Run."""
    name, cells, slot, seed, count, replicas, reopen = sys.argv[1], *map(int, sys.argv[2:])
    rand = random.Random(seed)
    session = hotpot.connect()
    dataset = session.open(name)
    place = cells * STRIDE // PAGE * PAGE + PAGE + slot * SLOT
    mine = 0
    for turn in range(1, count + 1):
        if turn % reopen == 0:
            dataset.close()
            dataset = session.open(name)
            assert int.from_bytes(dataset.memory[place : place + 8], "little") == mine
        wanted = sorted(rand.sample(range(cells), rand.randint(1, 4)))
        number = rand.getrandbits(48) | 1
        with suppress(hotpot.Retry):
            transact(dataset, wanted, rand.randint(1, replicas), number, abort=rand.random() < 0.1)
        if rand.random() < 0.3:  # a page that everybody stores to, each his own bytes
            dataset.memory[place : place + 8] = (mine + 1).to_bytes(8, "little")
            while True:
                try:
                    dataset.commit((place, 8), replicas=replicas)
                    break
                except hotpot.Retry:
                    pass
            mine += 1
    say("slot", mine)


if __name__ == "__main__":
    main()
