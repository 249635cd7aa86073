"""Names of locks, in the directory: where the word of each is, and which clients use it.

A lock goes when no client uses it any more, or when its home dies.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from guest_agents.control import Message
from guest_agents.lite.errors import BadArgument, LiteError, NodeDead, NoSuchName
from guest_agents.lite.links import Links
from guest_agents.membership import Life

NAME_LONGEST = 128


@dataclass
class _Entry:
    home: Life | None = None
    address: int = 0
    rkey: int = 0
    users: set[tuple[Life, int]] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def where(self) -> Message:
        assert self.home is not None
        return {"home": [self.home.node, self.home.incarnation], "address": self.address, "rkey": self.rkey}


class LockBook:
    """All locks of the rack.

    life_of -- the present life of the node of a name
    is_alive -- whether a life goes on
    dead -- (node, highest incarnation that is over) of all nodes
    """

    def __init__(
        self,
        links: Links,
        life_of: Callable[[str], Life],
        is_alive: Callable[[Life], bool],
        dead: Callable[[], list[tuple[int, int]]],
    ) -> None:
        self._links = links
        self._life_of = life_of
        self._is_alive = is_alive
        self._dead = dead
        self._entries: dict[str, _Entry] = {}
        self._lock = threading.Lock()

    def create(self, request: Message) -> Message:
        """The lock of that name, made at `home` (a node's name; without it at the caller's) if there is none."""
        name, life = request["name"], Life(*request["life"])
        if not isinstance(name, str) or not 0 < len(name) <= NAME_LONGEST:
            raise BadArgument(f"a name has 1 to {NAME_LONGEST} characters")
        while True:
            with self._lock:
                entry = self._entries.setdefault(name, _Entry())
            with entry.lock:
                if self._entries.get(name) is not entry:
                    continue  # it went in this moment
                if self._is_lost(entry):
                    self._forget(name, entry)
                    continue
                if entry.home is None:
                    try:
                        home = self._life_of(request["home"]) if request.get("home") else life
                        made = self._links.call(home, "lite.lock.make", name=name)
                    except LiteError:
                        self._forget(name, entry)
                        raise
                    entry.home, entry.address, entry.rkey = home, made["address"], made["rkey"]
                return self._use(entry, life, int(request["client"]))

    def find(self, request: Message) -> Message:
        """The lock of that name."""
        entry = self._entries.get(request["name"])
        if entry is not None:
            with entry.lock:
                present = self._entries.get(request["name"]) is entry
                if present and entry.home is not None and not self._is_lost(entry):
                    return self._use(entry, Life(*request["life"]), int(request["client"]))
        raise NoSuchName(f"no lock is called {request['name']!r}")

    def close(self, request: Message) -> Message:
        """A client has ended."""
        self._unused([(Life(*request["life"]), int(request["client"]))])
        return {}

    def used_by_others(self, home: Life) -> list[str]:
        """Names of the locks whose word is at `home`, and that clients of other nodes use."""
        with self._lock:
            entries = sorted(self._entries.items())
        return [name for name, entry in entries
                if entry.home == home and any(user[0] != home for user in set(entry.users))]  # fmt: skip

    def died(self, life: Life) -> None:
        """A node has ended: the locks it was home of, and its clients."""
        with self._lock:
            entries = list(self._entries.items())
        for name, entry in entries:
            with entry.lock:
                if entry.home == life:
                    self._forget(name, entry)
        self._unused([user for _name, entry in entries for user in list(entry.users) if user[0] == life])

    def rebuild(self, locks: Iterable[tuple[str, Life, int, int]], users: Iterable[tuple[str, Life, int]]) -> None:
        """What members report to a manager that was restarted."""
        for name, home, address, rkey in locks:
            self._entries[name] = _Entry(home, address, rkey)
        for name, life, client in users:
            if name in self._entries:
                self._entries[name].users.add((life, client))
        self._unused([])

    def _use(self, entry: _Entry, life: Life, client: int) -> Message:
        if not self._is_alive(life):  # its request was on its way when it died, and nobody will close the lock for it
            raise NodeDead(f"node {life.node} (incarnation {life.incarnation}) is dead")
        entry.users.add((life, client))
        return entry.where()

    def _unused(self, users: list[tuple[Life, int]]) -> None:
        with self._lock:
            entries = list(self._entries.items())
        for name, entry in entries:
            with entry.lock:
                entry.users.difference_update(users)
                if entry.users or entry.home is None or self._entries.get(name) is not entry:
                    continue
                self._forget(name, entry)
                try:
                    self._links.call(entry.home, "lite.lock.drop", name=name, dead=self._dead())
                except LiteError:
                    continue  # its home has died; else the word is kept there until a lock of that name is made again

    def _is_lost(self, entry: _Entry) -> bool:
        """Its home is dead, and `died` will say so in a moment."""
        return entry.home is not None and not self._is_alive(entry.home)

    def _forget(self, name: str, entry: _Entry) -> None:
        with self._lock:
            if self._entries.get(name) is entry:
                del self._entries[name]
