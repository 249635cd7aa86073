"""What a service does all the time so that data are where they are used: beside the keeper, which sees to it that
nothing is lost and must not wait for pages that move."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress

from guest_agents.hotpot.atlas import Atlas
from guest_agents.hotpot.errors import HotpotError
from guest_agents.hotpot.eviction import Eviction
from guest_agents.hotpot.lease import Lease
from guest_agents.hotpot.messages import LEAF
from guest_agents.hotpot.migration import Migration
from guest_agents.hotpot.opened import Opened

log = logging.getLogger("rackless.hotpot")


class Adapter:
    """Of one service.

    opened -- the datasets that programs of this node have open
    """

    def __init__(
        self, lease: Lease, atlas: Atlas, migration: Migration, eviction: Eviction,
        opened: Callable[[], list[Opened]],
    ) -> None:  # fmt: skip
        self._lease = lease
        self._atlas = atlas
        self._migration = migration
        self._eviction = eviction
        self._opened = opened
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Do it all the time, in a thread."""
        self._thread = threading.Thread(target=self._run, name="hotpot adapter", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._lease.timing.beat):
            try:
                self.turn()
            except Exception:
                log.exception("Hotpot's adapter")

    def turn(self) -> None:
        """Everything once."""
        for opened in self._opened():
            if opened.cache.record.adapt:
                self._report(opened)
        self._migration.turn()
        self._eviction.turn()

    def _report(self, opened: Opened) -> None:
        """Owners do not see what is read from their memory: tell them."""
        record = self._atlas.latest(opened.cache.record)
        for part in list(opened.accessed):
            about = {"dataset": record.id, "part": part, "bytes": opened.accessed.pop(part, 0)}
            with suppress(HotpotError):  # they are counts
                self._lease.links.call(record.homes[part], "accessed", about, port=LEAF)
