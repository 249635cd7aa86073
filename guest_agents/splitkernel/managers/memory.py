"""The global memory manager (GMM): on which memory blades the vRegions of programs go (LegoOS, 4.3.1 and 4.6).

Memory blades say how they are every 500 ms. What was given out since a blade's last report is added to it, so that a
burst of requests does not go to one blade. It advises only: a blade that has no room refuses, and the next is asked.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

REPORT_SECONDS = 0.5


@dataclass
class Load:
    """A memory blade as it last said, and what was placed there since: bytes, requests."""

    free: int
    requests: int
    """Regions that its monitor was asked for since it began: data moves one-sided, and is not seen there."""
    told: float = field(default_factory=time.monotonic)
    """When it said so."""

    @property
    def age(self) -> float:
        """Seconds since then."""
        return time.monotonic() - self.told


class MemoryManager:
    """Orders memory blades for a request; thread-safe."""

    def __init__(self) -> None:
        self._loads: dict[str, Load] = {}
        self._turns: defaultdict[str, itertools.count[int]] = defaultdict(itertools.count)
        self._lock = threading.Lock()

    def report(self, blade: str, free: int, requests: int) -> None:
        """A memory blade's status."""
        with self._lock:
            self._loads[blade] = Load(free, requests)

    def forget(self, blade: str) -> None:
        """That blade has died or left."""
        with self._lock:
            self._loads.pop(blade, None)

    def loads(self) -> dict[str, Load]:
        """What is known of the memory blades."""
        with self._lock:
            return {blade: replace(load) for blade, load in self._loads.items()}

    def order(self, placement: str, vnode: str, blades: Sequence[str], size: int, copies: int = 1) -> list[str]:
        """The blades, best first for a region of `size` bytes; the first `copies` are taken to get one each.

        A blade that has not reported yet counts as one that was asked for nothing and has nothing free.
        """
        with self._lock:
            ordered = PLACEMENTS[placement](self._rotated(vnode, blades), self._loads)
            for first in ordered[:copies]:
                load = self._loads.get(first)
                if load is not None:
                    load.free -= size
                    load.requests += 1
            return ordered

    def _rotated(self, vnode: str, blades: Sequence[str]) -> list[str]:
        names = sorted(blades)
        turn = next(self._turns[vnode]) % len(names) if names else 0
        return names[turn:] + names[:turn]


Ordering = Callable[[list[str], Mapping[str, Load]], list[str]]


def _least_requests(blades: list[str], loads: Mapping[str, Load]) -> list[str]:
    return sorted(blades, key=lambda name: loads[name].requests if name in loads else 0)


def _most_free(blades: list[str], loads: Mapping[str, Load]) -> list[str]:
    return sorted(blades, key=lambda name: -loads[name].free if name in loads else 0)


PLACEMENTS: dict[str, Ordering] = {
    "round-robin": lambda blades, _loads: blades,
    "least-requests": _least_requests,
    "most-free": _most_free,
}
"""Each gets the blades rotated, so that equal ones take turns."""
