"""Every operation of LITE in a loop and a thread of its own, against a node that dies and comes back meanwhile.

    python3 lite_faults.py TARGET OTHER SELF    # told by lines: "report" prints a JSON object, "stop" ends it
    python3 lite_faults.py serve                # on TARGET: answers calls, and takes part in the barrier

An operation that fails with a named error is set up anew. A report says of each operation since the report before:
outcomes by name, the longest seconds one took, for how long the present one is under way, and what went wrong that has
no name.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from guest_agents import lite

PORT, BARRIER, SIZE = 9, "faults-barrier", 300_000
BARRIER_SECONDS = 8.0
PAUSE = 0.05

Operation = Callable[[], object]
TARGET, OTHER, SELF = "", "", ""
node: lite.Node


@contextmanager
def memory(on: str, name: str | None = None) -> Iterator[lite.Lmr]:
    """An LMR, gone again whatever happens."""
    made = node.malloc(SIZE, on, name=name, permissions=lite.Permission.ALL)
    try:
        yield made
    finally:
        with suppress(lite.LiteError):
            made.unmap()


@contextmanager
def on_target(work: Callable[[lite.Lmr], object]) -> Iterator[Operation]:
    with memory(TARGET) as there:
        yield lambda: work(there)


@contextmanager
def copying() -> Iterator[Operation]:
    with memory(TARGET) as there, memory(OTHER) as here:

        def copy() -> None:
            here.copy_to(there, length=100_000)
            there.copy_to(here, at=50_000, length=100_000)

        yield copy


@contextmanager
def moving() -> Iterator[Operation]:
    with memory(OTHER) as there:
        there.write(b"moved")

        def move() -> None:
            there.move(TARGET)
            there.move(OTHER)
            assert there.read(5) == b"moved"

        yield move


@contextmanager
def mapping() -> Iterator[Operation]:
    with memory(TARGET, "faults-map"):

        def map_() -> None:
            with node.map("faults-map") as mapped:
                mapped.read(1)

        yield map_


@contextmanager
def locking() -> Iterator[Operation]:
    door = node.lock("faults-lock", home=TARGET)

    def lock() -> None:
        door.acquire(timeout=20)
        door.release()

    yield lock


@contextmanager
def plain(work: Operation) -> Iterator[Operation]:
    yield work


def malloc() -> None:
    node.malloc(SIZE, TARGET).unmap()


def free() -> None:
    node.malloc(SIZE, [TARGET, OTHER], spread=True).free()


def call() -> None:
    assert node.call(TARGET, PORT, b"question") == b"noitseuq"


def multicast() -> None:
    """Each answer is the reply or its error: that of the node that lives always comes."""
    answers = node.multicast([SELF, TARGET], PORT, b"all")
    failed = [answer for answer in answers.values() if isinstance(answer, lite.LiteError)]
    assert answers[SELF] == b"lla"
    if failed:
        raise failed[0]


def gather(there: lite.Lmr) -> None:
    assert sum(map(len, there.gather([(0, 100), (200_000, 3000), (5, 1)]))) == 3101


OPERATIONS: dict[str, Callable[[], Any]] = {
    "read": lambda: on_target(lambda there: there.read(100_000)),
    "write": lambda: on_target(lambda there: there.write(bytes(100_000), at=7)),
    "readv": lambda: on_target(gather),
    "memset": lambda: on_target(lambda there: there.memset(1, at=3, length=200_000)),
    "fetch_add": lambda: on_target(lambda there: there.fetch_add(8)),
    "memcpy": copying,
    "move": moving,
    "malloc": lambda: plain(malloc),
    "free": lambda: plain(free),
    "map": mapping,
    "call": lambda: plain(call),
    "send": lambda: plain(lambda: node.send(TARGET, PORT, b"one way")),
    "multicast": lambda: plain(multicast),
    "lock": locking,
    "barrier": lambda: plain(lambda: node.barrier(BARRIER, 2, timeout=BARRIER_SECONDS)),
}


class Loop(threading.Thread):
    """One operation, again and again."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.outcomes: Counter[str] = Counter()
        self.longest = 0.0
        self.since = time.monotonic()
        self.wrong: str | None = None
        self.stopping = False

    def run(self) -> None:
        try:
            while not self.stopping:
                self.since = time.monotonic()
                try:
                    with OPERATIONS[self.name]() as operation:
                        while not self.stopping:
                            self.once(operation)
                except lite.LiteError as failure:
                    self.count(failure.name)
                time.sleep(PAUSE)
        except BaseException:
            self.wrong = traceback.format_exc()

    def once(self, operation: Operation) -> None:
        self.since = time.monotonic()
        operation()
        self.count("ok")
        time.sleep(PAUSE)

    def count(self, outcome: str) -> None:
        self.longest = max(self.longest, time.monotonic() - self.since)
        self.outcomes[outcome] += 1

    def report(self) -> dict[str, Any]:
        found = {"outcomes": dict(self.outcomes), "longest": round(self.longest, 2),
                 "now": round(time.monotonic() - self.since, 2), "wrong": self.wrong}  # fmt: skip
        self.outcomes, self.longest = Counter(), 0.0
        return found


def take_part() -> None:
    """Come to the barrier whenever somebody waits there."""
    while True:
        with suppress(lite.LiteError):
            node.barrier(BARRIER, 2, timeout=BARRIER_SECONDS)
        time.sleep(PAUSE)


def serve() -> None:
    port = node.register(PORT)
    while True:
        with suppress(lite.LiteError):  # the node that asked may have gone meanwhile
            request = port.receive()
            if request.descriptor:
                request.reply(bytes(request.data)[::-1])


def main(words: list[str]) -> None:
    global node, TARGET, OTHER, SELF
    node = lite.connect()
    threading.Thread(target=serve, daemon=True).start()
    if words == ["serve"]:
        threading.Thread(target=take_part, daemon=True).start()
        print("serving", flush=True)
        sys.stdin.read()
        return
    TARGET, OTHER, SELF = words
    loops = {name: Loop(name) for name in OPERATIONS}
    for loop in loops.values():
        loop.start()
    print("looping", flush=True)
    for line in sys.stdin:
        if line.strip() == "stop":
            break
        print(json.dumps({name: loop.report() for name, loop in loops.items()}), flush=True)
    for loop in loops.values():
        loop.stopping = True
    for loop in loops.values():
        loop.join(60)
    print(json.dumps({name: loop.report() for name, loop in loops.items()}), flush=True)
    node.close()


if __name__ == "__main__":
    main(sys.argv[1:])
