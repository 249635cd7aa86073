"""Another home for parts whose node is gone: the dispatcher chooses a node that has copies, which makes a home of them.

Every commit that was acknowledged is on all nodes of which the dispatcher knows that they have copies of the part
(`synced`), as far as they have copies of its pages. The first thing that is asked of them is to obey the old home no
more, so it can acknowledge nothing from then on, even if it lives on in another part of the network.
"""

from __future__ import annotations

import base64
import logging
from collections import defaultdict
from collections.abc import Callable, Set

from guest_agents.hotpot import blocks
from guest_agents.hotpot.blocks import PAGE, Copy
from guest_agents.hotpot.datanode import DataNode
from guest_agents.hotpot.dispatcher import Dispatcher, Listed
from guest_agents.hotpot.errors import HotpotError, NodeLost, NotOwner, Retry
from guest_agents.hotpot.home import Claim, Home, Origin
from guest_agents.hotpot.messages import LEAF, PORT, Handler, Links, Message, has_no_service
from guest_agents.hotpot.owner import Owner
from guest_agents.hotpot.records import Record

log = logging.getLogger("rackless.hotpot")
_GIVEN = 32
"""Pages in one reply, which is text."""


def watch(dispatcher: Dispatcher) -> None:
    """Find parts whose nodes are gone, and give them other homes where that is possible. On the manager."""
    with dispatcher.lock:
        wanted = [(listed, part) for listed in dispatcher.listed.values() for part in range(len(listed.record.homes))
                  if _is_gone(dispatcher, listed, part)]  # fmt: skip
    for listed, part in wanted:
        candidates = _candidates(dispatcher, listed, part)
        if candidates:
            try:
                move(dispatcher, listed, part, candidates[0])
            except HotpotError as failure:
                log.warning("part %d of %s gets no other home yet: %s", part, listed.record.name, failure)


def _is_gone(dispatcher: Dispatcher, listed: Listed, part: int) -> bool:
    key = (listed.record.id, part)
    return key in dispatcher.lost or dispatcher.silent(listed.record.homes[part], dispatcher.timing.promote)


def _candidates(dispatcher: Dispatcher, listed: Listed, part: int) -> list[int]:
    """Nodes that can be the home of a part, the best first; none if it is better to wait for nodes to come back."""
    record, synced = listed.record, listed.synced[part]
    able = dispatcher.able()
    if not synced <= able:
        return []  # what those have that are away may be all there is of some pages
    if (record.id, part) not in dispatcher.lost:
        chunks = set(range(part, record.chunks, len(record.homes)))
        if chunks & listed.solo:
            return []  # only its node has some of its pages; without copies and without these nothing was committed
    return sorted(synced or able, key=lambda node: (record.homes.count(node), node))


def move(
    dispatcher: Dispatcher, listed: Listed, part: int, node: int, keeps: Set[int] = frozenset(),
    planned: Message | None = None,
) -> None:  # fmt: skip
    """Make a node the home of a part. HotpotError: it may have begun to be, and is not.

    keeps -- nodes that have copies, of which the dispatcher does not know
    planned -- what a home that lives says of its pages, which goes there (migration.py)
    """
    number = listed.record.id
    key = (number, part)
    with dispatcher.lock:
        wanted = planned is not None or _is_gone(dispatcher, listed, part)
        if key in dispatcher.moving or number not in dispatcher.listed or not wanted:
            raise Retry("it has just been moved, or is being moved")
        dispatcher.moving.add(key)
        new, synced = listed.record.moved(part, node), sorted(listed.synced[part] | keeps)
        media = dispatcher.media_of(synced)
    try:
        about = {"record": new.to_json(), "part": part, "synced": synced, "media": media, "solo": sorted(listed.solo),
                 "claims": _claims(dispatcher, number, part), "term": dispatcher.term, **(planned or {})}  # fmt: skip
        reply = dispatcher.links.call(new.homes[part], "promote", about, port=PORT)
    except HotpotError:
        with dispatcher.lock:
            dispatcher.moving.discard(key)
        raise
    with dispatcher.lock:
        listed.record = listed.record.moved(part, new.homes[part])
        listed.synced[part] = (listed.synced[part] | keeps) - {node}  # others may have been lost meanwhile
        listed.solo |= set(reply["solo"])
        dispatcher.lost.discard(key)
        dispatcher.moving.discard(key)
        dispatcher.save()
    log.warning("node %d is the home of part %d of %s now; %d pages are lost", new.homes[part], part, new.name,
                reply["lost"])  # fmt: skip


