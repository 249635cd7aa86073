"""What goes when a blade has no room: pages that programs have mapped, and copies that are kept for others.

Mapped pages are in the blade's memory. Those longest not asked for go first; dirty ones, and those in a transaction,
never. Copies are on media, and others count on them: first those of pages that nobody here has mapped (redundant), then
those of pages in state committed, never of dirty ones. Their owner has to agree: it makes a copy elsewhere first, if
there would be too few, and it takes them away itself, while nobody commits to them, so that what it counts on is there.

Source: section 4.4 of the Hotpot paper. Nobody tells how often a mapped page is read: what is oldest is judged by the
last fault, fetch or transaction here.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from guest_agents.hotpot.atlas import Atlas
from guest_agents.hotpot.blocks import PAGE, STRIDE
from guest_agents.hotpot.datanode import DataNode
from guest_agents.hotpot.errors import HotpotError
from guest_agents.hotpot.media import Folder
from guest_agents.hotpot.messages import PORT, Links
from guest_agents.hotpot.opened import Opened
from guest_agents.hotpot.records import Record

log = logging.getLogger("rackless.hotpot")
_SHARE = 4
"""Mapped pages may take this part of a blade's memory."""
_RESERVE = 8
"""This part of a blade's persistent memory is kept free of copies."""
_MOST = 1024
"""Copies that go in one turn."""


@dataclass
class Limits:
    """Bytes."""

    mapped: int = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // _SHARE
    copies: int | None = None
    """None: what the device has room for; files have no limit."""


class Eviction:
    """Of one node. Its turns are one thread's."""

    def __init__(
        self, links: Links, atlas: Atlas, folder: Folder, copies: DataNode, opened: Callable[[], list[Opened]],
        counts: dict[str, int], limits: Limits,
    ) -> None:  # fmt: skip
        self._links = links
        self._atlas = atlas
        self._folder = folder
        self._copies = copies
        self._opened = opened
        self._counts = counts
        self.limits = limits

    def turn(self) -> None:
        """Make room where there is too little."""
        caches = [opened.cache for opened in self._opened()]
        over = sum(len(cache.pages()) for cache in caches) - self.limits.mapped // PAGE
        for cache in sorted(caches, key=lambda cache: -len(cache.pages())):
            if over > 0:
                over -= cache.evict(over)
        if (wanted := min(_MOST, self._too_many())) > 0:
            self._drop_copies(wanted)

    def _too_many(self) -> int:
        """Copies for which there is no room."""
        if self.limits.copies is not None:
            return self._copies.count() - self.limits.copies // STRIDE
        room = self._folder.room()
        return 0 if room is None else (room.size // _RESERVE - room.free) // STRIDE

    def _drop_copies(self, wanted: int) -> None:
        states = {opened.cache.record.id: opened.cache.states() for opened in self._opened()}
        for mapped_too in (False, True):
            for record, pages in self._copies.oldest():
                here = states.get(record.id, {"dirty": set(), "committed": set()})
                if here["dirty"] & pages or (not mapped_too and here["committed"] & pages):
                    continue
                wanted -= self._ask(self._atlas.latest(record), sorted(pages)[:wanted])
                if wanted <= 0:
                    return

    def _ask(self, record: Record, pages: list[int]) -> int:
        """Let owners take copies away; how many."""
        gone = 0
        for part in {record.part(page) for page in pages}:
            asked = [page for page in pages if record.part(page) == part]
            with suppress(HotpotError):
                reply = self._links.call(record.homes[part], "make_room",
                                         {"dataset": record.id, "part": part, "pages": asked}, port=PORT)  # fmt: skip
                gone += len(reply["pages"])
        self._counts["copies_evicted"] += gone
        return gone
