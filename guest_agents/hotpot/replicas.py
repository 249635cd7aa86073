"""The owner's side of copies: which nodes keep them, and what those are sent.

All nodes that keep a copy of any page of a commit get all of the commit, in one message that they log before they obey
it. So each of them has all of it or nothing, and any of them can become the home: it has all that was acknowledged.
The dispatcher knows which these are before they count, and that one does not count any more before a commit is
acknowledged without it.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence

from guest_agents.hotpot.blocks import Copy
from guest_agents.hotpot.changes import Change, encode
from guest_agents.hotpot.errors import Corrupt, HotpotError, Isolated, NodeLost, NotOwner, PagesLost, TooFewNodes
from guest_agents.hotpot.home import Home
from guest_agents.hotpot.lease import Lease
from guest_agents.hotpot.messages import LEAF, Call, Message

log = logging.getLogger("rackless.hotpot")
_BATCH = 128
"""Pages in one message."""
_ROUNDS = 16


class Replicas:
    """Copies of all homes of this node, elsewhere."""

    def __init__(self, lease: Lease, counts: dict[str, int]) -> None:
        self._lease = lease
        self._links = lease.links
        self._counts = counts
        self._telling = threading.RLock()

    def plan(self, home: Home, pages: Iterable[int], replicas: int) -> set[int]:
        """The nodes that shall have copies of these pages, which the dispatcher knows then. TooFewNodes, Isolated."""
        written = list(pages)
        nodes: set[int] = set().union(*(home.copies[page] for page in written))
        useless: set[int] = set()
        while True:
            if len(nodes) + 1 < replicas:
                others = self._links.living() - {self._links.node.node_id} - useless
                nodes |= self._more(home, written, replicas - 1 - len(nodes & others), others - nodes)
                if len(nodes & others) + 1 < replicas:
                    raise TooFewNodes(f"{replicas} copies asked for")
            failed = self.register(home, nodes, written)
            if not failed:
                return nodes
            useless |= failed
            nodes -= failed

    def register(self, home: Home, nodes: set[int], pages: Iterable[int], *, cleared: bool = False) -> set[int]:
        """Let the dispatcher know that these nodes get copies of pages of a home; or that nobody does. Those that
        cannot be reached, and get none. Isolated.

        cleared -- they have no old copies, or these were compared
        """
        with self._telling:  # another commit must not seed a node that is being cleared for this one
            if home.unsure:
                self.exclude(home, set(home.unsure))
            new = nodes - home.synced
            failed: set[int] = set()
            if new and not cleared:
                # What they may have of the part is from before they were excluded, which they need not have heard of.
                about = {"dataset": home.record.id, "part": home.part, "epoch": home.record.epoch(home.part)}
                calls: list[Call] = [(node, "clear", about, b"") for node in sorted(new)]
                replies = self._links.call_all(calls, LEAF)
                failed = {call[0] for call, reply in zip(calls, replies, strict=True) if isinstance(reply, HotpotError)}
                new -= failed
            left = nodes - failed
            solo = set() if left else {page // home.record.chunk_pages for page in pages}
            if new or not solo <= home.solo:
                home.unsure |= new
                self._tell_dispatcher(home, add=new, solo=solo)  # not those it may have struck off since
                home.unsure -= new
                home.synced |= new
                home.solo |= solo
        return failed

    def exclude(self, home: Home, nodes: set[int], bare: set[int] | None = None) -> None:
        """Let the dispatcher know that the copies of these nodes are to be trusted no more, and what that leaves
        without a copy; it may have struck them off itself, and fear more. Isolated.

        bare -- the chunks that are left without, where they were counted
        """
        with self._telling:
            home.unsure |= nodes
            solo = (home.solo | home.bare_without(nodes)) & set(home.chunks) if bare is None else bare
            left = sorted(home.synced - nodes)
            self._tell_dispatcher(home, remove=nodes, solo=solo, solo_is=sorted(solo), synced=left)
            home.solo = solo
            home.unsure -= nodes
            for node in nodes:
                home.forget(node)

    def cover(self, home: Home, chunk: int) -> None:
        """All pages of a chunk have copies again: it needs not wait for this node if that is lost. Nobody changes them
        meanwhile. Isolated."""
        with self._telling:
            self.exclude(home, set(), home.solo - {chunk})

    def _tell_dispatcher(self, home: Home, add: Iterable[int] = (), remove: Iterable[int] = (),
                         solo: Iterable[int] = (), **more: list[int]) -> None:  # fmt: skip
        about = {"dataset": home.record.id, "part": home.part, "epoch": home.record.epoch(home.part),
                 "add": sorted(add), "remove": sorted(remove), "solo": sorted(solo), **more}  # fmt: skip
        try:
            home.media_of = dict(self._lease.ask("synced", about)["media"])
        except NotOwner:
            home.ready = False
            raise
        except HotpotError as failure:
            raise Isolated(f"the dispatcher does not answer: {failure.message}") from None

    def replicate(
        self, home: Home, xid: int, changes: Sequence[Change], fresh: dict[int, Copy], replicas: int, degree: int
    ) -> int:
        """A commit to all copies of its pages; how many there are then of each, the home included. Isolated,
        NotOwner: not known which have it."""
        lost: set[int] = set()
        nodes: set[int] = set().union(*(home.copies[page] for page in fresh))
        body, payload = encode(changes)
        header = {"dataset": home.record.id, "part": home.part, "epoch": home.record.epoch(home.part), "xid": xid,
                  "degree": degree, "pages": body}  # fmt: skip
        for _ in range(_ROUNDS):
            if len(nodes) + 1 < replicas:
                others = self._links.living() - {self._links.node.node_id} - lost - nodes
                nodes |= self._more(home, list(fresh), replicas - 1 - len(nodes), others)
            useless = self.register(home, nodes, fresh)
            if useless:
                lost |= useless
                nodes -= useless
                continue
            failed = self._seed(home, nodes, fresh)
            calls: list[Call] = [(node, "replica", {**header, "media": home.media_of.get(node)}, payload)
                                 for node in sorted(nodes - failed)]  # fmt: skip
            again = False
            for call, reply in zip(calls, self._links.call_all(calls, LEAF), strict=True):
                node = call[0]
                if isinstance(reply, NotOwner):
                    home.ready, home.refused = False, True
                    raise reply
                if isinstance(reply, HotpotError):
                    failed.add(node)
                    continue
                self._counts["copies_sent"] += len(fresh)
                stale = set(reply.get("stale", ()))
                again = again or bool(stale)
                for page in stale:
                    home.copies[page].discard(node)
                self._has(home, node, fresh.keys() - stale)
            if failed:
                log.warning("nodes %s do not take copies of %s", sorted(failed), home.record.name)
                self.exclude(home, failed)
                lost |= failed
                nodes -= failed
            elif not again and nodes <= home.synced:  # none was excluded meanwhile
                if len(nodes) + 1 < degree:
                    home.short |= set(fresh)
                return len(nodes) + 1
        raise HotpotError(f"copies of {home.record.name} do not come to an end")

    def _has(self, home: Home, node: int, pages: Iterable[int]) -> None:
        """A node has taken copies of pages; they do not count if it was excluded meanwhile."""
        with self._telling:
            if node in home.synced:
                for page in pages:
                    home.copies[page].add(node)

    def _seed(self, home: Home, nodes: set[int], fresh: dict[int, Copy]) -> set[int]:
        """Nodes that have no copy of some of these pages get them as they were before; those that did not."""
        by_node: dict[int, dict[int, Copy]] = {}
        for node in nodes:
            missing = [page for page in fresh if node not in home.copies[page]]
            if missing:
                by_node[node] = {page: self._before(home, page, fresh[page]) for page in missing}
        return self.send(home, "seed", by_node)

    def _before(self, home: Home, page: int, fresh: Copy) -> Copy:
        try:
            return home.read(page)
        except Corrupt:  # its writing was interrupted: what it was before is gone, what it is to be is known
            return fresh

    def _more(self, home: Home, pages: list[int], missing: int, others: set[int]) -> set[int]:
        """Nodes for more copies: those that cache a chunk first, then the next ones."""
        me = self._links.node.node_id
        caching: set[int] = set()
        for chunk in {page // home.record.chunk_pages for page in pages}:
            caching |= home.caching.get(chunk, set())
        return set(sorted(others, key=lambda node: (node not in caching, node < me, node))[: max(0, missing)])

    def send(self, home: Home, op: str, by_node: dict[int, dict[int, Copy]]) -> set[int]:
        """Whole pages to nodes; those that did not take them."""
        calls: list[Call] = []
        for node, pages in by_node.items():
            listed = [(page, copy) for page, copy in pages.items() if copy.version]
            for start in range(0, max(1, len(listed)), _BATCH):
                part = listed[start : start + _BATCH]
                header: Message = {
                    "dataset": home.record.id, "part": home.part, "epoch": home.record.epoch(home.part),
                    "pages": [[page, copy.version, copy.xid, copy.degree] for page, copy in part],
                }  # fmt: skip
                if op == "seed":
                    header |= {"record": home.record.to_json(), "media": home.media_of.get(node)}
                calls.append((node, op, header, b"".join(copy.data for _, copy in part)))
        replies = self._links.call_all(calls, LEAF)
        return {call[0] for call, reply in zip(calls, replies, strict=True) if isinstance(reply, HotpotError)}

    def tell(self, home: Home, fresh: dict[int, Copy], writer: int) -> None:
        """Nodes that may have cached a page, and do not keep a copy, get its new version; the writer has it."""
        by_node: dict[int, dict[int, Copy]] = defaultdict(dict)
        for page, copy in fresh.items():
            nodes = home.caching.get(page // home.record.chunk_pages, set()) - home.copies[page] - {writer}
            for node in nodes:
                by_node[node][page] = copy
        if by_node:
            lost = self.send(home, "update", by_node)
            for nodes in list(home.caching.values()):
                nodes -= lost
            home.missed |= lost

    def give(self, home: Home, node: int, pages: Sequence[int]) -> None:
        """Copies of pages to one node; nobody changes them meanwhile. Isolated; NodeLost: it does not take them."""
        if self.register(home, {node}, pages) or self.send(home, "seed", {node: {p: home.read(p) for p in pages}}):
            self.exclude(home, {node})
            raise NodeLost(f"node {node} takes no copies of {home.record.name}")
        self._has(home, node, pages)

    def withdraw(self, home: Home, node: int, pages: Sequence[int]) -> list[int]:
        """Take copies away from a node, those of which there are enough without, when others have been made; nobody
        changes them meanwhile. Which. Isolated, NodeLost: not known, none of its copies counts."""
        self.repair(home, pages, without=node)
        gone = [page for page in pages if len(home.copies[page] - {node}) + 1 >= home.read(page).degree]
        if bare := [page for page in gone if home.copies[page] <= {node}]:
            self.register(home, set(), bare)
        about = {"dataset": home.record.id, "part": home.part, "epoch": home.record.epoch(home.part), "pages": gone,
                 "media": home.media_of.get(node)}  # fmt: skip
        try:
            self._links.call(node, "clear", about, port=LEAF)
        except HotpotError:
            self.exclude(home, {node})
            raise
        for page in gone:
            home.copies[page].discard(node)
        return gone

    def repair(self, home: Home, pages: Sequence[int], without: int = 0) -> None:
        """More copies of pages that have fewer than their degree, not counting one at `without`; nobody changes them
        meanwhile. Isolated."""
        by_node: dict[int, dict[int, Copy]] = defaultdict(dict)
        others = self._links.living() - {self._links.node.node_id}
        for page in pages:
            try:
                copy = home.read(page)
            except (Corrupt, PagesLost):
                home.short.discard(page)
                continue
            have = home.copies[page]
            for node in self._more(home, [page], copy.degree - 1 - len(have - {without}), others - have):
                by_node[node][page] = copy
        if not by_node:
            return
        for node in self.register(home, set(by_node), pages):
            del by_node[node]
        failed = self.send(home, "seed", by_node)
        for node, sent in by_node.items():
            if node not in failed:
                self._counts["copies_repaired"] += len(sent)
                self._has(home, node, sent)
        if failed:  # whether they have them is not known
            self.exclude(home, failed)
