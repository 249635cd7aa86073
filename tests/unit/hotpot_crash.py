"""One run of the crash matrix: transactions on all machines of a simulated rack, one of which loses its power at a
chosen step; then everything that ran is judged.

    python -m tests.unit.hotpot_crash MODE FATE STEP COUNT SEED [moves] [scarce] [standby]

runs one again and says what happens. A step is an event of hotpot_sim.py, such as "serve commit" or "persist log"; the
machine at which it comes for the COUNT-th time loses its power there. With `moves`, parts go from node to node all the
time; with `scarce`, nodes have room for few mapped pages and copies; with
`standby`, only the machine with the dispatcher fails, and with fate `gone` it does not come back.
"""

from __future__ import annotations

import logging
import os
import random
import sys
from contextlib import suppress
from dataclasses import dataclass

from guest_agents.hotpot import blocks
from guest_agents.hotpot.blocks import PAGE
from guest_agents.hotpot.cache import Cache
from guest_agents.hotpot.coordinator import new_xid
from guest_agents.hotpot.dispatcher import Dispatcher
from guest_agents.hotpot.errors import FewerCopies, HotpotError, InDoubt
from guest_agents.hotpot.eviction import Limits
from guest_agents.hotpot.messages import LEAF
from guest_agents.hotpot.records import Record
from guest_agents.hotpot.service import Transaction
from tests.unit.hotpot_history import CELL, STRIDE, Attempt, Cell, check
from tests.unit.hotpot_sim import Machine, Net, PowerOff, simulated

CELLS = 16
CHUNK = 4096
SIZE = 5 * PAGE
TRANSACTIONS = 24
FATES = ("reboot", "lost", "gone", "partition")
NESTED = {"prepare", "commit", "commit_now", "release", "replica", "seed", "acquire"}
"""Messages before which a transaction of another machine may run."""
MOVING = {"leave", "hand_over", "promote", "attend", "confirm", "seed", "fence", "make_room", "clear"}
"""Messages of adaptation, before which any transaction may run."""
QUIET_SECONDS = 30.0


@dataclass(frozen=True)
class Case:
    """What happens to which machine."""

    mode: str
    fate: str
    step: str
    count: int
    seed: int
    moves: bool = False
    scarce: bool = False
    standby: bool = False

    @property
    def words(self) -> str:
        """As the command line takes it."""
        more = " moves" * self.moves + " scarce" * self.scarce + " standby" * self.standby
        return f"{self.mode} {self.fate} {self.step.replace(' ', '_')} {self.count} {self.seed}{more}"


