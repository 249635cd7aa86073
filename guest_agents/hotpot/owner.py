"""The owner of chunks (the paper's ON): keeps the home of each page, orders its commits, and has copies made.

A home page lies twice: in registered memory (an LMR of LITE), which others read by RDMA, and on media. A commit writes
a redo record first, then the copies at data nodes, then the home, then tells nodes that have the page cached.
Source: section 4 of the Hotpot paper (MRMW's three phases, MRSW's two).
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from guest_agents import lite
from guest_agents.hotpot import blocks
from guest_agents.hotpot.blocks import PAGE, STRIDE, Copy
from guest_agents.hotpot.errors import (
    BadArgument,
    Corrupt,
    HotpotError,
    InDoubt,
    NoSpace,
    NoSuchDataset,
    NoSuchTransaction,
    Retry,
    TooFewNodes,
)
from guest_agents.hotpot.log import Log, State
from guest_agents.hotpot.media import Media
from guest_agents.hotpot.messages import LEAF, Handler, Links, Message, pack
from guest_agents.hotpot.records import Piece, Record, patched

log = logging.getLogger("rackless.hotpot")
_BATCH = 128
"""Pages in one message or one scattered write."""


@dataclass(frozen=True)
class Change:
    """What a transaction wants of one page."""

    page: int
    expected: int
    """Version that must be the present one; -1: any."""
    pieces: Sequence[tuple[Piece, bytes | memoryview]]
    """Empty: the page was only read."""


def encode(changes: Iterable[Change]) -> tuple[list[Any], bytes]:
    """For a message: what goes in its header, and its bytes."""
    listed = list(changes)
    header = [[c.page, c.expected, [list(piece) for piece, _ in c.pieces]] for c in listed]
    return header, b"".join(data for c in listed for _, data in c.pieces)


def decode(header: list[Any], payload: memoryview) -> list[Change]:
    """Back from `encode`. BadArgument."""
    changes, at = [], 0
    for page, expected, pieces in header:
        taken = []
        for offset, length in pieces:
            if not 0 <= offset <= offset + length <= PAGE:
                raise BadArgument(f"{length} bytes at {offset} of a page")
            taken.append((Piece(offset, length), payload[at : at + length]))
            at += length
        changes.append(Change(page, expected, taken))
    if at != len(payload):
        raise BadArgument("the bytes do not fit the ranges")
    return changes


@dataclass
class Home:
    """The chunks of a dataset that this node owns."""

    record: Record
    media: Media
    memory: lite.Lmr
    locks: dict[int, int] = field(default_factory=dict)
    """Pages that a transaction has locked."""
    copies: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    """Nodes that keep a page's copy on their media, and get all of its versions."""
    caching: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    """By chunk: nodes that may have pages of it in their caches."""

    def read(self, page: int) -> Copy:
        """A page as media have it. Corrupt."""
        block = self.media.read(self.record.slot(page) * STRIDE, STRIDE)
        try:
            return blocks.unseal(block)
        except Corrupt:
            raise Corrupt(f"page {page} of {self.record.name} does not have its checksum on {self.media.path.name}",
                          hint="other nodes may have copies; it was not used") from None  # fmt: skip

    def version(self, page: int) -> int:
        """Present version of a page."""
        return blocks.version_of(self.media.read(self.record.slot(page) * STRIDE + PAGE, STRIDE - PAGE))

    def write(self, pages: dict[int, Copy]) -> None:
        """Make these the present versions, on media and for readers."""
        sealed = [(self.record.slot(page) * STRIDE, blocks.seal(copy)) for page, copy in pages.items()]
        for place, block in sealed:
            self.media.write(place, block)
        self.media.persist_all((place, STRIDE) for place, _ in sealed)
        for start in range(0, len(sealed), _BATCH):
            self.memory.scatter(sealed[start : start + _BATCH])


@dataclass
class _Prepared:
    home: Home
    changes: list[Change]
    place: int
    replicas: int
    writer: int
    busy: bool = False


