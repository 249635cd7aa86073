"""A part of a dataset moves to the node that uses it most, while it is read and written (the paper's ON migration).

Each home counts by node, for a window of time, what its programs fetch and commit. A node that uses more than all
others together, and enough of it to be worth the trouble, becomes the home: it gets copies of all pages as any data
node would, and every commit from then on. When it lacks few, the home refuses commits (Retry) until those have gone
too, keeps copies itself where pages would have too few, and the dispatcher has the node make a home of what it has, as
if the old one had died (promotion.py). Readers go on with the old one's memory until the new one has told them.
Whoever dies on the way leaves a home with everything: the old one until the dispatcher has the new one in its book.

Source: section 4.3 of the Hotpot paper; thresholds as in its public code. Its unit is a chunk, here it is a part.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress

from guest_agents.hotpot import promotion
from guest_agents.hotpot.blocks import LOST, PAGE
from guest_agents.hotpot.datanode import DataNode
from guest_agents.hotpot.dispatcher import Dispatcher
from guest_agents.hotpot.errors import BadArgument, HotpotError, NotOwner, Retry
from guest_agents.hotpot.home import Home, Leave
from guest_agents.hotpot.lease import Lease
from guest_agents.hotpot.messages import PORT, Handler, Message
from guest_agents.hotpot.owner import Owner

log = logging.getLogger("rackless.hotpot")
LEAST = 30 << 10
"""Bytes that a node has to fetch and commit in a window for a part to move there."""
_BATCH = 64
"""Pages that are sent at a time; nobody commits to them meanwhile."""
_FEW = 64
"""So many may be missing when commits begin to be refused."""
_MOVE = (1 << 63) + 2
"""Whose the pages are meanwhile; no transaction has this number."""


class Migration:
    """Of all homes of this node. Its turns are one thread's."""

    def __init__(self, lease: Lease, owner: Owner, copies: DataNode) -> None:
        self._lease = lease
        self._links = lease.links
        self._owner = owner
        self._copies = copies
        self._window = time.monotonic()
        self._departures = itertools.count()

    def handlers(self) -> dict[str, Handler]:
        """What others may ask, on LEAF."""
        return {"leave": self._leave, "accessed": self._accessed}

    def _leave(self, _source: int, header: Message, _payload: memoryview) -> Message:
        """Begin to move a part. BadArgument, NotOwner; Retry: it is moving."""
        self.begin(self._owner.home(header["dataset"], header["part"]), header["node"])
        return {}

    def _accessed(self, source: int, header: Message, _payload: memoryview) -> Message:
        """What programs of a node have fetched."""
        self._owner.home(header["dataset"], header["part"]).accessed[source] += header["bytes"]
        return {}

    def begin(self, home: Home, node: int) -> None:
        """Move a part to a node, in the turns to come. BadArgument: it cannot go there; Retry: not now."""
        if node == self._links.node.node_id:
            return
        if node not in self._links.living():
            raise BadArgument(f"there is no node {node}, or it is dead")
        if home.leave is not None or not home.ready:
            raise Retry(f"part {home.part} of {home.record.name} is moving, or being recovered")
        home.leave = Leave(node)

    def depart(self, nodes: Sequence[int]) -> Message:
        """Begin to move all parts that are here to these nodes, in turn; to be repeated, as one may not come to be.

        What is here still, in bytes of `datasets` by name, and how many pages have ever `moved` from here.
        """
        here: dict[str, int] = defaultdict(int)
        for home in self._owner.homes():
            here[home.record.name] += home.record.slots(home.part) * PAGE
            if nodes:
                with suppress(BadArgument, Retry):
                    self.begin(home, nodes[next(self._departures) % len(nodes)])
        return {"datasets": here, "moved": self._owner.counts["pages_moved"]}

    def turn(self) -> None:
        """Decide when a window ends; go on with what moves."""
        over = time.monotonic() - self._window >= self._lease.timing.window
        for home in self._owner.homes():
            if over:
                node = hottest(home, self._links.node.node_id)
                home.accessed.clear()
                if node and home.record.adapt and home.ready and home.leave is None and node in self._links.living():
                    home.leave = Leave(node)
            leave = home.leave
            if leave is not None and not leave.handed:
                try:
                    self._go_on(home, leave)
                except HotpotError as failure:
                    log.info("part %d of %s stays: %s", home.part, home.record.name, failure)
                    self._stay(home)
        if over:
            self._window = time.monotonic()

    def _stay(self, home: Home) -> None:
        self._owner.counts["migrations_given_up"] += 1
        home.leave = None

    def _go_on(self, home: Home, leave: Leave) -> None:
        """HotpotError: it has to stay, for now."""
        until = time.monotonic() + self._lease.timing.beat / 2
        if not home.ready or leave.node not in self._links.living():
            raise Retry("its home is being recovered, or the other is gone")
        while True:
            if not leave.pages:
                leave.pages = self._missing(home, leave.node)
                if len(leave.pages) <= _FEW:
                    break
            if time.monotonic() > until or not self._send(home, leave):
                return
        if not leave.frozen:
            self._owner.freeze(home)
        if self._owner.busy(home):
            if time.monotonic() - leave.frozen > self._lease.timing.settle:
                raise Retry("commits do not come to an end")
            return
        self._owner.replicas.give(home, leave.node, [])  # if nothing was committed yet
        leave.pages = self._missing(home, leave.node)
        while leave.pages:
            if not self._send(home, leave):
                return
        self._hand_over(home, leave)

    def _missing(self, home: Home, node: int) -> list[int]:
        """Pages that were committed and of which a node has no copy."""
        return [page for page in home.record.pages_of(home.part)
                if node not in home.copies[page] and home.version(page) not in (0, LOST)]  # fmt: skip

    def _send(self, home: Home, leave: Leave) -> bool:
        """Some of the missing pages; whether any could be sent. HotpotError."""
        batch, leave.pages = leave.pages[:_BATCH], leave.pages[_BATCH:]
        free = self._owner.held_still(home, batch, _MOVE)
        try:
            missing = [page for page in free if leave.node not in home.copies[page]]
            self._owner.replicas.give(home, leave.node, missing)
            self._owner.counts["pages_moved"] += len(missing)
        finally:
            self._owner.let_go(home, free, _MOVE)
        return bool(free)

    def _hand_over(self, home: Home, leave: Leave) -> None:
        """The dispatcher makes the other node the home; nothing changes here meanwhile. HotpotError: not known whether
        it did."""
        record, part = home.record, home.part
        pages = {page: home.version(page) for page in record.pages_of(part)}
        lost = [page for page, version in pages.items() if version == LOST]
        held = {page: home.read(page) for page, version in pages.items() if version not in (0, LOST)}
        short = {page: copy for page, copy in held.items() if len(home.copies[page]) < copy.degree}
        if short:
            self._copies.keep(record, short)
        about = {"dataset": record.id, "part": part, "epoch": record.epoch(part), "node": leave.node, "lost": lost,
                 "xids": sorted(home.xids), "refused": self._owner.refused(home), "missed": sorted(home.missed),
                 "pages": len(held), "keeps": bool(short)}  # fmt: skip
        try:
            self._links.call(self._lease.manager, "hand_over", about, port=PORT)
        except HotpotError:
            home.ready = False  # until the dispatcher has said whose it is
            raise
        leave.handed = time.monotonic()
        self._owner.counts["migrations"] += 1
        log.info("part %d of %s goes to node %d", part, record.name, leave.node)


def hottest(home: Home, me: int) -> int | None:
    """The node to which a part should go."""
    node, most = max(home.accessed.items(), key=lambda pair: pair[1], default=(me, 0))
    return node if node != me and most >= LEAST and 2 * most > sum(home.accessed.values()) else None


def hand_over(dispatcher: Dispatcher) -> Handler:
    """What homes may ask the dispatcher, on PORT: that another node shall be the home of a part. NotOwner, BadArgument;
    others: not yet, and not known how far it has come."""

    def answer(source: int, header: Message, _payload: memoryview) -> Message:
        with dispatcher.lock:
            listed = dispatcher.listed.get(header["dataset"])
            part, node = header["part"], header["node"]
            if listed is None or listed.record.homes[part] != source or listed.record.epoch(part) != header["epoch"]:
                raise NotOwner(f"node {source} is not the home of part {part} of dataset {header['dataset']}")
            if node not in listed.synced[part]:
                raise BadArgument(f"node {node} has no copies that can be trusted")
        planned = {name: header[name] for name in ("lost", "xids", "refused", "missed", "pages")}
        promotion.move(dispatcher, listed, part, node, {source} if header["keeps"] else set(), planned)
        return {}

    return answer
