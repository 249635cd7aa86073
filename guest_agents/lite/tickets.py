"""Locks as a node's programs take them: the fast path, and the wait for a turn (locks.py has the home's side).

A ticket is noted here before it is added to the lock's word, so that the home can always ask who has a lock, and what
a program leaves behind can be released for it.
"""

from __future__ import annotations

import itertools
import logging
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from guest_agents.control import Handler, Message
from guest_agents.lite.errors import Freed, LiteError, NodeDead, NodeUnreachable, NotHeld, TimedOut
from guest_agents.lite.links import Links
from guest_agents.lite.locks import Atomics
from guest_agents.lite.waits import Waits
from guest_agents.membership import Life

_RETRY_SECONDS = 0.1

log = logging.getLogger("rackless.lite")


@dataclass(frozen=True)
class Place:
    """Where the word of a lock is."""

    home: Life
    address: int
    rkey: int


@dataclass
class _Ticket:
    client: int
    place: Place
    state: str = "adding"
    """adding (to the word: it may have the lock), waiting or holding."""
    waiter: int = 0


class Tickets:
    """The tickets of this node's programs.

    reach -- connects to a node if that is not done yet
    """

    def __init__(
        self, core: Atomics, links: Links, waits: Waits, own: Callable[[], Life], reach: Callable[[Life], None]
    ) -> None:
        self._core = core
        self._links = links
        self._waits = waits
        self._own = own
        self._reach = reach
        self._tickets: dict[str, dict[int, _Ticket]] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()

    def handlers(self) -> dict[str, Handler]:
        """Control operations of the homes."""
        return {"lite.lock.grant": self.grant}

    def acquire(
        self, name: str, place: Place, client: int, program: socket.socket | None, seconds: float | None
    ) -> None:
        """Wait for the lock. TIMED_OUT, CANCELLED (the program has gone), NODE_DEAD (the home has)."""
        deadline = None if seconds is None else time.monotonic() + seconds
        number, ticket = next(self._numbers), _Ticket(client, place)
        with self._lock:
            self._tickets.setdefault(name, {})[number] = ticket
        try:
            doubt = False
            try:
                self._reach(place.home)
                if not self._atomic(place, self._core.fetch_add, 1):
                    ticket.state = "holding"
                    return
            except NodeUnreachable:
                doubt = True
            self._wait(name, number, ticket, program, deadline, doubt)
        except BaseException:
            self._drop(name, number)
            raise

    def release(self, name: str, client: int) -> None:
        """Give the lock to the next. NOT_HELD; NODE_DEAD when its home, and so the lock, has gone."""
        with self._lock:
            held = [(number, ticket) for number, ticket in self._tickets.get(name, {}).items()
                    if ticket.client == client and ticket.state == "holding"]  # fmt: skip
            if not held:
                raise NotHeld(f"this process does not hold lock {name!r}")
            number, ticket = held[0]
            ticket.state = "releasing"
        place = ticket.place
        settle = False
        try:
            try:
                free = self._atomic(place, self._core.cas, 1, 0) == 1
                if not free:
                    self._links.call(place.home, "lite.lock.unlock", name=name)
            except NodeUnreachable:
                settle = True  # whether it was done is not known: the home finds out, once we have no ticket any more
        finally:
            self._drop(name, number)
        if settle:
            self._ask_home(name, place, "lite.lock.settle", None)

    def client_gone(self, client: int) -> None:
        """A program has ended: what it holds is released. Its waits end by themselves (`Waits.wait`)."""
        with self._lock:
            held = [name for name, tickets in self._tickets.items() for ticket in tickets.values()
                    if ticket.client == client and ticket.state == "holding"]  # fmt: skip
        for name in held:
            try:
                self.release(name, client)
            except LiteError as failure:
                log.warning("lock %s of a program that ended: %s", name, failure)

    def homes_died(self, is_over: Callable[[Life], bool]) -> None:
        """Nodes have ended, and the locks they were home of: who waits for one gets NODE_DEAD."""
        with self._lock:
            waiters = [ticket.waiter for tickets in self._tickets.values() for ticket in tickets.values()
                       if ticket.waiter and is_over(ticket.place.home)]  # fmt: skip
        for waiter in waiters:
            self._waits.wake(waiter, NodeDead.code)

    def forget_all(self) -> None:
        """A new life begins: what was held is lost."""
        with self._lock:
            self._tickets.clear()

    def grant(self, request: Message) -> Message:
        """The home gives a ticket its turn; `accepted` unless nobody waits with it any more."""
        with self._lock:
            ticket = self._tickets.get(request["name"], {}).get(request["ticket"])
            if ticket is None or ticket.state not in ("waiting", "holding"):
                return {"accepted": False}
            if ticket.state == "holding":
                return {"accepted": True}  # the home asks again because it did not hear us
            if not self._waits.wake(ticket.waiter, 0):
                return {"accepted": False}
            ticket.state = "holding"
            return {"accepted": True}

    def state(self, request: Message) -> Message:
        """Tickets for a lock: [number, state]."""
        with self._lock:
            tickets = self._tickets.get(request["name"], {})
            return {"tickets": [[number, "holding" if ticket.state == "releasing" else ticket.state]
                                for number, ticket in tickets.items()]}  # fmt: skip

    def held(self) -> int:
        """How many locks this node's programs hold now."""
        with self._lock:
            return sum(ticket.state == "holding" for tickets in self._tickets.values() for ticket in tickets.values())

    def _wait(
        self,
        name: str,
        number: int,
        ticket: _Ticket,
        program: socket.socket | None,
        deadline: float | None,
        doubt: bool,
    ) -> None:
        waiter = self._waits.begin()
        try:
            with self._lock:
                ticket.waiter = waiter.number
                ticket.state = "waiting"
            try:
                reply = self._ask_home(name, ticket.place, "lite.lock.reserve", deadline, ticket=number, doubt=doubt)
            except NodeUnreachable:
                self._withdrawn(name, number, ticket)
                raise
            if reply["granted"]:
                with self._lock:
                    ticket.state = "holding"
                return
            try:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                self._waits.wait(waiter, program, left)
            except LiteError as failure:
                if isinstance(failure, NodeDead) or self._withdrawn(name, number, ticket):
                    raise
                # Our turn came in the same moment. We have the lock; a program that has gone cannot use it.
                if program is not None and not isinstance(failure, TimedOut):
                    self.release(name, ticket.client)
                    raise
        finally:
            with self._lock:
                ticket.waiter = 0
            self._waits.end(waiter)

    def _atomic(self, place: Place, operation: Callable[..., int], *operands: int) -> int:
        """On the word of a lock. NODE_DEAD also if its home has begun a new life, in which that is not its word."""
        if self._links.is_over(place.home):
            raise NodeDead("the home of the lock is dead, or was restarted since")
        try:
            return operation(place.home.node, place.address, place.rkey, *operands)
        except Freed:
            raise NodeDead("the home of the lock has begun anew") from None

    def _withdrawn(self, name: str, number: int, ticket: _Ticket) -> bool:
        """Whether our turn was given up in time; False: we have the lock."""
        with self._lock:
            if ticket.state == "holding":
                return False
            del self._tickets[name][number]  # a grant that is on its way will be refused, and the home passes it on
        # The home may be slow to answer, and our time is up.
        arguments = (name, number, ticket.place)
        threading.Thread(target=self._abandon, args=arguments, name=f"lock {name}", daemon=True).start()
        return True

    def _abandon(self, name: str, number: int, place: Place) -> None:
        try:
            if not self._ask_home(name, place, "lite.lock.cancel", None, ticket=number)["left"]:
                self._ask_home(name, place, "lite.lock.settle", None)
        except LiteError:
            return  # the lock has gone, with its home or with its last user

    def _ask_home(self, name: str, place: Place, op: str, deadline: float | None, **fields: Any) -> Message:
        """A request that may be repeated, until the home answers or is dead, or the time is up."""
        own = self._own()
        while True:
            try:
                life = [own.node, own.incarnation]
                return self._links.call(place.home, op, None, name=name, life=life, **fields)
            except NodeUnreachable:
                if deadline is not None and time.monotonic() > deadline:
                    raise
                time.sleep(_RETRY_SECONDS)

    def _drop(self, name: str, number: int) -> None:
        with self._lock:
            tickets = self._tickets.get(name)
            if tickets is not None:
                tickets.pop(number, None)
                if not tickets:
                    del self._tickets[name]
