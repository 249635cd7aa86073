"""Barriers, on the manager: who has arrived where, and what becomes of the others when somebody dies.

The first generation of a barrier learns who its participants are as they arrive; from then on, and for those who wait
already, the end of a participant (its process or its node) breaks the barrier: those who wait get BARRIER_BROKEN at
once, those who have not arrived yet when they arrive. So does one whose time is up while it waits. Then those who are
left may begin anew, with another count.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from guest_agents.control import Message
from guest_agents.lite.errors import BadArgument, BarrierBroken, LiteError, NodeDead
from guest_agents.membership import Life

Client = tuple[Life, int]
Wake = Callable[[Life, list[int], int], None]
"""Tells waiters of a life's tier that their wait is over, with 0 or an error's code."""

log = logging.getLogger("rackless.lite")


@dataclass
class _Barrier:
    count: int
    waiting: dict[tuple[Life, int], int] = field(default_factory=dict)
    """(life, waiter) -> client."""
    participants: Counter[Client] = field(default_factory=Counter)
    """Of the last generation that was complete: threads by client."""
    owed: Counter[Client] = field(default_factory=Counter)
    """Who has not been told yet that it broke: times by client."""

    def arrived(self) -> Counter[Client]:
        return Counter((life, client) for (life, _waiter), client in self.waiting.items())

    def is_idle(self) -> bool:
        return not self.waiting and not self.participants and not self.owed


class Barriers:
    """All barriers of the rack.

    is_alive -- whether a life goes on
    """

    def __init__(self, wake: Wake, is_alive: Callable[[Life], bool]) -> None:
        self._wake = wake
        self._is_alive = is_alive
        self._barriers: dict[str, _Barrier] = {}
        self._lock = threading.Lock()

    def enter(self, request: Message) -> Message:
        """A thread arrives. `done`: it was the last; else its tier's `waiter` will be woken."""
        life, client = Life(*request["life"]), int(request["client"])
        name, count = str(request["name"]), int(request["count"])
        if count < 1:
            raise BadArgument(f"a barrier of {count}")
        with self._lock:
            if not self._is_alive(life):
                raise NodeDead(f"node {life.node} (incarnation {life.incarnation}) is dead")
            barrier = self._barriers.setdefault(name, _Barrier(count))
            if barrier.owed[life, client] > 0:
                barrier.owed -= Counter({(life, client): 1})
                self._tidy(name)
                raise BarrierBroken
            if barrier.waiting and count != barrier.count:
                raise BadArgument(f"barrier {name!r} is one of {barrier.count}, not {count}")
            barrier.count = count
            barrier.waiting[life, int(request["waiter"])] = client
            if len(barrier.waiting) < count:
                return {"done": False}
            barrier.participants = barrier.arrived()
            del barrier.waiting[life, int(request["waiter"])]
            others = list(barrier.waiting)
            barrier.waiting.clear()
        self._tell(others, 0)
        return {"done": True}

    def leave(self, request: Message) -> Message:
        """A waiter gives up, and the others wait in vain. `left` false: its wait was over already; it is being told."""
        broken: list[tuple[Life, int]] = []
        with self._lock:
            barrier = self._barriers.get(request["name"])
            waiter = (Life(*request["life"]), int(request["waiter"]))
            left = barrier is not None and waiter in barrier.waiting
            if barrier is not None and left:
                broken = [key for key in barrier.waiting if key != waiter]
                self._break(barrier)
                self._tidy(request["name"])
        self._tell(broken, BarrierBroken.code)
        return {"left": left}

    def gone(self, request: Message) -> Message:
        """A client has ended."""
        self._end({(Life(*request["life"]), int(request["client"]))})
        return {}

    def died(self, life: Life) -> None:
        """A node has ended, with all its clients."""
        with self._lock:
            clients = {client for barrier in self._barriers.values()
                       for client in (*barrier.arrived(), *barrier.participants, *barrier.owed)
                       if client[0] == life}  # fmt: skip
        self._end(clients)

    def _end(self, ended: set[Client]) -> None:
        broken: list[tuple[Life, int]] = []
        with self._lock:
            for name, barrier in list(self._barriers.items()):
                for client in ended:
                    barrier.owed.pop(client, None)
                arrived = barrier.arrived()
                # Those who wait may also be new ones, who have only the name in common with the last participants.
                same = any(client in barrier.participants for client in arrived)
                if ended & arrived.keys() or (ended & barrier.participants.keys() and (same or not arrived)):
                    broken += [key for key, client in barrier.waiting.items() if (key[0], client) not in ended]
                    self._break(barrier)
                    for client in ended:
                        barrier.owed.pop(client, None)
                for client in ended:
                    barrier.participants.pop(client, None)
                self._tidy(name)
        self._tell(broken, BarrierBroken.code)

    def _break(self, barrier: _Barrier) -> None:
        """It will not be complete: those who have not arrived yet are told when they do."""
        barrier.owed += barrier.participants - barrier.arrived()
        barrier.participants.clear()
        barrier.waiting.clear()

    def _tidy(self, name: str) -> None:
        barrier = self._barriers.get(name)
        if barrier is not None and barrier.is_idle():
            del self._barriers[name]

    def _tell(self, waiters: Iterable[tuple[Life, int]], code: int) -> None:
        by_life: dict[Life, list[int]] = {}
        for life, waiter in waiters:
            by_life.setdefault(life, []).append(waiter)
        for life, numbers in by_life.items():
            try:
                self._wake(life, numbers, code)
            except LiteError as failure:  # its clients time out, or it is dead and they with it
                log.warning("waiters of node %d are not told: %s", life.node, failure)
