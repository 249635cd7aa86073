"""Hotpot's service on a blade: puts owner, data node, dispatcher, coordinator and the caches of programs together.

It is a program of LITE like any other, and has its programs on a Unix socket (programs.py).
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guest_agents import lite
from guest_agents.hotpot.adapter import Adapter
from guest_agents.hotpot.atlas import Atlas
from guest_agents.hotpot.blocks import PAGE, Copy
from guest_agents.hotpot.book import Book
from guest_agents.hotpot.cache import Cache
from guest_agents.hotpot.changes import Change
from guest_agents.hotpot.coordinator import Coordinator, new_xid
from guest_agents.hotpot.datanode import DataNode
from guest_agents.hotpot.dispatcher import Dispatcher
from guest_agents.hotpot.errors import (
    FewerCopies,
    HotpotError,
    InDoubt,
    NodeLost,
    NoSuchDataset,
    OldMedia,
    VersionMismatch,
)
from guest_agents.hotpot.eviction import Eviction, Limits
from guest_agents.hotpot.keeper import Keeper
from guest_agents.hotpot.lease import Lease, Timing
from guest_agents.hotpot.log import Log
from guest_agents.hotpot.master import Master
from guest_agents.hotpot.media import Folder
from guest_agents.hotpot.messages import LEAF, PORT, Links, Message, unpack
from guest_agents.hotpot.migration import Migration, hand_over
from guest_agents.hotpot.opened import Fetcher, Opened
from guest_agents.hotpot.owner import Owner
from guest_agents.hotpot.promotion import Promotion
from guest_agents.hotpot.records import Area, Record, by_page, check_areas
from guest_agents.hotpot.resolver import Resolver
from guest_agents.hotpot.seat import Seat

LOG_BYTES = 4 << 20
USUAL = Timing()
BOOK_BYTES = 1 << 20
BOOK = "node"
"""Name of the media that say what else there is."""
_REGISTER_SECONDS = 60.0
_REGISTER_EVERY = 0.1

log = logging.getLogger("rackless.hotpot")


@dataclass
class Transaction:
    """What a program has acquired and not yet committed."""

    xid: int
    dataset: int
    areas: list[Area] = field(default_factory=list)


class Service:
    """The service of one node. Use as a context manager, or close().

    folder -- where its media are; what an earlier life has left there is taken over. OldMedia, Corrupt: it cannot be
    manager -- node id of the blade that has the dispatcher, as long as no other has taken its place (seat.py)
    gather -- on the manager: lets nodes that have not registered do so (dispatcher.py)
    wake -- lets the manager's service start, if it has not (keeper.py)
    log_bytes -- size of each of its logs
    limits -- what it may take of the blade's memory, and copies of its media (eviction.py)
    """

    def __init__(
        self, node: lite.Node, folder: Path | Folder, manager: int,
        gather: Callable[[set[int]], None] = lambda _known: None,
        timing: Timing = USUAL, log_bytes: int = LOG_BYTES, wake: Callable[[], None] = lambda: None,
        limits: Limits | None = None,
    ) -> None:  # fmt: skip
        self.node = node
        self.links = Links(node)
        self.lease = Lease(self.links, manager, timing)
        media = folder if isinstance(folder, Folder) else Folder(folder)
        old = [name for name in media.names() if name.startswith(("home-", "copies-"))]
        self._book = Book(media.open(BOOK, BOOK_BYTES))
        if self._book.document is None and old:
            self._book.close()
            raise OldMedia(f"{media.path} has {', '.join(old[:4])}{' ...' if old[4:] else ''}, and no book of them")
        self._log, self._intents, copies_log = (Log(media.open(name, log_bytes)) for name in
                                                ("log", "intents", "log-copies"))  # fmt: skip
        self.atlas = Atlas(self.lease)
        self.owner = Owner(self.lease, media, self._log)
        self._media: str = (self._book.document or {}).get("media") or secrets.token_hex(8)
        self.copies = DataNode(media, copies_log, self._media, self._updated, self._save)
        self.coordinator = Coordinator(self.lease, self.atlas, self._intents, self._media, self._let_go)
        self._fetcher = Fetcher(self.lease, self.atlas, self.owner, self.copies)
        self._opened: dict[int, Opened] = {}
        self._opening = threading.Lock()
        self._saving = threading.Lock()
        self._writing: dict[int, tuple[int, list[int]]] = {}
        self.counts = {"commits": 0, "retries": 0, "aborts": 0}
        self.migration = migration = Migration(self.lease, self.owner, self.copies)
        self.eviction = Eviction(self.links, self.atlas, media, self.copies, self._all_opened, self.owner.counts,
                                 limits or Limits())  # fmt: skip
        self.adapter = Adapter(self.lease, self.atlas, migration, self.eviction, self._all_opened)
        resolver = Resolver(self.links, self.owner, self.atlas)
        self._dispatcher: Dispatcher | None = None
        self._datasets: Book | None = None
        self._gather, self._timing, self._folder = gather, timing, media
        self.seat = Seat(self.lease, media.open("mirror", BOOK_BYTES), self._take_seat, self._leave_seat)
        ours = {**self.owner.handlers(), **resolver.handlers(),
                **Promotion(self.links, self.owner, self.copies, self._save).handlers()}  # fmt: skip
        leaf = {**self.owner.leaf_handlers(), **migration.handlers(), **self.copies.handlers(),
                **self.coordinator.handlers(),
                **self.seat.handlers(),
                "home_create": self._home_create, "home_drop": self._home_drop, "attend": self._attend}  # fmt: skip
        ours["stat"] = lambda _source, _header, _payload: self.stat()
        self.links.handlers = {PORT: ours, LEAF: leaf}
        if node.node_id in (manager, self.lease.manager):  # in its last life it may have taken that one's place
            self._dispatcher = self._new_dispatcher()
        self.keeper = Keeper(self.lease, self.owner, self.copies, self.coordinator, resolver, self.seat,
                             self._dispatcher, self._media, self._revalidate, self._suspect, self._about,
                             wake)  # fmt: skip
        self._recover(media)

    def _new_dispatcher(self) -> Dispatcher:
        if self._datasets is None:
            self._datasets = Book(self._folder.open("datasets", BOOK_BYTES))
        made = Dispatcher(self.links, self._datasets, self._gather, self._timing)
        master = Master(self.links.living, 0.0 if made.fresh else self._timing.lease)
        ports = self.links.handlers
        self.links.handlers = {
            PORT: {**ports[PORT], **made.handlers(), "hand_over": made.if_in_office(hand_over(made))},
            LEAF: {**ports[LEAF], **made.leaf_handlers(master.hold), **master.handlers()},
        }
        return made

    def _take_seat(self, document: Message) -> None:
        """This node is the dispatcher from now on. Isolated: not yet, but it goes on trying."""
        if self._datasets is None:
            self._datasets = Book(self._folder.open("datasets", BOOK_BYTES))
        self._datasets.save(document)
        self._dispatcher = self.keeper.dispatcher = self._new_dispatcher()
        self._dispatcher.save()

    def _leave_seat(self) -> None:
        if self._dispatcher is not None:
            self._dispatcher.superseded = True

    def _recover(self, media: Folder) -> None:
        """Take over what an earlier life has left."""
        document = self._book.document or {"homes": [], "copies": []}
        said = [f"{media.path.name}: {text}" for text in (*self._log.corrupt, *self._intents.corrupt)]
        for fields, part, xids in document["homes"]:
            home = self.owner.open(self.atlas.learn(Record.from_json(fields)), part)
            home.xids = set(xids)
            home.load()
            if home.wrong:
                said.append(f"{len(home.wrong)} pages of {home.record.name} do not have their checksum")
        homes = {home.key: home for home in self.owner.homes()}
        for found in self._log.found:
            header, _payload = unpack(found.body)
            owned = homes.get((header["dataset"], header["part"]))
            if owned is None:
                self._log.drop(found.place)
            else:
                self.owner.reload(owned, *found)
        for found in self._intents.found:
            self.coordinator.reload(found)
        for fields in document["copies"]:
            self.copies.open(Record.from_json(fields))
        said += self.copies.reload()
        known = {home.media.path.name for home in homes.values()}
        known |= {f"copies-{record.id}" for record in self.copies.records()}
        for name in media.names():
            if name.startswith(("home-", "copies-")) and name not in known:
                media.remove(name)  # they were being made, or dropped, when it crashed
        self.keeper.note(said)
        self._save()

    def _save(self) -> None:
        """What this node is the home of, and has copies of, to media."""
        with self._saving:
            self._book.save({
                "media": self._media,
                "homes": [[home.record.to_json(), home.part, sorted(home.xids)] for home in self.owner.homes()],
                "copies": [record.to_json() for record in self.copies.records()],
            })  # fmt: skip

    def _about(self) -> Message:
        """For a dispatcher that does not know this node."""
        homes = [[home.record.to_json(), home.part, sorted(home.synced) if home.ready else None, sorted(home.solo)]
                 for home in self.owner.homes()]  # fmt: skip
        with self._opening:
            return {"homes": homes, "open": list(self._opened),
                    "writing": [[xid, *held] for xid, held in self._writing.items()]}  # fmt: skip

    def start(self, *, keep: bool = True) -> Service:
        """Serve other nodes, and let the dispatcher know. VersionMismatch; NodeLost, Isolated and others when it does
        not answer for a minute.

        keep -- look after everything from then on, in a thread
        """
        if self._dispatcher is not None:
            self.seat.look()
            self._dispatcher.restore(self.seat.document)
        self.links.start()
        deadline = time.monotonic() + _REGISTER_SECONDS
        while keep:
            try:
                self.keeper.register()
                self.keeper.turn()
            except VersionMismatch:
                raise
            except HotpotError:  # its service may be about to start, or be another
                self.seat.look()
                if self.seat.due():
                    self.seat.stand()
                if time.monotonic() > deadline:
                    raise
                time.sleep(_REGISTER_EVERY)
            else:
                self.keeper.beat.start()
                self.adapter.beat.start()
                break
        return self

    def close(self) -> None:
        """Stop serving."""
        self.adapter.beat.close()
        self.keeper.beat.close()
        self.links.close()

    def dispatcher(self, op: str, **fields: Any) -> Message:
        """Ask the dispatcher."""
        return self.links.call(self.lease.manager, op, fields)

    # Datasets

    def open(self, name: str) -> Cache:
        """The cache of a dataset, for one program more. NoSuchDataset, NodeLost."""
        with self._opening:
            record = self.atlas.learn(Record.from_json(self.dispatcher("open", name=name)["record"]))
            opened = self._opened.get(record.id)
            if opened is None:
                opened = self._opened[record.id] = Opened(Cache(record, self._fetch))
            opened.programs += 1
            return opened.cache

    def close_dataset(self, dataset: int) -> None:
        """A program less has it open. With the last, what was not committed is gone."""
        with self._opening:
            opened = self._opened[dataset]
            opened.programs -= 1
            if opened.programs:
                return
            del self._opened[dataset]
            record = self.atlas.latest(opened.cache.record)
            for part in {chunk % len(record.homes) for chunk in opened.told}:
                with suppress(HotpotError):
                    self.links.call(record.homes[part], "caching", {"dataset": dataset, "part": part}, port=LEAF)
                opened.forget(part)
            with suppress(NodeLost):
                self.dispatcher("close", dataset=dataset)
            opened.cache.close()

    def _all_opened(self) -> list[Opened]:
        with self._opening:
            return list(self._opened.values())

    def migrate(self, dataset: int, at: int, node: int) -> None:
        """Begin to move the part that has a byte of a dataset to a node. NotMapped, BadArgument, Retry, NodeLost."""
        record = self.atlas.refresh(self._find(dataset).cache.record.id)
        [(start, _)] = check_areas(record, [(at, 1)])
        part = record.part(start // PAGE)
        about = {"dataset": dataset, "part": part, "node": node}
        self.links.call(record.homes[part], "leave", about, port=LEAF)

    def _find(self, dataset: int) -> Opened:
        with self._opening:
            found = self._opened.get(dataset)
        if found is None:
            raise NoSuchDataset(f"dataset {dataset} is not open on this node")
        return found

    def _home_create(self, _source: int, header: Message, _payload: memoryview) -> Message:
        """This node becomes the home of a part of a new dataset. NoSpace."""
        home = self.owner.open(Record.from_json(header["record"]), header["part"], new=True)
        home.ready = True
        try:
            self._save()
        except HotpotError:
            self.owner.drop(home)
            raise
        return {}

    def _home_drop(self, _source: int, header: Message, _payload: memoryview) -> Message:
        """The dataset was deleted."""
        for home in self.owner.homes():
            if home.record.id == header["dataset"]:
                self.owner.drop(home)
        self.atlas.forget(header["dataset"])
        self._save()
        return {}

    # Pages

    def _fetch(self, record: Record, pages: list[int]) -> list[Copy]:
        return self._fetcher.fetch(self._find(record.id), pages)

    def _updated(self, dataset: int, page: int, copy: Copy) -> None:
        opened = self._opened.get(dataset)
        if opened is not None:
            opened.cache.updated(page, copy)

    def _attend(self, _source: int, header: Message, _payload: memoryview) -> Message:
        """A home is in use from now on: the chunks of its part that may be cached here."""
        record, part = self.atlas.learn(Record.from_json(header["record"])), header["part"]
        self.copies.learn(record)
        for home in self.owner.homes():
            if home.key == (record.id, part) and home.record.epoch(part) < record.epoch(part):
                self.owner.drop(home)
                self._save()
        opened = self._opened.get(record.id)
        if opened is None:
            return {"chunks": []}
        opened.cache.record = record
        opened.forget(part)
        if not header["sound"]:
            opened.suspect.add(part)
        opened.told |= {page // record.chunk_pages for page in opened.cache.pages() if record.part(page) == part}
        return {"chunks": [chunk for chunk in list(opened.told) if chunk % len(record.homes) == part]}

    def _suspect(self, dataset: int, part: int) -> None:
        opened = self._opened.get(dataset)
        if opened is not None:
            opened.suspect.add(part)

    def suspects(self) -> list[str]:
        """Datasets of which cached pages may be old."""
        with self._opening:
            return [opened.cache.record.name for opened in self._opened.values() if opened.suspect]

    def _revalidate(self, *, cut_off: bool) -> None:
        """What is cached here may be old, if this node was cut off, or a home was away."""
        for opened in self._all_opened():
            if cut_off:
                opened.suspect |= set(range(len(opened.cache.record.homes)))
            if opened.suspect:
                try:
                    self._fetcher.revalidate(opened)
                except HotpotError:
                    with suppress(HotpotError):
                        self.atlas.refresh(opened.cache.record.id)

    # Transactions

    def acquire(self, transaction: Transaction, areas: Sequence[Sequence[int]]) -> None:
        """Add ranges to a transaction: they are here, up to date, and in nobody else's transaction on this node (with
        MRSW: in the rack). Retry, NotClean, NotMapped, Overlap, BadArgument; what it had before it still has."""
        cache = self._find(transaction.dataset).cache
        merged = check_areas(cache.record, [*transaction.areas, *areas])
        pages = sorted(by_page(check_areas(cache.record, areas)))
        if cache.record.mode == "mrsw":
            self._lock(transaction.xid, cache.record, pages)
        cache.acquire(pages, transaction.xid)
        transaction.areas = merged

    def commit(self, transaction: Transaction, replicas: int) -> None:
        """Commit what a transaction has acquired, and end it. Retry: nothing of it took place, and its stores are
        taken back. TooFewNodes, TooLarge, NodeLost: the same. InDoubt, FewerCopies: see there."""
        cache = self._find(transaction.dataset).cache
        pages = by_page(transaction.areas)
        try:
            copies = self._commit(cache, transaction.xid, transaction.areas, replicas, in_transaction=True)
        except BaseException:
            cache.give_up(pages)
            raise
        else:
            cache.release(pages)
        finally:
            self._let_go(cache.record, transaction.xid)
        _enough(copies, replicas)

    def abort(self, transaction: Transaction) -> None:
        """Take back the stores of a transaction, and end it."""
        self.counts["aborts"] += 1
        cache = self._find(transaction.dataset).cache
        cache.give_up(by_page(transaction.areas))
        self._let_go(cache.record, transaction.xid)

    def commit_areas(self, dataset: int, areas: Sequence[Sequence[int]], replicas: int) -> None:
        """Commit stores to ranges that were made without a transaction: all or nothing, whatever others committed in
        between. Retry (MRSW: somebody is writing; a page is in a commit): the stores are still there."""
        cache = self._find(dataset).cache
        checked = check_areas(cache.record, areas)
        xid = new_xid()
        try:
            if cache.record.mode == "mrsw":
                self._lock(xid, cache.record, sorted(by_page(checked)))
            copies = self._commit(cache, xid, checked, replicas, in_transaction=False)
        finally:
            self._let_go(cache.record, xid)
        _enough(copies, replicas)

    def discard(self, dataset: int, areas: Sequence[Sequence[int]]) -> None:
        """Take back stores that were made without a transaction, by whole pages. NotClean: a transaction has one."""
        cache = self._find(dataset).cache
        cache.give_up(cache.free(by_page(check_areas(cache.record, areas))))

    def _commit(self, cache: Cache, xid: int, areas: list[Area], replicas: int, *, in_transaction: bool) -> int:
        """How many copies there are of what was committed."""
        pages = by_page(areas)
        self.lease.check()
        try:
            with cache.frozen(pages, xid if in_transaction else 0) as frozen:
                changes = [
                    Change(page, now.seen if in_transaction else -1,
                           [(p, now.data[p.offset : p.offset + p.length]) for p in pages[page]] if now.dirty else [])
                    for page, now in sorted(frozen.items()) if now.dirty or in_transaction
                ]  # fmt: skip
                if not changes:
                    return replicas
                try:
                    outcome = self.coordinator.commit(cache.record, xid, changes, replicas)
                except InDoubt:
                    cache.doubtful(change.page for change in changes)
                    raise
                cache.committed(pages, outcome.versions)
        except HotpotError:
            self.counts["retries"] += 1
            raise
        self.counts["commits"] += 1
        return outcome.copies

    def _lock(self, xid: int, record: Record, pages: list[int]) -> None:
        self.links.call(self.lease.manager, "acquire", {"xid": xid, "dataset": record.id, "pages": pages}, port=LEAF)
        with self._opening:
            held = self._writing.get(xid, (record.id, []))[1]
            self._writing[xid] = record.id, [*held, *pages]

    def _let_go(self, record: Record, xid: int) -> None:
        if record.mode == "mrsw" and not self.coordinator.goes_on(xid):
            with self._opening:
                self._writing.pop(xid, None)
            with suppress(NodeLost):
                self.links.call(self.lease.manager, "let_go", {"xid": xid}, port=LEAF)

    # Observation

    def stat(self) -> Message:
        """What this node has and does: by dataset the pages it owns, caches and keeps copies of; counts since start.
        On the manager also `all_datasets`."""
        homes: dict[int, Record] = {home.record.id: home.record for home in self.owner.homes()}
        datasets = {}
        with self._opening:
            opened = dict(self._opened)
        for number in homes.keys() | opened.keys():
            cache = opened[number].cache if number in opened else None
            record = homes[number] if cache is None else cache.record
            states = {"dirty": set(), "committed": set()} if cache is None else cache.states()
            cached = states["dirty"] | states["committed"]
            datasets[record.name] = {
                "owned_chunks": record.owners.count(self.node.node_id),
                "dirty": len(states["dirty"]),
                "committed": len(states["committed"]),
                "redundant": len(self.copies.held(number) - cached),
                "copies": len(self.copies.held(number)),
                "counts": {} if cache is None else cache.counts,
            }
        in_office = self._dispatcher is not None and not self._dispatcher.superseded
        mine = {"all_datasets": self._dispatcher.datasets()} if self._dispatcher is not None and in_office else {}
        return {"node": self.node.name, "node_id": self.node.node_id, "datasets": datasets, **mine,
                "dispatcher": self.lease.manager, "term": self.lease.term,
                "counts": {**self.counts, **self.owner.counts}, "recovered": self.keeper.said,
                "unfinished": self.coordinator.unfinished,
                "log_used": self._log.used, "intents_used": self._intents.used}  # fmt: skip


def _enough(copies: int, replicas: int) -> None:
    if copies < replicas:
        raise FewerCopies(f"committed with {copies} of {replicas} copies")