def _claims(dispatcher: Dispatcher, number: int, part: int) -> list[Message]:
    """Commits that may still change pages of a part, as those who commit and their other owners say; also those who
    have not called lately, if they answer. NodeLost."""
    about, able = {"dataset": number, "part": part}, dispatcher.able()
    asked = able | dispatcher.nodes() & dispatcher.links.living()
    calls = [(node, op, about, b"") for node in sorted(asked) for op in ("claims", "owner_claims")]
    claims: dict[int, Message] = {}
    for call, reply in zip(calls, dispatcher.links.call_all(calls, LEAF), strict=True):
        if not isinstance(reply, HotpotError):
            claims |= {claim["xid"]: claim for claim in reply["claims"]}
        elif call[0] in able:
            raise reply
    return list(claims.values())


class Promotion:
    """The part of a node that becomes a home.

    changed -- told when this node has another home
    """

    def __init__(self, links: Links, owner: Owner, copies: DataNode, changed: Callable[[], None]) -> None:
        self._links = links
        self._owner = owner
        self._copies = copies
        self._changed = changed

    def handlers(self) -> dict[str, Handler]:
        """What the dispatcher may ask, on PORT."""
        return {"promote": self._promote}

    def _promote(self, _source: int, header: Message, _payload: memoryview) -> Message:
        """Make a home of the copies there are. NodeLost: one cannot be read now; NoSpace; NotOwner: there is a later
        dispatcher, or this node is the home already, and may have pages of which there are no copies."""
        record, part = Record.from_json(header["record"]), header["part"]
        if header["term"] < self._owner.lease.term:
            raise NotOwner(f"the dispatcher of term {header['term']} is not obeyed any more")
        media = dict(header["media"])
        nodes = sorted(header["synced"], key=lambda node: node != self._links.node.node_id)
        have = [(node, versions_at(self._links, node, record, part, media.get(node))) for node in nodes]
        best: dict[int, tuple[int, int]] = {}
        for node, versions in have:
            for page, version in versions.items():
                if version > best.get(page, (0, 0))[0]:
                    best[page] = version, node
        fresh = given(self._links, record, {page: node for page, (_version, node) in best.items()})
        solo = set(header["solo"])
        lost = [page for page in record.pages_of(part) if page not in fresh and page // record.chunk_pages in solo]
        if "pages" in header:
            lost = header["lost"]
            if len(fresh) != header["pages"]:
                raise NodeLost(f"there are copies of {len(fresh)} pages, not of {header['pages']}")
        for old in [home for home in self._owner.homes() if home.key == (record.id, part)]:
            if old.ready and old.record.epoch(part) >= record.epoch(part):  # this took long, and was asked again
                raise NotOwner(f"node {self._links.node.node_id} is the home of part {part} of {record.name} already")
            self._owner.drop(old)
        home = self._owner.open(record, part, new=True)
        home.write({**fresh, **{page: Copy(blocks.LOST, bytes(PAGE)) for page in lost}})
        home.sound = "pages" in header
        home.missed = set(header.get("missed", ()))
        for xid in header.get("refused", ()):
            self._owner.refuse(xid, home)
        home.xids = set(header["xids"]) if home.sound else {copy.xid for copy in fresh.values()}
        for claim in header["claims"]:
            if claim["xid"] not in home.xids:
                home.claims[claim["xid"]] = Claim(Origin(*claim["origin"]), claim["parts"])
                home.locks |= dict.fromkeys(claim["pages"], claim["xid"])
        self._changed()
        elsewhere = {page for node, versions in have if node != self._links.node.node_id
                     for page, version in versions.items() if version == best[page][0]}  # fmt: skip
        return {"solo": sorted({page // record.chunk_pages for page in fresh.keys() - elsewhere}), "lost": len(lost)}


def versions_at(links: Links, node: int, record: Record, part: int, media: str | None) -> dict[int, int]:
    """Versions of the copies of a part on the media of a node, which obeys this record from then on. NodeLost,
    NotOwner."""
    versions: dict[int, int] = {}
    start = 0
    while True:
        about = {"record": record.to_json(), "part": part, "start": start, "media": media}
        pages = links.call(node, "fence", about, port=LEAF)["pages"]
        if not pages:
            return versions
        versions |= dict(pages)
        start = pages[-1][0] + 1


def given(links: Links, record: Record, where: dict[int, int]) -> dict[int, Copy]:
    """Copies of pages from the nodes that have them. NodeLost."""
    by_node: dict[int, list[int]] = defaultdict(list)
    for page, node in where.items():
        by_node[node].append(page)
    found: dict[int, Copy] = {}
    for node, pages in by_node.items():
        for begin in range(0, len(pages), _GIVEN):
            about = {"dataset": record.id, "pages": pages[begin : begin + _GIVEN]}
            for page, version, text, xid, degree in links.call(node, "give", about, port=LEAF)["copies"]:
                found[page] = Copy(version, base64.b64decode(text), xid, degree)
    if missing := where.keys() - found.keys():
        raise NodeLost(f"copies of {len(missing)} pages of {record.name} have gone")
    return found


def reunite(links: Links, owner: Owner, home: Home) -> list[str]:
    """Before a home is used: let its dispatcher confirm it, and find its copies and who caches its pages. What could
    not be mended. HotpotError: not now; when this node is not its home any more, it is dropped."""
    number, part = home.key
    about = {"dataset": number, "part": part, "refused": home.refused}
    reply = owner.lease.ask("confirm", about)
    if not reply["mine"]:
        owner.drop(home)
        return [f"part {part} of {home.record.name} has another home now; what was here was dropped"]
    home.record = record = Record.from_json(reply["record"])
    home.refused = False
    home.synced, home.solo = set(reply["synced"]), set(reply["solo"]) & set(home.chunks)
    home.media_of = dict(reply["media"])
    home.copies.clear()
    have: dict[int, dict[int, int]] = {}
    away = set()
    for node in home.synced:
        try:
            have[node] = versions_at(links, node, record, part, home.media_of.get(node))
        except NodeLost:
            away.add(node)
        except NotOwner:  # it obeys a home that the dispatcher does not know, and did not come to be
            home.refused = True
            raise
    wrong = _mend(links, owner, home, have)
    redone = _redone(owner, home)
    for node, versions in have.items():
        if any(version != home.version(page) and page not in redone for page, version in versions.items()):
            away.add(node)  # it has to ask which of its copies are good
    for node in have.keys() - away:
        for page in have[node]:
            home.copies[page].add(node)
    home.short = {page for page in record.pages_of(part) if home.version(page)}
    bare = {page // record.chunk_pages for page in home.short if not home.copies[page]}
    if away or bare != home.solo:
        owner.replicas.exclude(home, away, bare)
    attended(links, home, {member.node_id for member in links.node.nodes()})
    home.ready, home.sound = True, False
    return wrong


def attended(links: Links, home: Home, nodes: set[int]) -> None:
    """Ask nodes what they may have cached of a home, and let them look at it again; those that do not answer are asked
    again as soon as they live (keeper.py)."""
    about = {"record": home.record.to_json(), "part": home.part}
    calls = [(node, "attend", {**about, "sound": home.sound and node not in home.missed}, b"")
             for node in sorted(nodes & links.living())]  # fmt: skip
    home.missed |= nodes
    for call, answer in zip(calls, links.call_all(calls, LEAF), strict=True):
        if has_no_service(answer):
            home.missed.discard(call[0])
        elif not isinstance(answer, HotpotError):
            home.missed.discard(call[0])
            for chunk in answer["chunks"]:
                home.caching[chunk].add(call[0])


def _redone(owner: Owner, home: Home) -> set[int]:
    """Pages that the log is still going to change; copies may be a version ahead."""
    return {page for entry in owner.entries() if entry.home is home for page in entry.pages}


def _mend(links: Links, owner: Owner, home: Home, have: dict[int, dict[int, int]]) -> list[str]:
    """Pages that are corrupt on media are taken from a copy, if there is one, except those that a log will mend."""
    redone = _redone(owner, home)
    where = {}
    for page in home.wrong:
        holders = {node: versions[page] for node, versions in have.items() if page in versions}
        if page not in redone and holders:
            where[page] = max(holders, key=lambda node: holders[node])
    home.write(given(links, home.record, where))
    left = [page for page in home.wrong if page not in where and page not in redone]
    home.wrong = []
    told = [f"{len(where)} corrupt pages of {home.record.name} were mended from copies"] if where else []
    if left:
        shown = ", ".join(map(str, left[:8]))
        told.append(f"{len(left)} pages of {home.record.name} are corrupt and have no copy: {shown}")
    return told
