"""Who is at a commit that an owner has logged: one thread at a time."""

from __future__ import annotations

from guest_agents.hotpot.errors import Retry
from guest_agents.hotpot.home import Entry


class Busy:
    """One thread at a time works on an entry; others are told to come again.

    mine -- this thread is that one since it has begun the entry
    """

    def __init__(self, entry: Entry, *, mine: bool = False) -> None:
        self._entry = entry
        self._mine = mine

    def __enter__(self) -> None:
        if not self._mine and not self._entry.busy.acquire(blocking=False):
            raise Retry("it is being carried out")
        if self._entry.over:
            let_go_of(self._entry)
            raise Retry("it has just ended")

    def __exit__(self, *_: object) -> None:
        let_go_of(self._entry)


def let_go_of(entry: Entry) -> None:
    """Be busy with it no more, when what is left to do has been done; it may have come just now."""
    while True:
        last, entry.last = entry.last, None
        if last is not None:
            last()
        entry.busy.release()
        if entry.last is None or not entry.busy.acquire(blocking=False):
            return