class Run:
    """A case while it runs."""

    def __init__(self, net: Net, case: Case) -> None:
        self.net = net
        self.case = case
        self.rand = random.Random(f"writers {case.words}")
        self.lots = random.Random(f"moves {case.words}")
        self.attempts: list[Attempt] = []
        self.refused: list[str] = []
        self.victims: list[int] = []
        self.record: Record | None = None
        self._depth = 0
        self._numbers = iter(range(1, 1 << 20))
        net.between = self.between
        net.died = self.died

    def trap(self) -> None:
        """From now on the step is waited for."""
        left = [self.case.count]

        def hit(machine: Machine, event: str) -> bool:
            if event != self.case.step or (self.case.standby and machine.number != 1):
                return False
            left[0] -= 1
            if left[0] or (self.case.fate == "gone" and machine.number == 1 and not self.case.standby):
                return False
            self.victims.append(machine.number)
            if self.case.fate == "partition":
                self.net.trap = None
                self.cut_off(machine)
                return False
            return True

        self.net.trap = hit

    def cut_off(self, machine: Machine) -> None:
        """A machine, and perhaps another, can reach only each other; not the one with the dispatcher."""
        number = machine.number if machine.number != 1 or self.case.standby else 2
        self.net.away = {number} | ({self.rand.choice([2, 3, 4])} if self.rand.random() < 0.4 else set())

    def died(self, machine: Machine) -> None:
        """A machine has lost its power: what becomes of it."""
        if self.case.fate in ("lost", "gone"):
            machine.lose_media()
        if self.case.fate != "gone":
            machine.back_at = self.net.now + self.rand.choice([0.2, 0.6, 2.5])

    def between(self, op: str) -> None:
        """Now and then somebody else is faster."""
        if self._depth in (1, 2) and op in NESTED and self.rand.random() < 0.04:
            self.transact()
        if (self.case.moves or self.case.scarce) and self._depth == 0 and op in MOVING and self.lots.random() < 0.3:
            self.transact()

    def squeeze(self) -> None:
        """Now and then there is less room, or more."""
        for machine in self.net.machines:
            if self.case.scarce and machine.life is not None and self.lots.random() < 0.3:
                machine.service.eviction.limits = Limits(self.lots.choice([0, 2, 9]) * PAGE,
                                                         self.lots.choice([0, 2, 9]) * blocks.STRIDE)  # fmt: skip

    def move(self) -> None:
        """Now and then a part is to go to another node."""
        able = [machine for machine in self.net.machines if machine.life is not None]
        if not self.case.moves or self.lots.random() < 0.6 or not able or self.record is None:
            return
        machine, part = self.lots.choice(able), self.lots.randrange(len(self.record.homes))
        record = machine.service.atlas.latest(self.record)
        node = self.lots.randint(1, 4)
        if self.case.fate in ("lost", "gone"):
            # One that is lost with two parts and its own commit to both may tear it: docs/hotpot.md says so.
            leaving = any(home.leave for other in able for home in other.service.owner.homes())
            if leaving or any(home.key[1] != part for other in able if other.number == node
                              for home in other.service.owner.homes()):  # fmt: skip
                return
        about = {"dataset": record.id, "part": part, "node": node}
        with suppress(HotpotError, PowerOff):
            machine.service.links.call(record.homes[part], "leave", about, port=LEAF)

    def cache(self, machine: Machine) -> Cache | None:
        """The dataset, opened there."""
        service = machine.service
        assert self.record is not None
        opened = service._opened.get(self.record.id)
        try:
            return service.open(self.record.name) if opened is None else opened.cache
        except HotpotError:
            return None

    def fetches(self, machine: Machine) -> bool:
        """Whether a page is on its way to a machine."""
        return any(page.arriving for opened in machine.service._opened.values()
                   for page in opened.cache._pages.values())  # fmt: skip

    def transact(self) -> None:
        """A transaction somewhere."""
        # One that waits for a page waits below this on the stack, and would wait for ever.
        able = [machine for machine in self.net.machines if machine.life is not None and not self.fetches(machine)]
        if not able:
            return
        machine = self.rand.choice(able)
        self._depth += 1
        try:
            self.transact_at(machine)
        except PowerOff:
            assert machine.life is None or self._depth
        finally:
            self._depth -= 1

    def transact_at(self, machine: Machine) -> None:
        """The same on this machine."""
        cache, service = self.cache(machine), machine.service
        if cache is None:
            return
        cells = sorted(self.rand.sample(range(CELLS), self.rand.randint(1, 3)))
        transaction = Transaction(new_xid(), cache.record.id)
        attempt = Attempt(next(self._numbers), {})
        replicas = self.rand.choice([2, 2, 3]) if self.case.fate in ("lost", "gone") else self.rand.choice([1, 2, 3])
        try:
            service.acquire(transaction, [(cell * STRIDE, CELL) for cell in cells])
        except HotpotError:
            with suppress(HotpotError):
                service.abort(transaction)
            return
        for cell in cells:
            found = Cell.unpack(load(cache, cell * STRIDE, CELL))
            if found is None:
                service.abort(transaction)
                return
            attempt.read[cell] = found
            store(cache, cell * STRIDE, Cell(found.count + 1, attempt.number).pack())
        self.attempts.append(attempt)
        try:
            service.commit(transaction, replicas)
        except (InDoubt, FewerCopies):
            pass
        except HotpotError as refusal:
            self.refused.append(f"{attempt.number:x}: {type(refusal).__name__}: {refusal.message}")
            self.attempts.remove(attempt)
        else:
            attempt.acknowledged = True

    # The end

    def heal(self) -> None:
        """Everything that can come back does, and comes to rest."""
        self.net.trap = None
        self.net.away = set()
        for machine in self.net.machines:
            if machine.life is not None:
                machine.service.eviction.limits = Limits()
        deadline = self.net.now + QUIET_SECONDS
        quiet = 0
        while quiet < 3 and self.net.now < deadline:  # not only until the next beat, which may bring news
            self.net.wait(0.2)
            busy = self.busy()
            quiet = 0 if busy else quiet + 1
        assert not busy, f"it does not come to rest: {busy}"

    def busy(self) -> list[str]:
        """What is not at rest."""
        found = []
        dispatcher = self.dispatcher()
        trusted = dispatcher and {(number, part): set(listed.synced[part]) for number, listed in
                                  dispatcher.listed.items() for part in range(len(listed.record.homes))}  # fmt: skip
        up = {machine.number for machine in self.net.machines if machine.life is not None}
        for machine in self.net.machines:
            if machine.life is None:
                if machine.back_at is not None:
                    found.append(f"{machine.name} is down")
                continue
            service = machine.service
            found += [f"{machine.name}: entry {entry.xid:x} {entry.state!r}" for entry in service.owner.entries()]
            for home in service.owner.homes():
                if trusted and home.synced - trusted.get(home.key, home.synced):
                    found.append(f"{machine.name}: home {home.key} has not heard that copies were lost")
                if home.leave is not None:
                    found.append(f"{machine.name}: home {home.key} is leaving: {home.leave}")
                if not home.ready or home.locks or home.short or home.claims or home.missed & up:
                    found.append(f"{machine.name}: home {home.key} ready {home.ready} locks {home.locks} {home.short}")
                found += [f"{machine.name}: doubtful" for _ in service.copies.doubtful(*home.key)]
            found += [f"{machine.name}: log" for log in (service._log, service._intents) if log.used]
            assert self.record is not None
            found += [f"{machine.name}: doubtful {part}" for part in range(len(self.record.homes))
                      if service.copies.doubtful(self.record.id, part)]  # fmt: skip
            if dispatcher is not None and dispatcher.links.node.node_id == machine.number:
                found += [f"part {part} has no home" for part, node in enumerate(dispatcher.listed[1].record.homes)
                          if self.net.machines[node - 1].life is None]  # fmt: skip
            if service.lease.term != (dispatcher.term if dispatcher else 0) or not service.lease.valid:
                found.append(f"{machine.name}: term {service.lease.term}")
            opened = service._opened.get(self.record.id)
            if opened is not None and opened.suspect:
                found.append(f"{machine.name}: caches are suspect")
        if dispatcher is None:
            found.append("there is no dispatcher")
        return found

    def dispatcher(self) -> Dispatcher | None:
        """The one in office."""
        found = [made for machine in self.net.machines if machine.life is not None
                 if (made := machine.service._dispatcher) is not None and not made.superseded]  # fmt: skip
        return max(found, key=lambda made: made.term, default=None)

    def judge(self) -> list[str]:
        """Everything that is wrong."""
        assert self.record is not None
        dispatcher = self.dispatcher()
        assert dispatcher is not None
        record = dispatcher.listed[self.record.id].record
        wrong: list[str] = []
        seen = {}
        for machine in self.net.machines:
            if machine.life is not None:
                try:
                    cache = self.cache(machine)
                    assert cache is not None
                    cache.ensure(range(record.pages))
                    seen[machine.name] = load(cache, 0, SIZE)
                except HotpotError as failure:
                    wrong.append(f"{machine.name} cannot read: {failure}")
        if len(set(seen.values())) != 1:
            return [*wrong, f"nodes do not read the same: {self.differences(record, seen)}"]
        [data] = set(seen.values())
        final = {cell: Cell.unpack(data[cell * STRIDE : cell * STRIDE + CELL]) for cell in range(CELLS)}
        return wrong + check(self.attempts, final) + self.compare(record, data)

    def differences(self, record: Record, seen: dict[str, bytes]) -> list[str]:
        """What the caches of nodes have of pages that are not the same everywhere."""
        found = []
        for page in range(record.pages):
            if len({data[page * PAGE : (page + 1) * PAGE] for data in seen.values()}) > 1:
                home = self.net.machines[record.owner(page) - 1].service.owner.home(record.id, record.part(page))
                versions = {name: cache._pages[page].version for name, cache in (
                    (machine.name, machine.service._opened[record.id].cache) for machine in self.net.machines
                    if machine.name in seen)}  # fmt: skip
                found.append(f"page {page}, home {home.version(page)}, copies {home.copies[page]}, caches {versions}")
        return found

    def compare(self, record: Record, data: bytes) -> list[str]:
        """Home on media, home in registered memory, and copies."""
        wrong = []
        for page in range(record.pages):
            owner = self.net.machines[record.owner(page) - 1].service.owner
            home = owner.home(record.id, record.part(page))
            kept = home.read(page)
            if kept.data != data[page * PAGE : (page + 1) * PAGE]:
                wrong.append(f"page {page} is not what is read")
            if kept != blocks.unseal(home.memory.read(blocks.STRIDE, at=record.slot(page) * blocks.STRIDE)):
                wrong.append(f"page {page} in memory is not what is on media")
            living = sum(machine.life is not None for machine in self.net.machines)
            if len(home.copies[page]) + 1 < min(kept.degree, living):
                wrong.append(f"page {page} has copies on {home.copies[page]} only, and should have {kept.degree}")
            for machine in self.net.machines:
                if machine.life is not None and machine.number != record.owner(page):
                    copy = machine.service.copies.read(record.id, page)
                    if copy is not None and copy != kept:
                        wrong.append(f"the copy of page {page} on {machine.name} is {copy.version}, {kept.version}")
                    if copy is None and machine.number in home.copies[page]:
                        wrong.append(f"{machine.name} should have a copy of page {page}")
        return wrong


