"""What a service does all the time: it keeps touch with the dispatcher, and mends what crashes have left undone."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress

from guest_agents import lite
from guest_agents.hotpot import promotion
from guest_agents.hotpot.beat import Beat
from guest_agents.hotpot.coordinator import Coordinator
from guest_agents.hotpot.datanode import DataNode
from guest_agents.hotpot.dispatcher import Dispatcher
from guest_agents.hotpot.errors import HotpotError, Isolated, NodeLost, NoSuchDataset, VersionMismatch
from guest_agents.hotpot.lease import Lease
from guest_agents.hotpot.messages import PORT, Message
from guest_agents.hotpot.owner import Owner
from guest_agents.hotpot.records import SETTINGS, Record
from guest_agents.hotpot.resolver import Resolver
from guest_agents.hotpot.seat import Seat

log = logging.getLogger("rackless.hotpot")
_REPAIRED = 64
"""Pages for which copies are made at a time."""
_LOOKED = 512
_COVERED = 16
"""Chunks that are looked at in one turn."""
_REPAIR = (1 << 63) + 1
"""Whose the pages are meanwhile; no transaction has this number."""
_WAKE_SECONDS = 3.0
"""From one try to wake the dispatcher to the next."""
_LISTED = 40_000
"""Copies of one part that are looked at after a crash: what goes in a message. Others are made again."""


class Keeper:
    """Of one service.

    revalidate -- gets again what is cached and may be old; whether the node was cut off
    suspect -- told of a dataset and a part of which what is cached may be old, as copies here were
    about -- what the dispatcher is told when this node registers
    wake -- called now and then while the dispatcher is silent: its blade may have begun a new life that has no Hotpot
    """

    def __init__(
        self, lease: Lease, owner: Owner, copies: DataNode, coordinator: Coordinator, resolver: Resolver,
        seat: Seat, dispatcher: Dispatcher | None, media: str, revalidate: Callable[..., None],
        suspect: Callable[[int, int], None], about: Callable[[], Message],
        wake: Callable[[], None],
    ) -> None:  # fmt: skip
        self._lease = lease
        self._links = lease.links
        self._owner = owner
        self._copies = copies
        self._coordinator = coordinator
        self._resolver = resolver
        self.dispatcher = dispatcher
        self._seat = seat
        self._media = media
        self._revalidate = revalidate
        self._suspect = suspect
        self._about = about
        self._wake = wake
        self._woken = float("-inf")
        self.beat = Beat("hotpot keeper", lease.timing.beat, self.turn)
        """What a service starts and closes; nothing happens before."""
        self._cut_off = False
        self.registered = False
        """The dispatcher knows this node."""
        self.said: list[str] = []
        """What a recovery has found that was lost, or mended."""

    def note(self, texts: list[str]) -> None:
        """Report what a recovery has found."""
        for text in texts:
            log.warning("recovery: %s", text)
        self.said = [*self.said, *texts][-100:]

    def register(self) -> None:
        """Tell the dispatcher of this node. NodeLost, VersionMismatch."""
        self._lease.ask("register", {"settings": SETTINGS, "media": self._media, "begins": not self.registered,
                                     **self._about()})  # fmt: skip
        self.registered = True

    def turn(self) -> None:
        """Everything once."""
        was_cut_off = not self._lease.valid
        synced = {home.key: set(home.synced) for home in self._owner.homes()}
        answer = self._lease.renew({"media": self._media})
        if answer is not None and ("unknown" in answer or not self.registered):
            try:
                self.register()
            except (NodeLost, Isolated, VersionMismatch) as failure:
                log.warning("the dispatcher: %s", failure)
                return
            answer = self._lease.renew({"media": self._media})
        if answer is None and not self._lease.valid and time.monotonic() - self._woken > _WAKE_SECONDS:
            self._wake()
            self._woken = time.monotonic()
        with suppress(lite.LiteError):  # of the node itself
            if answer is None and not self._lease.valid:
                self._seat.look()
                if self._seat.due():
                    self._seat.stand()
            if self.dispatcher is not None and self.dispatcher.refused and not self.dispatcher.superseded:
                self._seat.stand()
        if answer is None or "unknown" in answer:
            return
        self._renew()
        self.reunite()
        self._heed(answer, synced)
        self._revalidate(cut_off=was_cut_off)
        self._rejoin()
        self._resolver.look()
        self._coordinator.resume()
        self._repair()
        self._cover()
        if self.dispatcher is not None and not self.dispatcher.superseded:
            with suppress(HotpotError):
                self.dispatcher.in_office()
                self.dispatcher.strike_off()
                promotion.watch(self.dispatcher)

    def _renew(self) -> None:
        """Homes whose registered memory has ended get another."""
        for home in self._owner.homes():
            try:
                if home.renew(self._links.node):
                    self.note([f"part {home.part} of {home.record.name} is in reach again: LITE had begun a new life"])
            except (HotpotError, lite.LiteError) as failure:
                log.warning("part %d of %s is out of reach: %s", home.part, home.record.name, failure)

    def reunite(self) -> None:
        """Homes that are not in use yet get there."""
        for home in self._owner.homes():
            if not home.ready:
                try:
                    self.note(promotion.reunite(self._links, self._owner, home))
                except HotpotError as failure:
                    log.info("a home of %s is not in use yet: %s", home.record.name, failure)
                else:
                    if home.ready:
                        self._copies.let_go(*home.key)

    def _heed(self, answer: Message, before: dict[tuple[int, int], set[int]]) -> None:
        """What the dispatcher knows of copies; `before`: what homes knew when it was asked, others have come since."""
        for number, part, epoch, synced in answer["homes"]:
            with suppress(HotpotError):
                home = self._owner.home(number, part)
                gone = home.synced & before.get(home.key, set()) - set(synced)
                if home.ready and gone and home.record.epoch(part) == epoch:
                    self._owner.replicas.exclude(home, gone)
        known = {(number, part) for number, part, _epoch, _synced in answer["homes"]}
        for home in self._owner.homes():
            handed = home.leave.handed if home.leave is not None else 0.0
            if home.key not in known and time.monotonic() > handed + self._lease.timing.lease:
                home.ready = False
        trusted = {tuple(pair) for pair in answer["trusted"]}
        for record in self._copies.records():
            for part in range(len(record.homes)):
                if (record.id, part) not in trusted and self._copies.distrust(record.id, part):
                    self._suspect(record.id, part)

    def _rejoin(self) -> None:
        """Ask homes what of the copies here is still good."""
        for record in self._copies.records():
            for part in range(len(record.homes)):
                doubtful = self._copies.doubtful(record.id, part)
                if doubtful:
                    try:
                        self._ask_home(record, part, doubtful)
                    except NoSuchDataset:  # deleted while this node was away
                        self._copies.drop(record.id)
                        break
                    except HotpotError as failure:
                        log.info("copies of %s are not trusted yet: %s", record.name, failure)

    def _ask_home(self, record: Record, part: int, doubtful: dict[int, int]) -> None:
        # What this node has heard of homes may be old, or of one that did not come to be.
        record = Record.from_json(self._lease.ask("find", {"dataset": record.id})["record"])
        self._copies.learn(record)
        if record.homes[part] == self._links.node.node_id:
            home = self._owner.home(record.id, part)
            if home.ready and home.leave is None:
                self._copies.settle(record.id, doubtful, set(doubtful))
            return
        asked = dict(sorted(doubtful.items())[:_LISTED])
        about = {"dataset": record.id, "part": part, "pages": [list(pair) for pair in asked.items()]}
        reply = self._links.call(record.homes[part], "rejoin", about, port=PORT)
        over = doubtful.keys() - asked.keys()
        stale = set(reply.get("stale", ()))
        gone = {page: doubtful[page] for page in stale | over}
        self._copies.settle(record.id, gone, set(gone))
        if not stale and "again" not in reply:
            self._copies.settle(record.id, asked, set())

    def _repair(self) -> None:
        """Make copies of pages that have too few, and reach nodes that missed news."""
        for home in self._owner.homes():
            if home.leave is not None and home.leave.frozen:
                continue
            if home.ready and home.missed:
                promotion.attended(self._links, home, set(home.missed))
            if not home.ready or not home.short:
                continue
            lacking = home.lacking(_LOOKED)[:_REPAIRED]
            free = self._owner.held_still(home, lacking, _REPAIR)
            try:
                with suppress(HotpotError):
                    self._owner.replicas.repair(home, free)
            finally:
                self._owner.let_go(home, free, _REPAIR)

    def _cover(self) -> None:
        """Find chunks that had pages without a copy, and have none any more."""
        for home in self._owner.homes():
            if not home.ready or home.leave is not None:
                continue
            chunks = [chunk for chunk in sorted(home.solo) if chunk > home.looked][:_COVERED]
            home.looked = chunks[-1] if len(chunks) == _COVERED else -1
            for chunk in chunks:
                if home.is_bare(chunk):
                    continue
                pages = home.record.pages_in(chunk)
                free = self._owner.held_still(home, pages, _REPAIR)
                try:
                    if len(free) == len(pages) and not home.is_bare(chunk):
                        with suppress(HotpotError):
                            self._owner.replicas.cover(home, chunk)
                finally:
                    self._owner.let_go(home, free, _REPAIR)
