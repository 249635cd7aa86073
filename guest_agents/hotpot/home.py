"""The home of a part of a dataset: its pages on media and in registered memory, and which nodes have copies of them."""

from __future__ import annotations

import secrets
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from guest_agents import lite
from guest_agents.hotpot import blocks
from guest_agents.hotpot.blocks import PAGE, STRIDE, Copy
from guest_agents.hotpot.changes import Change
from guest_agents.hotpot.errors import Corrupt, HotpotError, NoSpace, NotOwner, PagesLost
from guest_agents.hotpot.log import State
from guest_agents.hotpot.media import Folder, Media
from guest_agents.hotpot.messages import Message
from guest_agents.hotpot.records import Record

_BATCH = 128
"""Pages in one scattered write."""
Key = tuple[int, int]
"""Dataset and part."""


@dataclass
class Leave:
    """How far a home has moved (migration.py)."""

    node: int
    pages: list[int] = field(default_factory=list)
    """Some that the node has still to get."""
    frozen: float = 0.0
    """Since when there are no commits; 0: there are."""
    handed: float = 0.0
    """When the node has become the home; until all have heard that, they read here."""


@dataclass
class Home:
    """The part of a dataset that this node owns."""

    record: Record
    part: int
    media: Media
    memory: lite.Lmr
    name: str
    """Of the memory; another one each time that the home is opened."""
    ready: bool = False
    """The dispatcher has confirmed that this is the home, and it knows where copies are."""
    locks: dict[int, int] = field(default_factory=dict)
    """Pages that a transaction has locked."""
    copies: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    """Nodes that keep a page's copy on their media, and get all of its versions."""
    caching: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    """By chunk: nodes that may have pages of it in their caches."""
    synced: set[int] = field(default_factory=set)
    """Nodes of which the dispatcher knows that their copies may be trusted: all that are in `copies`."""
    unsure: set[int] = field(default_factory=set)
    """Nodes whose copies are not to be trusted, of which the dispatcher could not be told yet: it comes first."""
    media_of: dict[int, str] = field(default_factory=dict)
    """Their media's numbers: a node that has come back with others has lost its copies, and takes none unasked."""
    solo: set[int] = field(default_factory=set)
    """Chunks of which the dispatcher knows that pages were committed without a copy elsewhere."""
    looked: int = -1
    """The last of them at which it was looked whether it still has such pages."""
    short: set[int] = field(default_factory=set)
    """Pages that may have fewer copies than their degree."""
    missed: set[int] = field(default_factory=set)
    """Nodes that may have cached pages, and did not get news of them, or have not heard of this home."""
    wrong: list[int] = field(default_factory=list)
    """Pages that did not have their checksum when the home was opened."""
    refused: bool = False
    """A data node obeys another home of this part."""
    claims: dict[int, Claim] = field(default_factory=dict)
    """Transactions that had begun before this became the home, and may still come."""
    xids: set[int] = field(default_factory=set)
    """Transactions that had last written pages when this node became their home in place of a lost one."""
    gone: bool = False
    """It is another node's, or nobody's: its media are deleted."""
    _writing: threading.Lock = field(default_factory=threading.Lock)

    accessed: Counter[int] = field(default_factory=Counter)
    """Bytes that nodes have fetched and committed in this window."""
    leave: Leave | None = None
    """It goes to another node."""
    sound: bool = False
    """It has come here from a home that lived: what nodes have cached is not old."""

    @property
    def key(self) -> Key:
        """By which it is found."""
        return self.record.id, self.part

    @property
    def chunks(self) -> range:
        """Numbers of its chunks."""
        return range(self.part, self.record.chunks, len(self.record.homes))

    def read(self, page: int) -> Copy:
        """A page as media have it. Corrupt, PagesLost."""
        try:
            copy = blocks.unseal(self.block(page))
        except Corrupt:
            raise Corrupt(f"page {page} of {self.record.name} does not have its checksum on {self.media.path.name}",
                          hint="other nodes may have copies; it was not used") from None  # fmt: skip
        if copy.version == blocks.LOST:
            raise PagesLost(f"page {page} of {self.record.name} was lost with the node that had it")
        return copy

    def block(self, page: int) -> bytes:
        """The bytes of a page and its trailer, as they are on media."""
        return self.media.read(self.record.slot(page) * STRIDE, STRIDE)

    def version(self, page: int) -> int:
        """Present version of a page."""
        return blocks.version_of(self.media.read(self.record.slot(page) * STRIDE + PAGE, STRIDE - PAGE))

    def after(self, change: Change, xid: int, degree: int) -> Copy:
        """The page with a change that was logged; also when it is there already, in full or in part.

        A write that was interrupted leaves a page without checksum, of which every byte is that of the page before or
        after: as they differ only where the change is, applying it makes it whole.
        """
        try:
            old = self.read(change.page)
        except Corrupt:
            old = Copy(change.expected, self.block(change.page)[:PAGE], 0, degree)
        if old.version > change.expected:
            return old
        return change.onto(old, xid, degree)

    def write(self, pages: dict[int, Copy]) -> None:
        """Make these the present versions, on media and for readers. NotOwner: it was removed."""
        sealed = [(self.record.slot(page) * STRIDE, blocks.seal(copy)) for page, copy in pages.items()]
        with self._writing:
            if self.gone:
                raise NotOwner(f"part {self.part} of {self.record.name} has another home now")
            for place, block in sealed:
                self.media.write(place, block)
            self.media.persist_all((place, STRIDE) for place, _ in sealed)
            for start in range(0, len(sealed), _BATCH):
                self.memory.scatter(sealed[start : start + _BATCH])

    def renew(self, node: lite.Node) -> bool:
        """Have new registered memory, if what was there has ended: with a life of this node in LITE, which others took
        for dead. Whether that was so. NoSpace."""
        try:
            self.memory.read(1)
        except (lite.NodeDead, lite.NodeUnreachable):
            with self._writing:
                self.memory, name = _registered(node, self.record, self.part)
                self._load()
                self.name = name
            return True
        return False

    def load(self) -> None:
        """Fill the registered memory from media, and find pages that do not have their checksum."""
        with self._writing:
            self._load()

    def _load(self) -> None:
        sealed = []
        self.wrong = []
        for page in self.record.pages_of(self.part):
            block = self.block(page)
            try:
                copy = blocks.unseal(block)
            except Corrupt:
                self.wrong.append(page)
                copy = None
            if copy is None or copy.version:
                sealed.append((self.record.slot(page) * STRIDE, block))
        for start in range(0, len(sealed), _BATCH):
            self.memory.scatter(sealed[start : start + _BATCH])

    def lacking(self, most: int) -> list[int]:
        """Pages that have fewer copies than their degree, of the next `most` ones that may."""
        looked = list(islice(self.short, most))
        lacking = [page for page in looked if len(self.copies[page]) + 1 < _degree(self, page)]
        self.short.difference_update(looked)
        self.short.update(lacking)
        return lacking

    def forget(self, node: int) -> None:
        """A node's copies count no more."""
        for page, nodes in self.copies.items():
            if node in nodes:
                nodes.discard(node)
                self.short.add(page)
        self.synced.discard(node)

    def bare_without(self, nodes: set[int]) -> set[int]:
        """Chunks that have pages of which only these nodes keep copies."""
        chunk_pages = self.record.chunk_pages
        return {page // chunk_pages for page, holders in self.copies.items() if holders and holders <= nodes}

    def is_bare(self, chunk: int) -> bool:
        """Whether a chunk has pages without a copy."""
        return any(self.version(page) and not self.copies.get(page) for page in self.record.pages_in(chunk))

    def remove(self) -> None:
        """Delete it; nobody writes to it any more."""
        with self._writing:
            self.gone = True
            with suppress(lite.LiteError):
                self.memory.free()
            self.media.remove()

    def close(self) -> None:
        """Forget it; the media stay."""
        self.memory.free()
        self.media.close()


def _degree(home: Home, page: int) -> int:
    try:
        return home.read(page).degree
    except HotpotError:
        return 0


def open_home(node: lite.Node, folder: Folder, record: Record, part: int) -> Home:
    """The home on this node's media, new if there is none. NoSpace."""
    media = folder.open(f"home-{record.id}-{part}", record.slots(part) * STRIDE)
    try:
        memory, name = _registered(node, record, part)
    except NoSpace:
        media.close()
        raise
    return Home(record, part, media, memory, name)


def _registered(node: lite.Node, record: Record, part: int) -> tuple[lite.Lmr, str]:
    """Zeroed memory for a home, and the name by which others map it. NoSpace."""
    size, name = record.slots(part) * STRIDE, f"hotpot.{record.id}.{part}.{secrets.token_hex(4)}"
    try:
        return node.malloc(size, name=name, permissions=lite.Permission.READ | lite.Permission.SHARE), name
    except lite.LiteError as failure:
        raise NoSpace(f"{size} bytes on {node.name}: {failure}") from None


class Origin(NamedTuple):
    """Which node commits, and which life of its media: those of a later one know nothing of it."""

    node: int
    media: str


class Claim(NamedTuple):
    """What is known of a transaction whose pages are to wait for it."""

    origin: Origin
    parts: list[int]


@dataclass
class Entry:
    """A commit that this owner has logged and not yet ended."""

    home: Home
    xid: int
    state: State
    changes: list[Change]
    """With the versions that the pages had."""
    old: list[Change]
    """What takes them back (MRSW, when there are other owners)."""
    place: int
    replicas: int
    """Copies that it asks for, the home included."""
    degree: int
    """The most that any commit has asked for of one of its pages."""
    origin: Origin
    everywhere: dict[int, list[int]]
    """Pages of the commit, by part of the dataset."""
    since: float
    """When it was logged here; time.monotonic()."""
    frozen: bool = False
    """The owners settle it among themselves: the committing node is not obeyed any more."""
    outcome: Message | None = None
    """When it has been carried out."""
    over: bool = False
    """It was ended: whoever still has it does nothing more."""
    last: Callable[[], None] | None = None
    """What who is busy with it has to do at the end, as its home was dropped meanwhile."""
    busy: threading.Lock = field(default_factory=threading.Lock)
    """Held by who carries it out, or ends it."""

    @property
    def parts(self) -> list[int]:
        """Of the dataset, all that the commit changes."""
        return list(self.everywhere)

    @property
    def pages(self) -> Iterable[int]:
        """Pages that it has locked."""
        return [change.page for change in self.changes]
