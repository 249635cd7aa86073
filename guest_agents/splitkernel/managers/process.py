"""The global process manager (GPM): which programs run where, and where the next one goes (LegoOS, 4.6).

The list of a processor blade's programs is that blade's own: it sends the whole of it whenever it changes, and again
to a manager that was restarted. A list is told from an older one by its sequence number.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from guest_agents.control import Message
from guest_agents.membership import Life

RESERVED_SECONDS = 30.0
"""How long a placement counts as a program that its blade has not told of yet."""
RUNNING, EXITED, LOST = "running", "exited", "lost"


@dataclass
class _Blade:
    """What a life of a processor blade has said, and the programs that were sent to it since."""

    name: str
    sequence: int = -1
    programs: list[Message] = field(default_factory=list)


class ProcessManager:
    """The programs of all processor blades; thread-safe."""

    def __init__(self) -> None:
        self._blades: dict[Life, _Blade] = {}
        self._reserved: defaultdict[str, list[float]] = defaultdict(list)
        self._lock = threading.Lock()

    def hear(self, life: Life, blade: str, sequence: int, programs: list[Message]) -> None:
        """A blade's list of programs."""
        with self._lock:
            held = self._blades.setdefault(life, _Blade(blade))
            if sequence <= held.sequence:
                return
            known = {_key(program) for program in held.programs}
            arrived = sum(_key(program) not in known for program in programs)
            del self._reserved[blade][:arrived]  # the oldest: these are they
            held.sequence, held.programs = sequence, programs

    def died(self, life: Life) -> list[Message]:
        """That life is over: returns its programs that were running, as lost."""
        with self._lock:
            held = self._blades.pop(life, None)
        if held is None:
            return []
        now = time.time()
        return [{**program, "state": LOST, "ended": now} for program in held.programs if program["state"] == RUNNING]

    def programs(self) -> list[Message]:
        """What the blades that live have: programs that run, and the last that have ended."""
        with self._lock:
            return [program for held in self._blades.values() for program in held.programs]

    def running(self, vnode: str) -> list[Message]:
        """The programs of that vNode that run."""
        return [p for p in self.programs() if p["vnode"] == vnode and p["state"] == RUNNING]

    def place(self, blades: Sequence[str]) -> str:
        """The blade with the fewest programs, which gets one more; of equal ones the first in the list."""
        now = time.monotonic()
        with self._lock:
            counts = dict.fromkeys(blades, 0)
            for held in self._blades.values():
                if held.name in counts:
                    counts[held.name] += sum(program["state"] == RUNNING for program in held.programs)
            for blade in blades:
                self._reserved[blade] = [when for when in self._reserved[blade] if now - when < RESERVED_SECONDS]
                counts[blade] += len(self._reserved[blade])
            chosen = min(blades, key=lambda blade: counts[blade])
            self._reserved[chosen].append(now)
            return chosen


def _key(program: Message) -> tuple[str, float]:
    """A process id comes again some day: with its start it is one program's."""
    return program["id"], program["started"]
