"""Locks at their home: who waits for which, and who is next.

The word of a lock is 8 bytes in the home's registered memory, changed by RDMA atomics only (the home's own go over its
loopback queue pair). It counts tickets: who adds 1 and finds 0 has the lock, without the home knowing. Whoever
finds another number asks the home to RESERVE a turn. A release is a compare-and-swap of 1 to 0; when that fails there
are other tickets, and the home is asked to hand over: it takes the ticket back (adds -1), and gives the turn to the
first in its queue. If nobody is in the queue but the word is not 0, a RESERVE is on its way, and finds the turn on the
table. So the home decides by what its own atomic operations return, and the word is never 0 while somebody has the
lock.

A ticket whose node died is never taken back. It only costs speed, until `settle` finds the lock idle and clears the
word. `settle` also finds locks whose owner has died. It first adds a ticket of its own, so that nobody can take or
release the lock without the home; then all living nodes are asked for their tickets. Before a node answers it destroys
its queue pairs to the dead: a blade that was only paused, and goes on believing that it has the lock, reaches nobody's
memory any more when the next owner gets it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Protocol

from guest_agents.control import Handler, Message
from guest_agents.lite.blocks import Blocks, Held
from guest_agents.lite.errors import LiteError, NodeDead, NodeUnreachable, NoSuchName
from guest_agents.lite.links import Links
from guest_agents.membership import Life

Turn = tuple[Life, int]
"""A ticket of a life's tier."""
LOCKS = 0
"""Owner of the words, as `Blocks` has it."""
_WORD = (1 << 64) - 1
_RETRY_SECONDS = 0.1

log = logging.getLogger("rackless.lite")


class Atomics(Protocol):
    """What of the core this needs."""

    def fetch_add(self, node: int, address: int, rkey: int, addend: int) -> int: ...

    def cas(self, node: int, address: int, rkey: int, guess: int, value: int) -> int: ...


@dataclass
class _Lock:
    word: Held
    queue: deque[Turn] = field(default_factory=deque)
    on_the_table: bool = False
    """Nobody has the lock, and the next RESERVE gets it."""
    granted: Turn | None = None
    """Who was last given the lock by the home."""
    gone: bool = False
    """Its word is somebody else's memory."""
    lock: threading.RLock = field(default_factory=threading.RLock)