class Owner:
    """All homes of this node."""

    def __init__(self, links: Links, folder: Path, log: Log) -> None:
        self._links = links
        self._folder = folder
        self._log = log
        self._homes: dict[int, Home] = {}
        self._prepared: dict[int, _Prepared] = {}
        self._lock = threading.Lock()
        self.counts: dict[str, int] = defaultdict(int)

    def handlers(self) -> dict[str, Handler]:
        """What others may ask, on PORT."""
        return {"prepare": self._prepare_asked, "commit": self._commit_asked, "release": self._release_asked,
                "commit_now": self._commit_now_asked}  # fmt: skip

    def leaf_handlers(self) -> dict[str, Handler]:
        """What others may ask, on LEAF."""
        return {"home_create": self._create, "home_drop": self._drop, "caching": self._caching}

    def home(self, dataset: int) -> Home:
        """This node's part of a dataset. NoSuchDataset."""
        with self._lock:
            found = self._homes.get(dataset)
        if found is None:
            raise NoSuchDataset(f"this node owns nothing of dataset {dataset}")
        return found

    def homes(self) -> list[Home]:
        """All of them."""
        with self._lock:
            return list(self._homes.values())

    # Phase 1

    def prepare(self, dataset: int, xid: int, changes: list[Change], replicas: int, writer: int) -> None:
        """Lock the pages and log what is to become of them. Retry, TooFewNodes, TooLarge, Corrupt: as if not asked."""
        home = self.home(dataset)
        place = self._begin(home, xid, changes, replicas, State.PREPARED)
        with self._lock:
            self._prepared[xid] = _Prepared(home, changes, place, replicas, writer)

    # Phase 2

    def commit(self, xid: int) -> Message:
        """It is decided. Returns when the pages have their copies and are what others read: their versions, copies."""
        with self._lock:
            prepared = self._prepared.get(xid)
            if prepared is None or prepared.busy:
                raise NoSuchTransaction(f"transaction {xid:x} is not prepared here")
            prepared.busy = True
        self._log.set_state(prepared.place, State.COMMITTED)
        return self._carry_out(prepared.home, prepared.changes, prepared.replicas, prepared.writer)

    # Phase 3

    def release(self, xid: int) -> None:
        """Drop the record and unlock; before the commit this is the abort. Those not known are released already."""
        with self._lock:
            prepared = self._prepared.pop(xid, None)
        if prepared is not None:
            self._end(prepared.home, xid, prepared.changes, prepared.place)

    # All at once: there is no other owner whose vote counts, or the pages are the writer's alone (MRSW)

    def commit_now(self, dataset: int, xid: int, changes: list[Change], replicas: int, writer: int) -> Message:
        """Log, copy, write home, unlock. What `prepare` raises; InDoubt: locks and log stay."""
        home = self.home(dataset)
        place = self._begin(home, xid, changes, replicas, State.COMMITTED)
        outcome = self._carry_out(home, changes, replicas, writer)
        self._end(home, xid, changes, place)
        return outcome

    # Inside

    def _begin(self, home: Home, xid: int, changes: list[Change], replicas: int, state: State) -> int:
        me, record = self._links.node.node_id, home.record
        pages = [change.page for change in changes]
        for change in changes:
            if not 0 <= change.page < record.pages or record.owner(change.page) != me:
                raise BadArgument(f"page {change.page} of {record.name} is not this node's")
        with self._lock:
            if any(home.locks.get(change.page, xid) != xid for change in changes):
                self.counts["owner_conflicts"] += 1
                raise Retry("a page is in another commit")
            home.locks |= {change.page: xid for change in changes}
        try:
            based = []
            for change in changes:
                based.append(replace(change, expected=home.version(change.page)))
                if change.expected not in (-1, based[-1].expected):
                    self.counts["owner_conflicts"] += 1
                    raise Retry("somebody committed a page since it was acquired")
                if change.pieces:
                    home.read(change.page)  # whether it can be: later would be too late to refuse
            if _short(home, pages, replicas) and len(self._links.living()) < replicas:
                raise TooFewNodes(f"{replicas} copies asked for")
            header, payload = encode(based)
            return self._log.append(xid, state, pack({"dataset": record.id, "pages": header}, payload))
        except BaseException:
            self._unlock(home, changes)
            raise

    def _carry_out(self, home: Home, changes: list[Change], replicas: int, writer: int) -> Message:
        """What is logged as committed. InDoubt: part of it may be done."""
        try:
            return self._redo(home, changes, replicas, writer)
        except Exception as failure:
            log.exception("a commit to %s", home.record.name)
            raise InDoubt(f"the owner of pages of {home.record.name} failed: {failure}") from failure

    def _redo(self, home: Home, changes: list[Change], replicas: int, writer: int) -> Message:
        fresh: dict[int, Copy] = {}
        for change in changes:
            if change.pieces:
                old = home.read(change.page)
                fresh[change.page] = Copy(old.version + 1, patched(old.data, change.pieces))
        copies = self._replicate(home, fresh, replicas)
        home.write(fresh)
        self._tell(home, fresh, writer)
        self.counts["owner_commits"] += 1
        return {"versions": [[page, copy.version] for page, copy in fresh.items()], "copies": copies}

    def _end(self, home: Home, xid: int, changes: list[Change], place: int) -> None:
        self._log.drop(place)
        self._unlock(home, changes)

    def _unlock(self, home: Home, changes: list[Change]) -> None:
        with self._lock:
            for change in changes:
                home.locks.pop(change.page, None)

    def _replicate(self, home: Home, fresh: dict[int, Copy], replicas: int) -> int:
        """Copies on other nodes' media: where there are some already, and on more until there are enough. How many
        copies the page with the fewest has then, the home included."""
        wanted = {page: set(home.copies[page]) for page in fresh}
        lost: set[int] = set()
        while True:
            if _short(home, fresh, replicas):
                others = self._links.living() - {self._links.node.node_id} - lost
                wanted = {page: nodes | self._more(home, page, replicas, others) for page, nodes in wanted.items()}
            by_node: dict[int, dict[int, Copy]] = defaultdict(dict)
            for page, nodes in wanted.items():
                for node in nodes:
                    by_node[node][page] = fresh[page]
            lost_now = self._send(home, "replica", by_node)
            for page, nodes in wanted.items():
                home.copies[page] = (home.copies[page] | nodes) - lost_now
            self.counts["copies_sent"] += sum(len(pages) for node, pages in by_node.items() if node not in lost_now)
            if not lost_now:
                return min((len(home.copies[page]) + 1 for page in fresh), default=replicas)
            lost |= lost_now
            wanted = {page: set() for page in fresh}

    def _more(self, home: Home, page: int, replicas: int, others: set[int]) -> set[int]:
        """Nodes for copies of a page that are still missing: those that cache its chunk first, then the next ones."""
        have, me = home.copies[page], self._links.node.node_id
        missing = max(0, replicas - 1 - len(have))
        caching = home.caching.get(page // home.record.chunk_pages, set())
        return set(sorted(others - have, key=lambda node: (node not in caching, node < me, node))[:missing])

    def _tell(self, home: Home, fresh: dict[int, Copy], writer: int) -> None:
        """Nodes that may have cached a page, and do not keep a copy, get its new version; the writer has it."""
        by_node: dict[int, dict[int, Copy]] = defaultdict(dict)
        for page, copy in fresh.items():
            with self._lock:
                nodes = home.caching.get(page // home.record.chunk_pages, set()) - home.copies[page] - {writer}
            for node in nodes:
                by_node[node][page] = copy
        lost = self._send(home, "update", by_node)
        with self._lock:
            for nodes in home.caching.values():
                nodes -= lost

    def _send(self, home: Home, op: str, by_node: dict[int, dict[int, Copy]]) -> set[int]:
        """The nodes that did not take what was sent to them."""
        calls = []
        for node, pages in by_node.items():
            listed = list(pages.items())
            for start in range(0, len(listed), _BATCH):
                part = listed[start : start + _BATCH]
                header = {
                    "dataset": home.record.id,
                    "total": home.record.pages,
                    "pages": [[page, copy.version] for page, copy in part],
                }
                calls.append((node, op, header, b"".join(copy.data for _, copy in part)))
        replies = self._links.call_all(calls, LEAF)
        return {call[0] for call, reply in zip(calls, replies, strict=True) if isinstance(reply, HotpotError)}

    # What others ask

    def _prepare_asked(self, source: int, header: Message, payload: memoryview) -> Message:
        changes = decode(header["pages"], payload)
        self.prepare(header["dataset"], header["xid"], changes, header["replicas"], source)
        return {}

    def _commit_asked(self, _source: int, header: Message, _payload: memoryview) -> Message:
        return self.commit(header["xid"])

    def _release_asked(self, _source: int, header: Message, _payload: memoryview) -> Message:
        self.release(header["xid"])
        return {}

    def _commit_now_asked(self, source: int, header: Message, payload: memoryview) -> Message:
        changes = decode(header["pages"], payload)
        return self.commit_now(header["dataset"], header["xid"], changes, header["replicas"], source)

    def _create(self, _source: int, header: Message, _payload: memoryview) -> Message:
        record = Record.from_json(header["record"])
        size = record.slots(self._links.node.node_id) * STRIDE
        media = Media(self._folder / f"home-{record.id}", size)
        try:
            memory = self._links.node.malloc(size, name=memory_name(record, self._links.node.node_id),
                                             permissions=lite.Permission.READ | lite.Permission.SHARE)  # fmt: skip
        except lite.LiteError as failure:
            media.remove()
            raise NoSpace(f"{size} bytes on {self._links.node.name}: {failure}") from None
        with self._lock:
            self._homes[record.id] = Home(record, media, memory)
        return {}

    def _drop(self, _source: int, header: Message, _payload: memoryview) -> Message:
        with self._lock:
            home = self._homes.pop(header["dataset"], None)
        if home is not None:
            home.memory.free()
            home.media.remove()
        return {}

    def _caching(self, source: int, header: Message, _payload: memoryview) -> Message:
        """A node is about to cache pages of a chunk, or has closed the dataset (no chunk)."""
        home = self.home(header["dataset"])
        with self._lock:
            if header.get("chunk") is not None:
                home.caching[header["chunk"]].add(source)
            else:
                for nodes in home.caching.values():
                    nodes.discard(source)
        return {}


def _short(home: Home, pages: Iterable[int], replicas: int) -> bool:
    """Whether a page has fewer copies than it shall have."""
    return any(len(home.copies[page]) + 1 < replicas for page in pages)


def memory_name(record: Record, node: int) -> str:
    """Under which others map the memory where an owner's pages are."""
    return f"hotpot.{record.id}.{node}"
