"""Hotpot's service on a blade: puts owner, data node, dispatcher, coordinator and the caches of programs together.

It is a program of LITE like any other, and has its programs on a Unix socket (programs.py).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guest_agents import lite
from guest_agents.hotpot import blocks
from guest_agents.hotpot.blocks import STRIDE, Copy
from guest_agents.hotpot.cache import Cache
from guest_agents.hotpot.coordinator import Coordinator, new_xid
from guest_agents.hotpot.datanode import DataNode
from guest_agents.hotpot.dispatcher import Dispatcher, datasets_in
from guest_agents.hotpot.errors import (
    Corrupt,
    FewerCopies,
    HotpotError,
    InDoubt,
    NodeLost,
    NoSuchDataset,
    OldMedia,
)
from guest_agents.hotpot.log import Log
from guest_agents.hotpot.master import Master
from guest_agents.hotpot.messages import LEAF, PORT, Links, Message
from guest_agents.hotpot.owner import Change, Owner, memory_name
from guest_agents.hotpot.records import SETTINGS, Area, Record, by_page, check_areas

LOG_BYTES = 4 << 20
_TORN_SECONDS = 10.0
_GATHERED = 64
"""Pages in one read."""
_REGISTER_SECONDS = 60.0
_REGISTER_EVERY = 0.1

log = logging.getLogger("rackless.hotpot")


@dataclass
class Opened:
    """A dataset that programs of this node have open."""

    cache: Cache
    programs: int = 0
    memories: dict[int, lite.Lmr] = field(default_factory=dict)
    """Of the owners it was fetched from."""
    told: set[int] = field(default_factory=set)
    """Chunks of which the owner knows that they may be cached here."""
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass
class Transaction:
    """What a program has acquired and not yet committed."""

    xid: int
    dataset: int
    areas: list[Area] = field(default_factory=list)


class Service:
    """The service of one node. Use as a context manager, or close().

    folder -- where its media are; OldMedia if an earlier life has left anything there
    manager -- node id of the blade that has the dispatcher
    gather -- on the manager: lets nodes that have not registered do so (dispatcher.py)
    """

    def __init__(
        self, node: lite.Node, folder: Path, manager: int, gather: Callable[[set[int]], None] = lambda _known: None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.node = node
        self.manager = manager
        self.links = Links(node)
        self._log = Log(folder / "log", LOG_BYTES)
        self._intents = Log(folder / "intents", LOG_BYTES)
        _refuse_old(folder, self._log, self._intents)
        self.owner = Owner(self.links, folder, self._log)
        self.copies = DataNode(folder, self._updated)
        self.coordinator = Coordinator(self.links, self._intents)
        self._opened: dict[int, Opened] = {}
        self._opening = threading.Lock()
        self.counts = {"commits": 0, "retries": 0, "aborts": 0}
        self._dispatcher: Dispatcher | None = None
        ours, leaf = self.owner.handlers(), {**self.owner.leaf_handlers(), **self.copies.handlers()}
        if node.node_id == manager:
            self._dispatcher = Dispatcher(self.links, folder, gather)
            ours |= self._dispatcher.handlers()
            leaf |= {**self._dispatcher.leaf_handlers(), **Master().handlers()}
        ours["stat"] = lambda _source, _header, _payload: self.stat()
        self.links.handlers = {PORT: ours, LEAF: leaf}

    def start(self) -> Service:
        """Serve other nodes, and let the dispatcher know. NodeLost when it does not answer for a minute."""
        self.links.start()
        deadline = time.monotonic() + _REGISTER_SECONDS
        while True:
            try:
                self.links.call(self.manager, "register", {"settings": SETTINGS}, port=LEAF)
            except NodeLost:  # its service may be about to start
                if time.monotonic() > deadline:
                    raise
                time.sleep(_REGISTER_EVERY)
            else:
                return self

    def close(self) -> None:
        """Stop serving."""
        self.links.close()

    def dispatcher(self, op: str, **fields: Any) -> Message:
        """Ask the dispatcher."""
        return self.links.call(self.manager, op, fields)

    # Datasets

    def open(self, name: str) -> Cache:
        """The cache of a dataset, for one program more. NoSuchDataset, NodeLost."""
        with self._opening:
            record = Record.from_json(self.dispatcher("open", name=name)["record"])
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
            for node in {opened.cache.record.owners[chunk] for chunk in opened.told}:
                with suppress(HotpotError):
                    self.links.call(node, "caching", {"dataset": dataset}, port=LEAF)
            for memory in opened.memories.values():
                with suppress(lite.LiteError):
                    memory.unmap()
            with suppress(NodeLost):
                self.dispatcher("close", dataset=dataset)
            opened.cache.close()

    def _find(self, dataset: int) -> Opened:
        with self._opening:
            found = self._opened.get(dataset)
        if found is None:
            raise NoSuchDataset(f"dataset {dataset} is not open on this node")
        return found

    # Pages

    def _fetch(self, record: Record, pages: list[int]) -> list[Copy]:
        """The present versions of pages: from the home if that is here, from a copy here, or from their owner by
        one-sided reads. Corrupt, NodeLost."""
        opened = self._find(record.id)
        for chunk in {page // record.chunk_pages for page in pages} - opened.told:
            # Before the first read, so that no version between is missed.
            fields = {"dataset": record.id, "chunk": chunk}
            self.links.call(record.owners[chunk], "caching", fields, port=LEAF)
            opened.told.add(chunk)
        found: dict[int, Copy] = {}
        distant: dict[int, list[int]] = defaultdict(list)
        for page in pages:
            copy = self._here(record, page)
            if copy is None:
                distant[record.owner(page)].append(page)
            else:
                found[page] = copy
        for owner, wanted in distant.items():
            try:
                memory = self._memory(opened, record, owner)
                for start in range(0, len(wanted), _GATHERED):
                    found |= _read(record, memory, wanted[start : start + _GATHERED])
            except lite.LiteError as failure:
                raise NodeLost(f"pages of {record.name} cannot be fetched from node {owner}: {failure}") from None
        return [found[page] for page in pages]

    def _here(self, record: Record, page: int) -> Copy | None:
        if record.owner(page) == self.node.node_id:
            return self.owner.home(record.id).read(page)
        try:
            return self.copies.read(record.id, page)
        except Corrupt:
            log.error("the copy of page %d of %s on this node is corrupt; its home is used", page, record.name)
            return None

    def _memory(self, opened: Opened, record: Record, owner: int) -> lite.Lmr:
        with opened.lock:
            if owner not in opened.memories:
                opened.memories[owner] = self.node.map(memory_name(record, owner), lite.Permission.READ)
            return opened.memories[owner]

    def _updated(self, dataset: int, page: int, copy: Copy) -> None:
        opened = self._opened.get(dataset)
        if opened is not None:
            opened.cache.updated(page, copy)

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
        self.links.call(self.manager, "acquire", {"xid": xid, "dataset": record.id, "pages": pages}, port=LEAF)

    def _let_go(self, record: Record, xid: int) -> None:
        if record.mode == "mrsw":
            with suppress(NodeLost):
                self.links.call(self.manager, "let_go", {"xid": xid}, port=LEAF)

    # Observation

    def stat(self) -> Message:
        """What this node has and does: by dataset the pages it owns, caches and keeps copies of; counts since start.
        On the manager also `all_datasets`."""
        homes = {home.record.id: home for home in self.owner.homes()}
        datasets = {}
        with self._opening:
            opened = dict(self._opened)
        for number in homes.keys() | opened.keys():
            cache = opened[number].cache if number in opened else None
            record = homes[number].record if cache is None else cache.record
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
        mine = {} if self._dispatcher is None else {"all_datasets": self._dispatcher.datasets()}
        return {"node": self.node.name, "node_id": self.node.node_id, "datasets": datasets, **mine,
                "counts": {**self.counts, **self.owner.counts},
                "log_used": self._log.used, "intents_used": self._intents.used}  # fmt: skip


def _read(record: Record, memory: lite.Lmr, pages: list[int]) -> dict[int, Copy]:
    """Pages of one owner, again as long as they are being changed. Corrupt after a while."""
    found: dict[int, Copy] = {}
    missing, deadline = pages, time.monotonic() + _TORN_SECONDS
    while missing:
        parts = memory.gather((record.slot(page) * STRIDE, STRIDE) for page in missing)
        for page, block in zip(missing, parts, strict=True):
            with suppress(Corrupt):
                found[page] = blocks.unseal(block)
        missing = [page for page in missing if page not in found]
        if missing and time.monotonic() > deadline:
            raise Corrupt(f"page {missing[0]} of {record.name} does not have its checksum in its owner's memory")
    return found


def _refuse_old(folder: Path, *logs: Log) -> None:
    found = [path.name for pattern in ("home-*", "copies-*") for path in sorted(folder.glob(pattern))]
    found += [f"{len(log.records())} open log records" for log in logs if log.records()]
    if datasets := datasets_in(folder):
        found.append(f"{len(datasets)} datasets")
    if found:
        for log in logs:
            log.close()
        raise OldMedia(f"{folder} has {', '.join(found[:4])}{' ...' if found[4:] else ''}")


def _enough(copies: int, replicas: int) -> None:
    if copies < replicas:
        raise FewerCopies(f"committed with {copies} of {replicas} copies")
