"""Threads of this tier that wait, on behalf of a program, until another node says that it is their turn."""

from __future__ import annotations

import itertools
import os
import select
import socket
import threading
from dataclasses import dataclass

from guest_agents.lite.errors import Cancelled, TimedOut, error_for


@dataclass
class Waiter:
    """One wait: `code` is its outcome (0 or an error) once `event`, an eventfd, is readable."""

    number: int
    event: int
    code: int | None = None


class Waits:
    """All waits of this tier."""

    def __init__(self) -> None:
        self._waiters: dict[int, Waiter] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()

    def begin(self) -> Waiter:
        """A new wait; it must be ended with `end`."""
        waiter = Waiter(next(self._numbers), os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        with self._lock:
            self._waiters[waiter.number] = waiter
        return waiter

    def end(self, waiter: Waiter) -> None:
        """Forget a wait."""
        with self._lock:
            del self._waiters[waiter.number]
        os.close(waiter.event)

    def wake(self, number: int, code: int) -> bool:
        """The wait has this outcome; False when it has one already, or nobody waits any more."""
        with self._lock:
            waiter = self._waiters.get(number)
            if waiter is None or waiter.code is not None:
                return False
            waiter.code = code
            os.eventfd_write(waiter.event, 1)
            return True

    def wake_all(self, code: int) -> None:
        """Every wait has this outcome: nothing this tier waits for will come."""
        with self._lock:
            numbers = list(self._waiters)
        for number in numbers:
            self.wake(number, code)

    def wait(self, waiter: Waiter, program: socket.socket | None, seconds: float | None) -> None:
        """Return when woken with 0, else raise that error. TIMED_OUT; CANCELLED when the program has gone."""
        poll = select.poll()
        poll.register(waiter.event, select.POLLIN)
        if program is not None:
            poll.register(program, select.POLLRDHUP)
        ready = {fd for fd, _events in poll.poll(None if seconds is None else seconds * 1000)}
        if waiter.event not in ready:
            raise Cancelled("the program has gone") if ready else TimedOut()
        if waiter.code:
            raise error_for(waiter.code)
