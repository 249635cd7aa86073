"""A dataset that programs of this node have open, and where its pages come from."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field

from guest_agents import lite
from guest_agents.hotpot import blocks
from guest_agents.hotpot.atlas import Atlas
from guest_agents.hotpot.blocks import PAGE, STRIDE, Copy
from guest_agents.hotpot.cache import Cache
from guest_agents.hotpot.datanode import DataNode
from guest_agents.hotpot.errors import Corrupt, HotpotError, NodeLost, NotOwner, PagesLost, Retry
from guest_agents.hotpot.lease import Lease
from guest_agents.hotpot.messages import LEAF
from guest_agents.hotpot.owner import Owner
from guest_agents.hotpot.records import Record

log = logging.getLogger("rackless.hotpot")
_TORN_SECONDS = 2.0
_TORN_PAUSE = 0.001
_GATHERED = 64
"""Pages in one read."""
_PAUSE = 0.02


@dataclass
class Opened:
    """A dataset that programs of this node have open."""

    cache: Cache
    programs: int = 0
    memories: dict[int, lite.Lmr] = field(default_factory=dict)
    """Of the parts it was fetched from."""
    names: dict[int, str] = field(default_factory=dict)
    """Of these memories: each home has a new one in each life."""
    told: set[int] = field(default_factory=set)
    """Chunks of which the owner knows that they may be cached here."""
    accessed: Counter[int] = field(default_factory=Counter)
    """Bytes that were fetched from the homes of parts, since they were last told."""
    suspect: set[int] = field(default_factory=set)
    """Parts of which cached pages may be old, as their home, or this node, was away."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def forget(self, part: int) -> None:
        """The memory of a part is not what it was."""
        with self.lock:
            self.names.pop(part, None)
            memory = self.memories.pop(part, None)
        if memory is not None:
            with suppress(lite.LiteError):
                memory.unmap()


class Fetcher:
    """Gets pages from wherever they are."""

    def __init__(self, lease: Lease, atlas: Atlas, owner: Owner, copies: DataNode) -> None:
        self._lease = lease
        self._links = lease.links
        self._atlas = atlas
        self._owner = owner
        self._copies = copies

    def fetch(self, opened: Opened, pages: list[int]) -> list[Copy]:
        """The present versions of pages: from the home if that is here, from a copy here, or from their owner by
        one-sided reads. When their home is away, it is waited for, or for another. Corrupt, PagesLost, NodeLost."""
        deadline = time.monotonic() + self._lease.timing.patience
        while True:
            record = self._atlas.latest(opened.cache.record)
            try:
                return self._fetch(opened, record, pages)
            except (NodeLost, NotOwner, Retry) as failure:
                if time.monotonic() > deadline:
                    raise NodeLost(failure.message) from None
            time.sleep(_PAUSE)
            with suppress(HotpotError):
                self._atlas.refresh(record.id)

    def _fetch(self, opened: Opened, record: Record, pages: list[int], *, near: bool = True) -> list[Copy]:
        """Once; `near`: copies on this node will do."""
        for chunk in {page // record.chunk_pages for page in pages} - opened.told:
            # Before the first read, so that no version between is missed.
            part = chunk % len(record.homes)
            fields = {"dataset": record.id, "part": part, "chunk": chunk}
            name = self._links.call(record.homes[part], "caching", fields, port=LEAF)["memory"]
            if opened.names.get(part) != name:
                opened.forget(part)
                opened.names[part] = name
            opened.told.add(chunk)
        found: dict[int, Copy] = {}
        distant: dict[int, list[int]] = defaultdict(list)
        for page in pages:
            copy = self._here(record, page, near=near)
            if copy is None or record.owner(page) == self._links.node.node_id:
                opened.accessed[record.part(page)] += PAGE
            if copy is None:
                distant[record.part(page)].append(page)
            else:
                found[page] = copy
        for part, wanted in distant.items():
            try:
                memory = self._memory(opened, record, part)
                for start in range(0, len(wanted), _GATHERED):
                    found |= _read(record, memory, wanted[start : start + _GATHERED])
            except lite.LiteError as failure:
                self.away(opened, part)
                node = record.homes[part]
                raise NodeLost(f"pages of {record.name} cannot be fetched from node {node}: {failure}") from None
        latest = self._atlas.latest(record)
        moved = {part for part in map(record.part, pages) if latest.epoch(part) != record.epoch(part)}
        for part in moved:
            self.away(opened, part)  # the next home may not have heard that they are cached here
        if moved:
            raise Retry(f"pages of {record.name} have just got another home")
        return [found[page] for page in pages]

    def away(self, opened: Opened, part: int) -> None:
        """The home of a part is gone, or another: it has to be told again what is cached here."""
        opened.forget(part)
        record = opened.cache.record
        opened.told -= set(range(part, record.chunks, len(record.homes)))

    def _here(self, record: Record, page: int, *, near: bool) -> Copy | None:
        if record.owner(page) == self._links.node.node_id:
            return self._owner.home(record.id, record.part(page)).read(page)
        try:
            return self._copies.read(record.id, page) if near else None
        except Corrupt:
            log.error("the copy of page %d of %s on this node is corrupt; its home is used", page, record.name)
            return None

    def _memory(self, opened: Opened, record: Record, part: int) -> lite.Lmr:
        with opened.lock:
            if part not in opened.memories:
                if part not in opened.names:
                    opened.told -= set(range(part, record.chunks, len(record.homes)))
                    raise NodeLost(f"the home of pages of {record.name} has changed")
                opened.memories[part] = self._links.node.map(opened.names[part], lite.Permission.READ)
            return opened.memories[part]

    def revalidate(self, opened: Opened) -> None:
        """What is cached here of suspect parts may be old: get it again. HotpotError: not now."""
        if not opened.suspect:
            return
        record = self._atlas.refresh(opened.cache.record.id)  # its old homes may not know yet that they are not
        opened.cache.record = record
        for part in list(opened.suspect):
            states = opened.cache.states()
            pages = sorted(page for page in states["dirty"] | states["committed"] if record.part(page) == part)
            self.away(opened, part)
            for start in range(0, len(pages), _GATHERED):
                wanted = pages[start : start + _GATHERED]
                try:
                    for page, copy in zip(wanted, self._fetch(opened, record, wanted, near=False), strict=True):
                        opened.cache.refreshed(page, copy)
                except (Corrupt, PagesLost):  # who uses one of them hears of it
                    opened.cache.doubtful(wanted)
            opened.suspect.discard(part)


def _read(record: Record, memory: lite.Lmr, pages: list[int]) -> dict[int, Copy]:
    """Pages of one owner, again as long as they are being changed. Corrupt after a while; PagesLost."""
    found: dict[int, Copy] = {}
    missing, deadline = pages, time.monotonic() + _TORN_SECONDS
    while missing:
        parts = memory.gather((record.slot(page) * STRIDE, STRIDE) for page in missing)
        for page, block in zip(missing, parts, strict=True):
            with suppress(Corrupt):
                found[page] = blocks.unseal(block)
                if found[page].version == blocks.LOST:
                    raise PagesLost(f"page {page} of {record.name} was lost with the node that had it")
        missing = [page for page in missing if page not in found]
        if missing:
            time.sleep(_TORN_PAUSE)
        if missing and time.monotonic() > deadline:
            raise Corrupt(f"page {missing[0]} of {record.name} does not have its checksum in its owner's memory")
    return found
