"""What a service does all the time so that data are where they are used: beside the keeper, which sees to it that
nothing is lost and must not wait for pages that move."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from guest_agents.hotpot.atlas import Atlas
from guest_agents.hotpot.beat import Beat
from guest_agents.hotpot.errors import HotpotError
from guest_agents.hotpot.eviction import Eviction
from guest_agents.hotpot.lease import Lease
from guest_agents.hotpot.messages import LEAF
from guest_agents.hotpot.migration import Migration
from guest_agents.hotpot.opened import Opened


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
        self.beat = Beat("hotpot adapter", lease.timing.beat, self.turn)
        """What a service starts and closes; nothing happens before."""

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
