"""A rack of Hotpot services in one thread, whose machines lose their power at a chosen step, and the network between.

The services are the real ones; LITE and the clock below them are stand-ins. A call runs at its target at once, in the
caller's thread, and waiting lets the other machines go on, so a run is the same whenever its seed is the same. Media
keep what was persisted; the rest survives a loss of power line by line, by lot.

Every store that is persisted and every message sent or served is an `event`. A machine whose power fails raises
PowerOff at its next one: nothing that it does between two events can be noticed elsewhere.
"""

from __future__ import annotations

import os
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from guest_agents import lite
from guest_agents.hotpot.lease import Timing
from guest_agents.hotpot.media import Folder
from guest_agents.hotpot.messages import unpack
from guest_agents.hotpot.service import Service

_KINDS = re.compile(r"-[0-9].*")
LINE = 64
TIMING = Timing(beat=0.1, lease=0.5, promote=1.0, patience=1.5, takeover=0.8, window=1.0, settle=0.3)
LOG_BYTES = 64 << 10
BOOK_BYTES = 16 << 10


class PowerOff(BaseException):
    """This machine has no power any more."""


class LossyMedia:
    """Media (media.py) that keep only what was persisted."""

    def __init__(self, life: Life, name: str, size: int) -> None:
        self.path = Path(name)
        self.size = size
        self._life = life
        disk = life.machine.disk
        self._kept = disk.setdefault(name, bytearray())
        self._kept.extend(bytes(size - len(self._kept)))
        self._now = bytearray(self._kept)
        self._loose: set[int] = set()
        life.media.append(self)

    def reserve(self, offset: int, length: int) -> None:
        pass

    def release(self, offset: int, length: int) -> None:
        assert not any(self._now[offset : offset + length])

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self._now[offset : offset + length])

    def write(self, offset: int, data: bytes | memoryview) -> None:
        if not self._life.alive:
            raise PowerOff
        self._now[offset : offset + len(data)] = data
        self._loose.update(range(offset // LINE, (offset + len(data) - 1) // LINE + 1))

    def persist(self, offset: int, length: int) -> None:
        self._life.event(f"persist {_KINDS.sub('', self.path.name)}", (self, offset, length))
        self._keep(range(offset // LINE, (offset + length - 1) // LINE + 1))

    def persist_all(self, ranges: Iterable[tuple[int, int]]) -> None:
        for offset, length in ranges:
            self.persist(offset, length)

    def _keep(self, lines: Iterable[int]) -> None:
        for line in lines:
            if line in self._loose:
                self._loose.discard(line)
                self._kept[line * LINE : (line + 1) * LINE] = self._now[line * LINE : (line + 1) * LINE]

    def lose(self, rand: random.Random, chance: float) -> None:
        """Power fails: each line that was not persisted survives with this chance."""
        self._keep([line for line in sorted(self._loose) if rand.random() < chance])

    def close(self) -> None:
        pass

    def remove(self) -> None:
        if not self._life.alive:
            raise PowerOff
        self._life.machine.disk.pop(self.path.name, None)


class LossyFolder(Folder):
    """The media of a machine."""

    def __init__(self, life: Life) -> None:
        self.path = Path(life.machine.name)
        self._life = life

    def open(self, name: str, size: int, *, reserve: bool = True) -> Any:
        return LossyMedia(self._life, name, size)

    def names(self) -> list[str]:
        return sorted(self._life.machine.disk)

    def remove(self, name: str) -> None:
        self._life.machine.disk.pop(name, None)


class Memory:
    """An LMR of LITE."""

    def __init__(self, life: Life, reader: Life, data: bytearray) -> None:
        self._life, self._reader, self._data = life, reader, data
        self._number = life.number_in_lite

    def _check(self) -> None:
        if self._number != self._life.number_in_lite:
            raise lite.NodeDead

    def scatter(self, parts: Iterable[tuple[int, bytes]]) -> None:
        self._check()
        for offset, data in parts:
            self._data[offset : offset + len(data)] = data

    def gather(self, ranges: Iterable[tuple[int, int]]) -> list[bytes]:
        self._reader.machine.net.reach(self._reader, self._life.machine.number, self._life)
        self._check()
        return [bytes(self._data[offset : offset + length]) for offset, length in ranges]

    def read(self, length: int, at: int = 0) -> bytes:
        self._check()
        return bytes(self._data[at : at + length])

    def free(self) -> None:
        pass

    def unmap(self) -> None:
        pass


class Answer:
    """A ticket of LITE."""

    def __init__(self, reply: bytes | lite.LiteError) -> None:
        self._reply = reply

    def wait(self) -> bytes:
        if isinstance(self._reply, lite.LiteError):
            raise self._reply
        return self._reply


class StandInNode:
    """As much of lite.Node as Hotpot uses."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self.name = life.machine.name
        self.node_id = life.machine.number

    def nodes(self) -> list[SimpleNamespace]:
        net = self._life.machine.net
        return [SimpleNamespace(node_id=m.number, alive=net.seems_alive(self._life.machine, m)) for m in net.machines]

    def malloc(self, size: int, *, name: str, permissions: Any) -> Memory:
        memory = Memory(self._life, self._life, bytearray(size))
        self._life.machine.net.memories[name] = memory
        return memory

    def map(self, name: str, _permissions: Any) -> Memory:
        found = self._life.machine.net.memories[name]
        found._check()
        return Memory(found._life, self._life, found._data)

    def call_async(self, node: int, port: int, message: bytes, *, max_reply: int) -> Answer:
        op = unpack(message)[0]["op"]
        life, net = self._life, self._life.machine.net
        life.event(f"send {op}")
        net.between(op)
        try:
            target = net.reach(life, node)
            if not target.serving:
                raise lite.PortClosed
            try:
                target.event(f"serve {op}")
                request = SimpleNamespace(port=SimpleNamespace(number=port), source=self.node_id, data=message)
                reply = target.service.links._handle(request)  # type: ignore[arg-type]
                target.event(f"served {op}")
            except PowerOff:
                raise lite.NodeDead from None
            net.reach(life, node)
        except lite.LiteError as failure:
            life.event(f"unsent {op}")
            return Answer(failure)
        assert len(reply) <= max_reply
        life.event(f"sent {op}")
        return Answer(reply)


class Life:
    """A machine from power on to power off."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.alive = True
        self.serving = False
        self.number_in_lite = 1
        """More than one: LITE has taken this machine for dead; its registered memory has ended."""
        self.media: list[LossyMedia] = []
        node: Any = StandInNode(self)
        self.service = Service(node, LossyFolder(self), 1, timing=TIMING, log_bytes=LOG_BYTES)
        self.service.links.start = lambda: None  # type: ignore[method-assign]
        self.service.start(keep=False)
        self.serving = True

    def event(self, name: str, persisting: tuple[LossyMedia, int, int] | None = None) -> None:
        """PowerOff, if this is where it fails."""
        if not self.alive:
            raise PowerOff
        net = self.machine.net
        net.events[name] += 1
        if net.trap is not None and net.trap(self.machine, name):
            net.trap = None
            if persisting is not None and net.rand.random() < 0.5:
                media, offset, length = persisting  # it fails after a part of this
                media._keep(range(offset // LINE, (offset + net.rand.randrange(length)) // LINE))
            self.machine.power_off()
            raise PowerOff


class Machine:
    """A blade: its disk outlives its lives."""

    def __init__(self, net: Net, number: int) -> None:
        self.net = net
        self.number = number
        self.name = f"n{number}"
        self.disk: dict[str, bytearray] = {}
        self.life: Life | None = None
        self.back_at: float | None = None
        """When its power returns; None: not by itself."""

    @property
    def service(self) -> Service:
        """Of the present life."""
        assert self.life is not None
        return self.life.service

    def power_on(self) -> None:
        """Begin a life. PowerOff: it fails again at once."""
        self.back_at = None
        with suppress(PowerOff):
            life = _born(self)
            self.life = life

    def power_off(self) -> None:
        """End it."""
        net = self.net
        life = self.life or net.being_born
        assert life is not None
        life.alive = life.serving = False
        for media in life.media:
            media.lose(net.rand, net.survival)
        for opened in getattr(getattr(life, "service", None), "_opened", {}).values():
            net.files.append(opened.cache.file)  # a thread of it may be about to notice
        self.life = None
        net.died(self)

    def lose_media(self) -> None:
        """They are gone."""
        self.disk = {}


def _born(machine: Machine) -> Life:
    life = Life.__new__(Life)
    machine.net.being_born = life
    try:
        life.__init__(machine)  # type: ignore[misc]
    finally:
        machine.net.being_born = None
    return life


class Net:
    """All machines; the first has the dispatcher."""

    def __init__(self, count: int, rand: random.Random) -> None:
        self.rand = rand
        self.now = 1000.0
        self.survival = rand.choice([0.0, 0.5, 1.0])
        self.machines: list[Machine] = []
        self.memories: dict[str, Memory] = {}
        self.events: Counter[str] = Counter()
        self.trap: Callable[[Machine, str], bool] | None = None
        self.files: list[int] = []
        self.away: set[int] = set()
        """The smaller side of a partition."""
        self.being_born: Life | None = None
        self.died: Callable[[Machine], None] = lambda _machine: None
        self.between: Callable[[str], None] = lambda _op: None
        self._next_turn = 0.0
        self._waiting = False
        for number in range(1, count + 1):
            self.machines.append(Machine(self, number))
        for machine in self.machines:
            machine.power_on()
        self.wait(0.3)

    def reach(self, source: Life, node: int, life: Life | None = None) -> Life:
        """The life of a node, from another. NodeDead, NodeUnreachable."""
        if not source.alive:
            raise PowerOff
        target = self.machines[node - 1].life
        if target is None or (life is not None and target is not life):
            raise lite.NodeDead
        if (source.machine.number in self.away) != (node in self.away):
            raise lite.NodeUnreachable
        return target

    def seems_alive(self, source: Machine, other: Machine) -> bool:
        """What LITE's membership says on a node: those who are cut off hear no news."""
        if source.number in self.away:
            return True
        return other.life is not None and other.number not in self.away

    def wait(self, seconds: float) -> None:
        """Time passes; what has to be done meanwhile is done."""
        until = self.now + seconds
        if self._waiting:
            self.now = until
            return
        self._waiting = True
        try:
            while self.now < until:
                self.now = min(until, self.now + TIMING.beat / 2)
                if self.now >= self._next_turn:
                    self._next_turn = self.now + TIMING.beat
                    self.turn()
        finally:
            self._waiting = False

    def turn(self) -> None:
        """Power returns where it is time, and all keepers have their turn."""
        for machine in self.machines:
            if machine.life is None and machine.back_at is not None and machine.back_at <= self.now:
                machine.power_on()
            if machine.life is not None:
                with suppress(PowerOff):
                    machine.service.keeper.turn()
                    machine.service.adapter.turn()


@contextmanager
def simulated(count: int, seed: object) -> Iterator[Net]:
    """A rack of `count` machines, with a clock of its own."""
    rand = random.Random(str(seed))
    holder: list[Net] = []
    start = [1000.0]
    clock = SimpleNamespace(
        monotonic=lambda: holder[0].now if holder else start[0],
        sleep=lambda seconds: holder[0].wait(seconds) if holder else None,
    )
    with mock.patch.multiple("guest_agents.hotpot.service", BOOK_BYTES=BOOK_BYTES):
        patches: list[Any] = [mock.patch.object(module, "time", clock) for name, module in list(sys.modules.items())
                   if name.startswith("guest_agents.hotpot.") and hasattr(module, "time")]  # fmt: skip
        patches.append(mock.patch("guest_agents.hotpot.coordinator.secrets.randbits", rand.getrandbits))
        for patch in patches:
            patch.start()
        try:
            net = Net.__new__(Net)
            holder.append(net)
            net.now = start[0]
            net.__init__(count, rand)  # type: ignore[misc]
            yield net
        finally:
            for machine in holder[0].machines:
                if machine.life is not None:
                    holder[0].died = lambda _machine: None
                    machine.power_off()
            for file in holder[0].files:
                os.close(file)
            for patch in patches:
                patch.stop()
