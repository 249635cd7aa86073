"""Copies of committed pages on this node's media, for others' sake (the paper's DN), and news of pages cached here.

A page whose copy is here and which no program has mapped is what the paper calls redundant.

What a crash has left here is `doubtful` until the owner has said that it is the present version (`rejoin`): it may have
gone on without this node. Until then nobody reads it here, but it can become the home if the owner is lost: the
dispatcher knows then whether the owner had gone on.
"""

from __future__ import annotations

import base64
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from guest_agents.hotpot import blocks
from guest_agents.hotpot.blocks import PAGE, STRIDE, ZERO, Copy
from guest_agents.hotpot.changes import Change, decode
from guest_agents.hotpot.errors import BadArgument, Corrupt, NodeLost, NotOwner
from guest_agents.hotpot.log import Log, State
from guest_agents.hotpot.media import Folder, Media
from guest_agents.hotpot.messages import Handler, Message, pack, unpack
from guest_agents.hotpot.records import Record
from guest_agents.shelf import UNIT

log = logging.getLogger("rackless.hotpot")
_LISTED = 8000
"""Pages in one reply of `fence`."""
_GROUP = 64
"""Pages that go together when there is no room."""


@dataclass
class Store:
    """Copies of pages of one dataset."""

    record: Record
    """As far as this node knows: it obeys no home of an earlier epoch."""
    media: Media
    held: set[int] = field(default_factory=set)
    """Pages of which the present version is here."""
    doubtful: dict[int, int] = field(default_factory=dict)
    """Pages with the versions that a crash has left here."""
    used: dict[int, None] = field(default_factory=dict)
    """Groups of pages, those last that were used last."""

    def read(self, page: int) -> Copy:
        """A page. Corrupt."""
        return blocks.unseal(self.media.read(page * STRIDE, STRIDE))

    def before(self, page: int, change: Change) -> Copy | None:
        """The page to which a change can be made, or has been made; None: there is none."""
        if page not in self.held:
            return Copy(0, ZERO) if change.expected == 0 else None
        try:
            return self.read(page)
        except Corrupt:
            return None

    def write(self, pages: Sequence[tuple[int, Copy]]) -> None:
        """Persistently."""
        for page, copy in pages:
            self.media.write(page * STRIDE, blocks.seal(copy))
        self.media.persist_all((page * STRIDE, STRIDE) for page, _copy in pages)

    def clear(self, pages: Sequence[int]) -> None:
        """These are not the present versions: take them away, persistently."""
        for page in pages:
            self.media.write(page * STRIDE + PAGE, bytes(STRIDE - PAGE))
            self.media.write(page * STRIDE, ZERO)
        self.media.persist_all((page * STRIDE, STRIDE) for page in pages)
        self.held -= set(pages)
        for page in pages:
            self.doubtful.pop(page, None)
        for unit in {at // UNIT for page in pages for at in (page * STRIDE, (page + 1) * STRIDE - 1)}:
            if not any(page in self.held or page in self.doubtful
                       for page in range(unit * UNIT // STRIDE, -(-(unit + 1) * UNIT // STRIDE))):  # fmt: skip
                self.media.release(unit * UNIT, UNIT)

    def use(self, page: int) -> None:
        """It was asked for, or has changed."""
        self.used.pop(page // _GROUP, None)
        self.used[page // _GROUP] = None


class DataNode:
    """Copies of pages of all datasets. Thread-safe.

    media -- the number of this node's media: who counts on copies on others is told that they are lost
    updated -- told of each new version of a page, also of those that are not kept here
    changed -- told when there are copies of another dataset, or of none, or its record is another
    """

    def __init__(
        self, folder: Folder, log: Log, media: str, updated: Callable[[int, int, Copy], None],
        changed: Callable[[], None],
    ) -> None:  # fmt: skip
        self._media = media
        self._folder = folder
        self._log = log
        self._updated = updated
        self._changed = changed
        self._stores: dict[int, Store] = {}
        self._lock = threading.RLock()

    def handlers(self) -> dict[str, Handler]:
        """What others may ask, on LEAF."""
        return {"replica": self._replica, "seed": self._seed, "update": self._update, "replicas_drop": self._drop,
                "replicas": self._list, "fence": self._fence, "clear": self._clear, "give": self._give}  # fmt: skip

    # For this node

    def read(self, dataset: int, page: int) -> Copy | None:
        """The copy of a page, if it is kept here: the present version. Corrupt."""
        with self._lock:
            store = self._stores.get(dataset)
            if store is None or page not in store.held:
                return None
            store.use(page)
            return store.read(page)

    def held(self, dataset: int) -> set[int]:
        """Pages of which a copy is here."""
        with self._lock:
            store = self._stores.get(dataset)
            return set(store.held) if store else set()

    def count(self) -> int:
        """Of all copies that are here."""
        with self._lock:
            return sum(len(store.held) + len(store.doubtful) for store in self._stores.values())

    def oldest(self) -> list[tuple[Record, set[int]]]:
        """Pages that go together when there is no room, those that were longest not used first; by dataset."""
        with self._lock:
            return [(store.record, pages) for store in self._stores.values() for group in store.used
                    if (pages := store.held & set(range(group * _GROUP, (group + 1) * _GROUP)))]  # fmt: skip

    def records(self) -> list[Record]:
        """Datasets of which copies are here, or were."""
        with self._lock:
            return [store.record for store in self._stores.values()]

    def doubtful(self, dataset: int, part: int) -> dict[int, int]:
        """Pages of a part that a crash has left here, with their versions."""
        with self._lock:
            store = self._stores.get(dataset)
            pages = {} if store is None else store.doubtful
            return {page: version for page, version in pages.items()
                    if store is not None and store.record.part(page) == part}  # fmt: skip

    def distrust(self, dataset: int, part: int) -> bool:
        """The home may have gone on without this node; whether anything is here of it."""
        with self._lock:
            store = self._stores.get(dataset)
            pages = [] if store is None else [page for page in store.held if store.record.part(page) == part]
            if store is not None:
                for page in pages:
                    store.held.discard(page)
                    store.doubtful[page] = blocks.version_of(store.media.read(page * STRIDE + PAGE, STRIDE - PAGE))
        return bool(pages)

    def settle(self, dataset: int, asked: dict[int, int], stale: set[int]) -> None:
        """What the home has said of doubtful pages: those that are not stale are trusted again. What came meanwhile
        stays."""
        with self._lock:
            store = self._stores.get(dataset)
            if store is None:
                return
            pages = [page for page, version in asked.items() if store.doubtful.get(page) == version]
            store.clear([page for page in pages if page in stale])
            for page in pages:
                if page not in stale:
                    store.use(page)
                    store.doubtful.pop(page)
                    store.held.add(page)

    def let_go(self, dataset: int, part: int) -> None:
        """This node is the home of these pages now, and others know it: it needs no copies of them."""
        with self._lock:
            store = self._stores.get(dataset)
            if store is not None:
                store.clear([page for page in store.held | store.doubtful.keys() if store.record.part(page) == part])

    def keep(self, record: Record, pages: dict[int, Copy]) -> None:
        """This node was the home of these pages: keep them, and trust them as soon as their next home does. NoSpace."""
        with self._lock:
            new = record.id not in self._stores
            store = self.open(record)
            for page in pages:
                store.media.reserve(page * STRIDE, STRIDE)
            store.write(list(pages.items()))
            for page, copy in pages.items():
                store.held.discard(page)
                store.doubtful[page] = copy.version
        if new:
            self._changed()

    def learn(self, record: Record) -> None:
        """A newer record of a dataset."""
        with self._lock:
            store = self._stores.get(record.id)
            newer = store is not None and sum(record.moves) > sum(store.record.moves)
            if store is not None and newer:
                store.record = record
        if newer:
            self._changed()

    def drop(self, dataset: int) -> None:
        """There is no such dataset any more."""
        with self._lock:
            store = self._stores.pop(dataset, None)
            if store is not None:
                store.media.remove()
        if store is not None:
            self._changed()

    # Recovery

    def open(self, record: Record) -> Store:
        """The copies of a dataset, made if there are none."""
        with self._lock:
            store = self._stores.get(record.id)
            if store is None:
                # Sparse: it holds few pages of many.
                media = self._folder.open(f"copies-{record.id}", record.pages * STRIDE, reserve=False)
                store = self._stores[record.id] = Store(record, media)
            return store

    def reload(self) -> list[str]:
        """Take over what an earlier life has left, of all datasets that were opened; what could not be."""
        wrong = list(self._log.corrupt)
        for record in self._log.found:
            header, payload = unpack(record.body)
            store = self._stores.get(header["dataset"])
            if store is not None:
                self._redo(store, record.xid, header, payload)
            self._log.drop(record.place)
        for store in self._stores.values():
            torn = []
            for page in range(store.record.pages):
                try:
                    version = store.read(page).version
                except Corrupt:
                    torn.append(page)
                else:
                    if version:
                        store.doubtful[page] = version
            if torn:
                store.clear(torn)
                wrong.append(f"copies of {len(torn)} pages of {store.record.name} do not have their checksum")
        return wrong

    def _redo(self, store: Store, xid: int, header: Message, payload: memoryview) -> None:
        pages = []
        for change in decode(header["pages"], payload):
            try:
                old = store.read(change.page)
            except Corrupt:  # its writing was interrupted
                old = Copy(change.expected, store.media.read(change.page * STRIDE, PAGE))
            if old.version == change.expected:
                pages.append((change.page, change.onto(old, xid, header["degree"])))
        store.write(pages)

    # What others ask

    def _is_meant(self, header: Message) -> None:
        if header.get("media") not in (None, self._media):
            raise NodeLost("this node has come back without the copies that it had")

    def _obey(self, store: Store, header: Message) -> None:
        known = store.record.epoch(header["part"])
        if header["epoch"] < known:
            raise NotOwner(f"part {header['part']} of {store.record.name} has got another home")

    def _replica(self, _source: int, header: Message, payload: memoryview) -> Message:
        """A commit, to pages of which copies are here. If some are not, or are others, these are `stale`, and nothing
        is done. NodeLost: those that the home counts on are."""
        self._is_meant(header)
        changes = decode(header["pages"], payload)
        xid, fresh, stale = header["xid"], [], []
        with self._lock:
            store = self._stores.get(header["dataset"])
            if store is None:
                return {"stale": [change.page for change in changes]}
            self._obey(store, header)
            for change in changes:
                old = store.before(change.page, change)
                if old is not None and old.version == change.expected:
                    fresh.append((change.page, change.onto(old, xid, header["degree"])))
                elif old is None or (old.version, old.xid) != (change.expected + 1, xid):
                    stale.append(change.page)
            if stale:
                return {"stale": stale}
            if fresh:
                for page, _copy in fresh:
                    store.media.reserve(page * STRIDE, STRIDE)
                kept = {name: header[name] for name in ("dataset", "pages", "degree")}
                place = self._log.append(xid, State.NOW, pack(kept, bytes(payload)))
                store.write(fresh)
                self._log.drop(place)
                for page, _copy in fresh:
                    store.use(page)
                    store.held.add(page)
                    store.doubtful.pop(page, None)
        for page, copy in fresh:
            self._updated(header["dataset"], page, copy)
        return {}

    def _seed(self, _source: int, header: Message, payload: memoryview) -> Message:
        """Whole pages as they are at their home. NodeLost, as before."""
        self._is_meant(header)
        record, pages = Record.from_json(header["record"]), _copies(header, payload)
        with self._lock:
            new = record.id not in self._stores
            store = self.open(record)
            self._obey(store, header)
            newer = new or sum(record.moves) > sum(store.record.moves)
            if newer:
                store.record = record
            for page, _copy in pages:
                store.media.reserve(page * STRIDE, STRIDE)
            store.write(pages)
            for page, _copy in pages:
                store.use(page)
                store.held.add(page)
                store.doubtful.pop(page, None)
        if newer:
            self._changed()
        for page, copy in pages:
            self._updated(record.id, page, copy)
        return {}

    def _update(self, _source: int, header: Message, payload: memoryview) -> Message:
        for page, copy in _copies(header, payload):
            self._updated(header["dataset"], page, copy)
        return {}

    def _list(self, _source: int, header: Message, _payload: memoryview) -> Message:
        """Versions of the copies here of some pages; a page without one is left out."""
        copies = {page: self.read(header["dataset"], page) for page in header["pages"]}
        return {"versions": [[page, copy.version] for page, copy in copies.items() if copy]}

    def _fence(self, _source: int, header: Message, _payload: memoryview) -> Message:
        """Obey no home of an earlier epoch from now on; versions of the copies here of a part, doubtful ones too.
        NodeLost, as before."""
        self._is_meant(header)
        record, part, start = Record.from_json(header["record"]), header["part"], header["start"]
        with self._lock:
            store = self._stores.get(record.id)
            if store is None:
                return {"pages": []}
            self._obey(store, {"part": part, "epoch": record.epoch(part)})
            newer = record.epoch(part) > store.record.epoch(part)
            if newer:
                store.record = record
            listed = sorted(page for page in store.held | store.doubtful.keys()
                            if page >= start and store.record.part(page) == part)[:_LISTED]  # fmt: skip
            pages = [[page, version] for page in listed if (version := self._version(store, page))]
        if newer:
            self._changed()
        return {"pages": pages}

    def _version(self, store: Store, page: int) -> int:
        try:
            return store.read(page).version
        except Corrupt:
            return 0

    def _clear(self, _source: int, header: Message, _payload: memoryview) -> Message:
        """The home is going to send copies of a part, and knows of none here: what there is, is old. Or it does not
        want copies of some pages here any more. NotOwner."""
        self._is_meant(header)
        pages = set(header["pages"]) if "pages" in header else None
        with self._lock:
            store = self._stores.get(header["dataset"])
            if store is not None:
                self._obey(store, header)
                there = store.held | store.doubtful.keys()
                store.clear([page for page in (there if pages is None else there & pages)
                             if store.record.part(page) == header["part"]])  # fmt: skip
        return {}

    def _give(self, _source: int, header: Message, _payload: memoryview) -> Message:
        """Copies of pages, for a home that is made anew."""
        with self._lock:
            store = self._stores[header["dataset"]]
            copies = [(page, store.read(page)) for page in header["pages"]]
        return {"copies": [[page, c.version, base64.b64encode(c.data).decode(), c.xid, c.degree]
                           for page, c in copies]}  # fmt: skip

    def _drop(self, _source: int, header: Message, _payload: memoryview) -> Message:
        self.drop(header["dataset"])
        return {}


def _copies(header: Message, payload: memoryview) -> list[tuple[int, Copy]]:
    pages = header["pages"]
    if len(payload) != len(pages) * PAGE:
        raise BadArgument("the bytes do not fit the pages")
    return [(page, Copy(version, bytes(payload[i * PAGE : (i + 1) * PAGE]), xid, degree))
            for i, (page, version, xid, degree) in enumerate(pages)]  # fmt: skip
