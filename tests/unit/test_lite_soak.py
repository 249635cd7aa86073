"""Random requests to LITE's tiers by many programs, of which some die, as blades do; then the books balance.

In-process blades with a stand-in core: what is tested is the control side. tests/rack/test_lite.py has real blades.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from pathlib import Path
from typing import ClassVar

import pytest

from guest_agents.lite import errors
from guest_agents.membership import Timing
from tests.unit.lite_blades import Program, Rack, eventually

SEED = int(os.environ.get("RACKLESS_SEED", "2026"))
SECONDS = float(os.environ.get("RACKLESS_SOAK_SECONDS", "3"))
TURNS = int(os.environ.get("RACKLESS_SOAK_TURNS", "1"))
NAMES = ["a", "b", "c"]
BLADES = ["gm0", "mb0", "mb1", "mb2"]
UNEXPECTED = {errors.LiteError, errors.BadMessage, errors.BadArgument, errors.BadHandle, errors.OutOfRange}


class Worker(threading.Thread):
    """A program that does random things until it is told to end, or killed."""

    inside: ClassVar[list[Worker]] = []
    paused: ClassVar[dict[str, float]] = {}

    def __init__(self, rack: Rack, blade: str, seed: int, problems: list[str]) -> None:
        super().__init__(daemon=True)
        self.chance = random.Random(seed)
        self.rack, self.blade, self.problems = rack, blade, problems
        self.program: Program = rack[blade].client()
        self.over = False
        self.handles: dict[int, tuple[int, bytearray | None]] = {}
        self.done: Counter[str] = Counter()

    def run(self) -> None:
        actions = [self.malloc, self.malloc, self.map, self.use, self.use, self.use, self.fill, self.copy, self.move,
                   self.drop, self.drop, self.lock, self.rights]  # fmt: skip
        while not self.over:
            action = self.chance.choice(actions)
            try:
                action()
                self.done[action.__name__] += 1
            except errors.LiteError as failure:
                self.done[failure.name] += 1
                if type(failure) in UNEXPECTED and not self.over:
                    self.problems.append(f"{self.blade} {action.__name__}: {failure}")
            except (OSError, ValueError):
                break  # killed, or its blade was
            except AssertionError as problem:
                self.problems.append(f"{self.blade} {action.__name__}: {problem!r}")
        self.program.kill()

    def malloc(self) -> None:
        if len(self.handles) > 6:
            return
        size = self.chance.randint(1, 200_000)
        spread = self.chance.random() < 0.5
        nodes = self.chance.choice([None, [self.chance.choice(BLADES)], self.chance.sample(BLADES, 2)])
        name = self.chance.choice([None, None, *NAMES])
        made = self.program.call("malloc", size=size, nodes=nodes, spread=spread, permissions=31,
                                 **({"name": name} if name else {}))  # fmt: skip
        self.handles[made["handle"]] = (size, None if name else bytearray(size))

    def map(self) -> None:
        mapped = self.program.call("map", name=self.chance.choice(NAMES))
        self.handles[mapped["handle"]] = (mapped["size"], None)

    def use(self) -> None:
        handle, size, model = self.pick()
        at = self.chance.randrange(size)
        length = min(size - at, self.chance.choice([1, 8, 5000, 100_000]))
        data = self.chance.randbytes(length)
        self.doubtful(handle, lambda: self.program.write(handle, at, data))
        if model is not None:
            model[at : at + length] = data
        self.check(handle, at, length)

    def fill(self) -> None:
        handle, size, model = self.pick()
        at = self.chance.randrange(size)
        byte = self.chance.randrange(256)
        fields = {"handle": handle, "offset": at, "length": size - at, "byte": byte}
        self.doubtful(handle, lambda: self.program.call("memset", **fields))
        if model is not None:
            model[at:] = bytes([byte]) * (size - at)
        self.check(handle, 0, size)

    def copy(self) -> None:
        source, size, known = self.pick()
        target, room, model = self.pick()
        length = self.chance.randint(0, min(size, room))
        at, to = self.chance.randint(0, size - length), self.chance.randint(0, room - length)
        self.doubtful(target, lambda: self.program.call("memmove", source=source, soffset=at, target=target, toffset=to,
                                                        length=length))  # fmt: skip
        if model is not None and known is not None:
            model[to : to + length] = bytes(known[at : at + length])
        elif length:
            self.handles[target] = (room, None)
        self.check(target, to, length)

    def move(self) -> None:
        handle, size, _model = self.pick()
        self.program.call("move", handle=handle, to=[self.chance.choice(BLADES)])
        self.check(handle, 0, size)

    def drop(self) -> None:
        handle, _size, _model = self.pick()
        del self.handles[handle]
        if self.chance.random() < 0.5:
            try:
                self.program.call("free", handle=handle)
            finally:
                self.program.call("unmap", handle=handle)
        else:
            self.program.call("unmap", handle=handle)

    def rights(self) -> None:
        handle, _size, _model = self.pick()
        op, rights = self.chance.choice(["grant", "revoke"]), self.chance.randint(1, 31)
        self.program.call(op, handle=handle, permissions=rights, to=self.chance.choice(["*", "mb1"]))

    def lock(self) -> None:
        self.program.call("lock_create", name="door", home="gm0")
        self.program.call("lock", name="door", timeout_ms=3000)
        self.inside.append(self)
        time.sleep(0.001)
        # Who was killed, or whose blade was declared dead, lost the lock whether it has noticed or not.
        now = time.monotonic()
        holders = [w for w in self.inside if not w.over and now - self.paused.get(w.blade, 0) > 2]
        if self in holders and holders != [self]:
            self.problems.append("two have the lock")
        self.inside.remove(self)
        self.program.call("unlock", name="door")

    def pick(self) -> tuple[int, int, bytearray | None]:
        if not self.handles:
            self.malloc()
        handle = self.chance.choice(list(self.handles))
        return (handle, *self.handles[handle])

    def doubtful(self, handle: int, action: object) -> None:
        assert callable(action)
        try:
            action()
        except errors.LiteError:
            self.handles[handle] = (self.handles[handle][0], None)
            raise

    def check(self, handle: int, at: int, length: int) -> None:
        data = self.program.read(handle, at, length)
        model = self.handles[handle][1]
        if model is not None and data != model[at : at + length]:
            self.problems.append(f"{self.blade}: wrong bytes")

    def die(self) -> None:
        self.over = True
        self.program.kill()


@pytest.mark.long
@pytest.mark.parametrize("turn", range(TURNS))
def test_the_books_balance(tmp_path: Path, turn: int) -> None:
    chance = random.Random(SEED + turn)
    Worker.inside.clear()
    Worker.paused.clear()
    rack = Rack(tmp_path, BLADES, timing=Timing(0.5, 10.0))
    before = {name: blade.free for name, blade in rack.blades.items()}
    problems: list[str] = []
    workers: list[Worker] = []
    events: list[str] = []

    def start(blade: str) -> None:
        workers.append(Worker(rack, blade, chance.randrange(1 << 30), problems))
        workers[-1].start()

    try:
        for blade in BLADES + BLADES:
            start(blade)
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            time.sleep(chance.uniform(0.2, 0.8))
            event = chance.choices(["program", "blade", "paused"], [6, 1, 1])[0]
            events.append(event)
            if event == "program":
                victim = chance.choice(workers)
                victim.die()
                workers.remove(victim)
                start(victim.blade)
            elif event == "blade":
                name = chance.choice(BLADES[1:])
                for victim in [worker for worker in workers if worker.blade == name]:
                    victim.over = True
                    workers.remove(victim)
                rack.restart(name, BLADES.index(name))
                start(name)
            else:
                name = chance.choice(BLADES[1:])
                manager = rack["gm0"].manager
                assert manager is not None
                Worker.paused[name] = time.monotonic()
                with manager._change:
                    manager._end(BLADES.index(name) + 1, rack[name].membership.incarnation or 0, "it was paused")
        for worker in workers:
            worker.over = True
        for worker in workers:
            worker.join(60)
            assert not worker.is_alive()
        print(events, sum((worker.done for worker in workers), Counter[str]()))
        assert problems == [], problems
        eventually(lambda: all(not blade.tier.clients.all() for blade in rack.blades.values()))
        eventually(lambda: {name: blade.free for name, blade in rack.blades.items()} == before)
        for one in rack.blades.values():
            assert (one.core.lmrs, one.core.handles, one.core.clients) == ({}, {}, {}), one.name
            assert one.tier.locks.report() == []
    finally:
        rack.close()
