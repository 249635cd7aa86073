"""The central dispatcher on the manager blade (the paper's CD): names of datasets, which node is the home of which
part, and which nodes have copies that can be trusted.

It is asked when a dataset is made, opened, closed or deleted, when nodes come or go, and never when data are read; when
they are committed only if copies go to other nodes than before.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from guest_agents.hotpot.blocks import PAGE
from guest_agents.hotpot.book import Book
from guest_agents.hotpot.errors import (
    BadArgument,
    DatasetBusy,
    DatasetExists,
    HotpotError,
    Isolated,
    NodeLost,
    NoSpace,
    NoSuchDataset,
    NotOwner,
    VersionMismatch,
)
from guest_agents.hotpot.lease import Timing
from guest_agents.hotpot.messages import LEAF, MAX_REPLY, Handler, Links, Message
from guest_agents.hotpot.records import ALIGN, MAX_NAME, MODES, REGION, REGION_BYTES, SETTINGS, Record

Hold = Callable[[int, Iterable[tuple[int, int, list[int]]]], None]


@dataclass
class Listed:
    """A dataset in the book."""

    record: Record
    synced: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    """By part: nodes that have all that was acknowledged of the pages of which they have copies."""
    solo: set[int] = field(default_factory=set)
    """Chunks with pages that may have no copy."""

    def to_json(self) -> Message:
        """For the book."""
        return {"record": self.record.to_json(), "solo": sorted(self.solo),
                "synced": {str(part): sorted(nodes) for part, nodes in self.synced.items()}}  # fmt: skip

    @classmethod
    def from_json(cls, fields: Message) -> Listed:
        """Back from `to_json`."""
        listed = cls(Record.from_json(fields["record"]), solo=set(fields["solo"]))
        listed.synced |= {int(part): set(nodes) for part, nodes in fields["synced"].items()}
        return listed

    def doubt(self, part: int) -> None:
        """Copies are gone: every page of the part may have been left without."""
        self.solo |= set(range(part, self.record.chunks, len(self.record.homes)))


class Dispatcher:
    """All datasets of the rack. Thread-safe.

    gather -- called before a dataset is made, with the nodes that are there: let the others register, too
    """

    def __init__(self, links: Links, book: Book, gather: Callable[[set[int]], None], timing: Timing) -> None:
        self._gather = gather
        self.links = links
        self.timing = timing
        self._book = book
        self.fresh = book.document is None
        """There was no book."""
        self.listed: dict[int, Listed] = {}
        self._media: dict[int, str] = {}
        self._next = 1
        self._number = 0
        self.heard: dict[int, float] = {}
        """When nodes have last called."""
        self._registered: set[int] = set()
        self.lost: set[tuple[int, int]] = set()
        """Dataset and part: their node has come back without them."""
        self.term = 0
        self.voters: set[int] = set()
        """Nodes of which a majority makes another the dispatcher (seat.py)."""
        self.superseded = False
        """Another node is the dispatcher."""
        self.refused = False
        """Nodes have promised to obey only a later one."""
        self._unsaved = False
        self._quorum: set[int] = set()
        """The voters of the last book that enough nodes have."""
        self.moving: set[tuple[int, int]] = set()
        """Parts that are getting another home just now."""
        self.life = secrets.token_hex(4)
        self._open: dict[int, set[int]] = defaultdict(set)
        self.lock = threading.RLock()
        self._take(book.document)

    def _take(self, document: Message | None) -> None:
        if document is not None:
            self.listed = {one.record.id: one for one in map(Listed.from_json, document["datasets"])}
            self._media = {int(node): media for node, media in document["nodes"].items()}
            self._next, self._number = document["next"], document["number"]
            self.lost = {(number, part) for number, part in document["lost"]}
            self.term, self.voters = document["term"], set(document["voters"])
            self._quorum = set(document["quorum"])
            self.heard = dict.fromkeys(self._media, time.monotonic())
            self._unsaved = True  # whether others have it is not known

    def restore(self, document: Message | None) -> None:
        """Begin, or go on, with the latest book that others have: it may be later than the one here, and another
        node's."""
        if document is not None and (document["term"], document["number"]) > (self.term, self._number):
            if document["seat"] != self.links.node.node_id:
                self.superseded = True
                return
            self._take(document)
            self.save()

    def in_office(self) -> None:
        """NodeLost: this node is not the dispatcher any more; Isolated: it may not be, as too few have its book."""
        if self.superseded:
            raise NodeLost("the dispatcher is on another node")
        with self.lock:
            if self._unsaved:
                self.save()

    def if_in_office(self, handler: Handler) -> Handler:
        """A handler that answers only while this node is the dispatcher."""

        def answer(source: int, header: Message, payload: memoryview) -> Message:
            self.in_office()
            return handler(source, header, payload)

        return answer

    def handlers(self) -> dict[str, Handler]:
        """What nodes may ask, on PORT."""
        mine = {"create": self._create, "delete": self._delete, "list": self._list, "open": self._open_asked,
                "close": self._close}  # fmt: skip
        return {op: self.if_in_office(handler) for op, handler in mine.items()}

    def leaf_handlers(self, hold: Hold) -> dict[str, Handler]:
        """What nodes may ask, on LEAF: somebody's `create` may be waiting for it. `hold` is told what a node that
        registers says of its MRSW transactions."""

        def register(source: int, header: Message, payload: memoryview) -> Message:
            reply = self._register(source, header, payload)
            hold(source, header.get("writing", ()))
            return reply

        mine = {"register": register, "beat": self._beat, "find": self._find_asked, "confirm": self._confirm,
                "synced": self._synced}  # fmt: skip
        return {op: self.if_in_office(handler) for op, handler in mine.items()}

    # Nodes

    def _register(self, source: int, header: Message, _payload: memoryview) -> Message:
        """A node can own parts from now on. VersionMismatch."""
        if header["settings"] != SETTINGS:
            raise VersionMismatch(f"node {source} has {header['settings']}, the manager {SETTINGS}")
        with self.lock:
            media = header.get("media", "")
            changed = self._media.get(source) != media
            if source in self._media and changed:
                self._lose(source)
            self._media[source] = media
            self._registered.add(source)
            changed = changed or source not in self.voters
            self.voters.add(source)
            self.heard[source] = time.monotonic()
            if header.get("begins"):  # what its last life had open it has not
                for nodes in self._open.values():
                    nodes.discard(source)
            for dataset in header.get("open", ()):
                self._open[dataset].add(source)
            if changed:
                self.save()
        return {"life": self.life}

    def _lose(self, node: int) -> None:
        """A node has come back without what it had."""
        for listed in self.listed.values():
            for part, home in enumerate(listed.record.homes):
                if home == node:
                    self.lost.add((listed.record.id, part))
                if node in listed.synced[part]:
                    listed.synced[part].discard(node)
                    listed.doubt(part)

    def _beat(self, source: int, header: Message, _payload: memoryview) -> Message:
        """A node is alive; what it should know of its homes and of its copies. Those on nodes that are dead and were
        silent for long do not count, so that others are made."""
        with self.lock:
            if header["term"] > self.term:
                self.refused = True
            if source not in self._registered or self._media[source] != header["media"]:
                return {"unknown": True, "term": self.term}
            self.heard[source] = time.monotonic()
            if source not in self.voters:
                self.voters.add(source)
                self.save()
            quiet = {node for node in self._media if self.silent(node, self.timing.promote)}
            gone = quiet - self.links.living() if quiet else quiet
            mine, trusted = [], []
            for number, listed in self.listed.items():
                for part, home in enumerate(listed.record.homes):
                    if home == source:
                        mine.append([number, part, listed.record.epoch(part), sorted(listed.synced[part] - gone)])
                    if source in listed.synced[part]:
                        trusted.append([number, part])
            return {"life": self.life, "term": self.term, "homes": mine, "trusted": trusted}

    def nodes(self) -> set[int]:
        """Those that have registered."""
        with self.lock:
            return set(self._registered)

    def able(self) -> set[int]:
        """Those of them that are there: they have called lately."""
        return {node for node in self.nodes() if not self.silent(node, self.timing.lease)}

    def silent(self, node: int, seconds: float) -> bool:
        """Whether a node has not called for so long."""
        return time.monotonic() - self.heard.get(node, 0.0) > seconds

    # Parts

    def _find_asked(self, _source: int, header: Message, _payload: memoryview) -> Message:
        with self.lock:
            return {"record": self._by_number(header["dataset"]).record.to_json()}

    def _confirm(self, source: int, header: Message, _payload: memoryview) -> Message:
        """Whether a node is the home of a part (not when there is no such dataset); and what is known of its copies.

        refused -- a data node obeys a later home: there was one that the book does not know, and this one is later now
        """
        number, part = header["dataset"], header["part"]
        with self.lock:
            listed = self.listed.get(number)
            key = (number, part)
            if listed is None or listed.record.homes[part] != source or key in self.lost:
                return {"mine": False}
            if key in self.moving:
                raise NotOwner(f"part {part} of {listed.record.name} is getting another home")
            if header.get("refused"):
                listed.record = listed.record.moved(part, source)
                self.save()
            return {"mine": True, "record": listed.record.to_json(), "synced": sorted(listed.synced[part]),
                    "solo": sorted(listed.solo), "media": self.media_of(listed.synced[part])}  # fmt: skip

    def _synced(self, source: int, header: Message, _payload: memoryview) -> Message:
        """A home tells which nodes get its copies, or do not any more. NotOwner."""
        number, part = header["dataset"], header["part"]
        with self.lock:
            listed = self._by_number(number)
            wrong = listed.record.homes[part] != source or listed.record.epoch(part) != header["epoch"]
            if wrong or (number, part) in self.moving | self.lost:
                raise NotOwner(f"node {source} is not the home of part {part} of {listed.record.name}")
            listed.synced[part] = (listed.synced[part] | set(header["add"])) - set(header["remove"])
            if "solo_is" in header and set(header["synced"]) <= listed.synced[part]:  # else it has not heard of a loss
                listed.solo -= set(range(part, listed.record.chunks, len(listed.record.homes)))
                listed.solo |= set(header["solo_is"])
            listed.solo |= set(header["solo"])
            self.save()
            return {"media": self.media_of(listed.synced[part])}

    def media_of(self, nodes: Iterable[int]) -> list[tuple[int, str]]:
        """The numbers of these nodes' media."""
        return [(node, self._media[node]) for node in nodes if node in self._media]

    # Datasets

    def _create(self, _source: int, header: Message, _payload: memoryview) -> Message:
        """Make a dataset and its homes. DatasetExists, NoSpace, BadArgument, NodeLost."""
        self._gather(self.able())
        with self.lock:
            record = self._plan(header)
            made: list[int] = []
            self.listed[record.id] = Listed(record)
            self._next += 1
            try:
                self.save()
                for part, owner in enumerate(record.homes):
                    named = {"record": record.to_json(), "part": part}
                    self.links.call(owner, "home_create", named, port=LEAF)
                    made.append(owner)
            except BaseException:
                del self.listed[record.id]
                self.save()
                self._drop(record, "home_drop", made)
                raise
            return {"record": record.to_json()}

    def _plan(self, header: Message) -> Record:
        name, size, mode, chunk = header["name"], header["size"], header["mode"], header["chunk"]
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable() or "/" in name:
            raise BadArgument(f"a name has 1 to {MAX_NAME} printable characters and no slash, not {name!r:.40}")
        if any(listed.record.name == name for listed in self.listed.values()):
            raise DatasetExists(f"there is already a dataset {name!r}")
        if mode not in MODES:
            raise BadArgument(f"mode {mode!r}; there are {' and '.join(MODES)}")
        if not isinstance(chunk, int) or chunk <= 0 or chunk % PAGE:
            raise BadArgument(f"a chunk of {chunk} bytes is not a multiple of {PAGE}")
        if not isinstance(size, int) or size <= 0:
            raise BadArgument(f"a dataset of {size} bytes")
        size = -(-size // PAGE) * PAGE
        chunks = -(-size // chunk)
        if chunks * 24 > MAX_REPLY:
            raise BadArgument(f"{chunks} chunks of {chunk} bytes", hint="make the chunks larger")
        living = self.links.living()
        able = self.able()
        nodes = [node for node in header.get("owners") or sorted(able) if node in living]
        if unknown := set(nodes) - able:
            raise BadArgument(f"no Hotpot on nodes {sorted(unknown)}")
        if not nodes:
            raise NoSpace("no node can own chunks")
        return Record(self._next, name, size, mode, chunk, self._place(size), tuple(nodes[:chunks]),
                      adapt=bool(header.get("adapt")))  # fmt: skip

    def _place(self, size: int) -> int:
        """Where programs map it: the first gap among the others."""
        address = REGION
        for other in sorted((listed.record for listed in self.listed.values()), key=lambda record: record.address):
            if address + size <= other.address:
                break
            address = -(-(other.address + other.size) // ALIGN) * ALIGN
        if address + size > REGION + REGION_BYTES:
            raise NoSpace(f"{size} bytes of addresses")
        return address

    def _delete(self, _source: int, header: Message, _payload: memoryview) -> Message:
        """NoSuchDataset, DatasetBusy. Nodes that cannot be reached now drop their part when they come back."""
        with self.lock:
            record = self._find(header["name"]).record
            if self._open[record.id] & self.links.living():
                raise DatasetBusy(f"{record.name!r} is open on nodes {sorted(self._open[record.id])}")
            del self.listed[record.id]
            self.save()
            self._drop(record, "home_drop", sorted(set(record.homes)))
            self._drop(record, "replicas_drop", sorted(self.nodes()))
        return {}

    def _drop(self, record: Record, op: str, nodes: list[int]) -> None:
        for node in nodes:
            with suppress(HotpotError):
                self.links.call(node, op, {"dataset": record.id}, port=LEAF)

    def datasets(self) -> list[dict[str, Any]]:
        """All of them: the fields of their records, owners once each, and the nodes that have them open."""
        with self.lock:
            records = [listed.record for listed in self.listed.values()]
            return [{**record.to_json(), "owners": sorted(set(record.owners)), "open": sorted(self._open[record.id])}
                    for record in records]  # fmt: skip

    def _list(self, _source: int, _header: Message, _payload: memoryview) -> Message:
        return {"datasets": self.datasets()}

    def _open_asked(self, source: int, header: Message, _payload: memoryview) -> Message:
        with self.lock:
            record = self._find(header["name"]).record
            self._open[record.id].add(source)
            return {"record": record.to_json()}

    def _close(self, source: int, header: Message, _payload: memoryview) -> Message:
        with self.lock:
            self._open[header["dataset"]].discard(source)
        return {}

    def _find(self, name: str) -> Listed:
        for listed in self.listed.values():
            if listed.record.name == name:
                return listed
        raise NoSuchDataset(f"there is no dataset {name!r}")

    def _by_number(self, number: int) -> Listed:
        try:
            return self.listed[number]
        except KeyError:
            raise NoSuchDataset(f"there is no dataset {number}") from None

    def save(self) -> None:
        """To media, and to those of all nodes that can be reached. NoSpace; Isolated: to so few that others could have
        made another node the dispatcher. Nothing is answered then before it is done."""
        self._number += 1
        self._unsaved = True
        document = {"number": self._number, "next": self._next, "lost": sorted(self.lost),
                    "term": self.term, "seat": self.links.node.node_id, "voters": sorted(self.voters),
                    "quorum": sorted(self._quorum),
                    "nodes": {str(node): media for node, media in self._media.items()},
                    "datasets": [listed.to_json() for listed in self.listed.values()]}  # fmt: skip
        self._book.save(document)
        near = sorted((self.voters | self._registered | self._media.keys()) & self.links.living())
        replies = self.links.call_all([(node, "mirror", {"document": document}, b"") for node in near], LEAF)
        have = set()
        for node, reply in zip(near, replies, strict=True):
            if isinstance(reply, HotpotError):
                continue
            if "refused" in reply:
                self.refused = True
                raise Isolated("other nodes may have another dispatcher")
            have.add(node)
        # Without this one and those there must not be a majority of voters. Of two there never is without this one.
        for voters in (self._quorum, self.voters):
            if 2 * len(voters - have - {self.links.node.node_id}) > len(voters):
                raise Isolated("the dispatcher reaches too few nodes")
        self._unsaved, self._quorum = False, set(self.voters)

    def strike_off(self) -> None:
        """Nodes that were silent for long do not vote any more, one at a time; when they are back they do. Isolated."""
        with self.lock:
            for node in sorted(self.voters - {self.links.node.node_id}):
                if self.silent(node, self.timing.promote):
                    self.voters.discard(node)
                    self.save()
                    return
