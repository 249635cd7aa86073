"""What a blade holds of the global managers' books, and its line to them.

Every blade keeps the newest ledger of vNodes, in a file too, so that its agent may be restarted; a processor blade has
its own list of programs. Both go to the manager when this blade begins a life, when they change, and in the report to
a manager that was restarted.
"""

from __future__ import annotations

import itertools
import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from guest_agents.control import Handler, Message
from guest_agents.lite.errors import LiteError, ManagerLost
from guest_agents.lite.links import Links
from guest_agents.membership import Follower, Life
from guest_agents.splitkernel.managers.vnode import Ledger

TELL_SECONDS = 10.0
_RETRY_SECONDS = 0.5
_AWAY_SECONDS = 10.0

log = logging.getLogger("rackless.managers")


class Holder(Follower):
    """One blade's copy of the ledger.

    own -- this blade's present life, None before its first
    manager -- the manager's present life, None while it is away
    bury -- is called with the lives that are over, in a thread of its own: what they held here goes back
    """

    def __init__(
        self,
        links: Links,
        own: Callable[[], Life | None],
        manager: Callable[[], Life | None],
        bury: Callable[[dict[int, int]], None],
        file: Path,
    ) -> None:
        self._links = links
        self._own = own
        self._manager = manager
        self._bury = bury
        self._file = file
        self._lock = threading.Lock()
        self._ledger = _load(file)
        self._sequence = itertools.count(1)
        self._news = threading.Event()
        self._dead: dict[int, int] = {}
        self._quiet_until = 0.0
        self.programs: Callable[[], list[Message]] = list
        """This blade's programs, set by a process monitor."""
        self.on_change: Callable[[], None] = lambda: None
        """Is called when the ledger has changed."""

    @property
    def ledger(self) -> Ledger:
        """The newest ledger known here."""
        return self._ledger

    def handlers(self) -> dict[str, Handler]:
        """What the managers tell; `guarded` is put around this."""
        return {"holder.keep": self._keep}

    def start(self) -> None:
        """Tell the managers what changes here, in a thread of its own."""
        threading.Thread(target=self._tell, name="holder", daemon=True).start()

    def changed(self) -> None:
        """A program has begun or ended."""
        self._news.set()

    def ask(self, op: str, timeout: float, /, **fields: object) -> Message:
        """A request to the managers, in this blade's name. LiteError (ManagerLost while the manager is away).

        When a manager did not answer in time, nobody waits for it again for some seconds.
        """
        manager, own = self._manager(), self._own()
        if manager is None or own is None or time.monotonic() < self._quiet_until:
            raise ManagerLost
        begun = time.monotonic()
        try:
            return self._links.call(manager, op, timeout, life=[own.node, own.incarnation], **fields)
        except LiteError:
            if time.monotonic() - begun >= timeout:
                self._quiet_until = time.monotonic() + _AWAY_SECONDS
            raise

    # Membership

    def report(self) -> Message:
        """What a restarted manager is told."""
        # The number first: a list that is newer than its number is put right by the next one.
        sequence = next(self._sequence)
        return {"ledger": self._ledger.to_json(), "sequence": sequence, "programs": self.programs()}

    def reborn(self, life: Life) -> None:
        """A new life knows what this blade has kept; whether that is the newest, the managers tell."""
        self._news.set()

    def news(self, members: list[Message], dead: dict[int, int]) -> None:
        """Who has died holds nothing here any more."""
        self._quiet_until = 0.0
        if dead != self._dead:
            self._dead = dead
            threading.Thread(target=self._bury, args=(dead,), name="burial", daemon=True).start()

    # Inside

    def _keep(self, request: Message) -> Message:
        self._adopt(Ledger.from_json(request["ledger"]))
        return {}

    def _adopt(self, ledger: Ledger) -> None:
        with self._lock:
            if ledger.version > self._ledger.version:
                part = self._file.with_suffix(".part")
                part.write_text(json.dumps(ledger.to_json()))
                part.replace(self._file)
                self._ledger = ledger
        self.on_change()

    def _tell(self) -> None:
        while True:
            self._news.wait()
            self._news.clear()
            try:
                reply = self.ask("managers.hear", TELL_SECONDS, **self.report())
                self._adopt(Ledger.from_json(reply["ledger"]))
            except LiteError as failure:
                log.info("the managers are told later: %s", failure)
                self._news.set()
                time.sleep(_RETRY_SECONDS)


def _load(file: Path) -> Ledger:
    try:
        return Ledger.from_json(json.loads(file.read_text()))
    except FileNotFoundError:
        return Ledger()