class Locks:
    """The locks whose home this node is.

    own -- this node's life
    living -- all lives that are members now
    dead -- lives that are over: (node, highest incarnation)
    """

    def __init__(
        self,
        core: Atomics,
        blocks: Blocks,
        links: Links,
        own: Callable[[], Life],
        living: Callable[[], Collection[Life]],
        dead: Callable[[], list[tuple[int, int]]],
    ) -> None:
        self._core = core
        self._blocks = blocks
        self._links = links
        self._own = own
        self._living = living
        self._dead = dead
        self._locks: dict[str, _Lock] = {}
        self._table = threading.Lock()

    def handlers(self) -> dict[str, Handler]:
        """Control operations of other tiers and of the directory."""
        return {"lite.lock.make": self.make, "lite.lock.reserve": self.reserve,
                "lite.lock.unlock": self.unlock, "lite.lock.cancel": self.cancel,
                "lite.lock.settle": self.settle_one}  # fmt: skip

    def make(self, request: Message) -> Message:
        """A word for a new lock."""
        with self._table:
            lock = self._locks.get(request["name"])
            if lock is None:
                lock = self._locks[request["name"]] = _Lock(self._blocks.allocate(LOCKS, [8])[0])
        return {"address": lock.word.address, "rkey": lock.word.rkey}

    def drop(self, request: Message) -> Message:
        """Nobody uses the lock any more."""
        with self._table:
            lock = self._locks.pop(request["name"], None)
        if lock is not None:
            lock.gone = True
            with lock.lock:
                self._blocks.free(LOCKS, [lock.word.address])
        return {}

    def reserve(self, request: Message) -> Message:
        """A turn for a ticket, at once (`granted`) or later, by lite.lock.grant. May be repeated.

        `doubt`: it is not known whether the ticket was added to the word.
        """
        turn = (Life(*request["life"]), int(request["ticket"]))
        with self._held(request["name"]) as lock:
            if lock.granted == turn:
                return {"granted": True}
            if turn not in lock.queue:
                if request.get("doubt"):  # rather one too many than one too few: see above
                    self._add(lock, 1)
                if lock.on_the_table:
                    lock.on_the_table = False
                    lock.granted = turn
                    return {"granted": True}
                lock.queue.append(turn)
            return {"granted": False}

    def unlock(self, request: Message) -> Message:
        """The owner's ticket comes back; the next in order gets the lock."""
        with self._held(request["name"]) as lock:
            self._hand_over(request["name"], lock)
        return {}

    def cancel(self, request: Message) -> Message:
        """Somebody does not want to wait any longer. `left` false: it has the lock, or is about to be told so."""
        turn = (Life(*request["life"]), int(request["ticket"]))
        with self._held(request["name"]) as lock:
            if turn not in lock.queue:
                return {"left": False}
            lock.queue.remove(turn)
            self._add(lock, -1)
        return {"left": True}

    def settle_one(self, request: Message) -> Message:
        """Find out whether the lock has an owner: somebody released it and does not know whether that was done."""
        name = request["name"]
        threading.Thread(target=self._settle, args=(name,), name=f"lock {name}", daemon=True).start()
        return {}

    def died(self, is_over: Callable[[Life], bool]) -> None:
        """Nodes have ended: their turns are void, and locks they had go to the next."""
        with self._table:
            names = list(self._locks)
        for name in names:
            with suppress(NoSuchName), self._held(name) as lock:
                for turn in [turn for turn in lock.queue if is_over(turn[0])]:
                    lock.queue.remove(turn)
                    self._add(lock, -1)
            threading.Thread(target=self._settle, args=(name,), name=f"lock {name}", daemon=True).start()

    def forget_all(self) -> None:
        """A new life begins; the words went with the blocks."""
        with self._table:
            locks = list(self._locks.values())
            self._locks.clear()
        for lock in locks:
            lock.gone = True
            with lock.lock:
                continue  # whoever was at work on it has ended

    def report(self) -> list[tuple[str, int, int]]:
        """name, address, rkey of each."""
        with self._table:
            return [(name, lock.word.address, lock.word.rkey) for name, lock in self._locks.items()]

    @contextmanager
    def _held(self, name: str) -> Iterator[_Lock]:
        with self._table:
            lock = self._locks.get(name)
        if lock is None:
            raise NoSuchName(f"no lock {name!r} here")
        with lock.lock:
            if lock.gone:
                raise NoSuchName(f"no lock {name!r} here")
            yield lock

    def _add(self, lock: _Lock, addend: int) -> int:
        """The word after it."""
        return (self._core.fetch_add(self._own().node, lock.word.address, lock.word.rkey, addend) + addend) & _WORD

    def _hand_over(self, name: str, lock: _Lock) -> None:
        """Take the owner's ticket back; the first in the queue who still wants it is the next owner."""
        tickets = self._add(lock, -1)
        lock.granted = None
        if lock.queue:
            turn = lock.queue.popleft()
            lock.granted = turn
            # The node may be slow to answer, or dead; who released need not wait for that.
            threading.Thread(target=self._grant, args=(name, lock, turn), name=f"lock {name}", daemon=True).start()
        elif tickets:
            lock.on_the_table = True

    def _grant(self, name: str, lock: _Lock, turn: Turn) -> None:
        while True:
            try:
                accepted = self._links.call(turn[0], "lite.lock.grant", name=name, ticket=turn[1])["accepted"]
                break
            except NodeUnreachable:
                time.sleep(_RETRY_SECONDS)
            except NodeDead:
                accepted = False
                break
        if accepted:
            return
        try:
            with lock.lock:
                if lock.granted == turn and not lock.gone:
                    self._hand_over(name, lock)
        except LiteError as failure:  # our loopback has failed, or this node ends
            log.warning("lock %s: %s", name, failure)
            self._settle(name)

    def _settle(self, name: str) -> None:
        """Give the lock to the next if its owner has died; clear the word if nobody has anything to do with it."""
        try:
            with self._held(name) as lock:
                tickets = self._add(lock, 1)
                found = self._tickets(name, lock)
                if lock.gone:
                    return
                owned = any(state == "holding" for state in found.values()) or (
                    lock.granted is not None and lock.granted in found
                )
                home = (self._own().node, lock.word.address, lock.word.rkey)
                if not owned and not found and not lock.queue:
                    lock.granted = None
                    lock.on_the_table = False
                    if self._core.cas(*home, tickets, 0) != tickets and self._add(lock, -1):
                        lock.on_the_table = True  # somebody came meanwhile
                elif owned or lock.on_the_table:
                    if not self._add(lock, -1):
                        lock.on_the_table = False
                else:
                    log.warning("the owner of lock %s has died", name)
                    self._hand_over(name, lock)
        except LiteError as failure:
            log.warning("lock %s: %s", name, failure)

    def _tickets(self, name: str, lock: _Lock) -> dict[Turn, str]:
        """All tickets of the living nodes, when it is known of each whether it has the lock; the dead reach none."""
        found: dict[Turn, str] = {}
        for life in self._living():
            while not lock.gone:
                try:
                    states = self._links.call(life, "lite.lock.state", name=name, dead=self._dead())["tickets"]
                except NodeDead:
                    break
                except NodeUnreachable:
                    time.sleep(_RETRY_SECONDS)
                    continue
                if all(state != "adding" for _ticket, state in states):
                    found |= {(life, ticket): state for ticket, state in states}
                    break
                time.sleep(_RETRY_SECONDS)
        return found