def load(cache: Cache, at: int, length: int) -> bytes:
    """As a program would."""
    return os.pread(cache.file, length, at)


def store(cache: Cache, at: int, data: bytes) -> None:
    """As a program would: its first store to a page keeps what the page was."""
    for page in range(at // PAGE, (at + len(data) - 1) // PAGE + 1):
        state = cache._pages[page]
        if not state.dirty:
            state.twin = cache._bytes(page)
    os.pwrite(cache.file, data, at)


def run(case: Case) -> tuple[list[str], Run]:
    """What was wrong."""
    with simulated(4, case.words) as net:
        this = Run(net, case)
        try:
            net.machines[1].service.dispatcher("create", name="set", size=SIZE, mode=case.mode, chunk=CHUNK,
                                               owners=this.rand.sample([1, 2, 3, 4], 3))  # fmt: skip
            fields = net.machines[1].service.dispatcher("open", name="set")["record"]
            this.record = Record.from_json(fields)
            for number in range(TRANSACTIONS):
                if number == 4:
                    this.trap()
                this.move()
                this.squeeze()
                this.transact()
                net.wait(this.rand.choice([0.0, 0.0, 0.05, 0.3]))
            if case.fate == "partition":
                net.wait(this.rand.choice([0.2, 3.0]))
                for number in net.away if case.seed % 2 else ():
                    life = net.machines[number - 1].life
                    if life is not None:
                        life.number_in_lite += 1
                net.away = set()
                net.wait(1.0)
                for _ in range(4):
                    this.transact()
            this.heal()
            if not net.machines[0].life and not case.standby:
                return ["the manager does not come back"], this
            return this.judge(), this
        except PowerOff:
            return ["a machine without power did something"], this


def assert_clean(cases: list[Case]) -> None:
    """Run them all; the test fails with the words that repeat each one that went wrong."""
    failures = []
    for case in cases:
        wrong, _run = run(case)
        if wrong:
            failures.append(f"python -m tests.unit.hotpot_crash {case.words}\n    " + "\n    ".join(wrong[:4]))
    assert not failures, f"{len(failures)} runs went wrong; each again by:\n" + "\n".join(failures)


def main() -> None:
    """Run one case and tell of it."""
    mode, fate, step, count, seed, *more = sys.argv[1:]
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    wrong, this = run(Case(mode, fate, step.replace("_", " ", 1), int(count), int(seed),
                           *(word in more for word in ("moves", "scarce", "standby"))))  # fmt: skip
    print(f"machines {this.victims} failed; {len(this.attempts)} transactions, "
          f"{sum(a.acknowledged for a in this.attempts)} acknowledged, refused: {this.refused}")  # fmt: skip
    print("\n".join(wrong) or "nothing is wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
