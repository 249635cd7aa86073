"""The central dispatcher on the manager blade (the paper's CD): names of datasets, and which node owns which chunk.

It is asked when a dataset is made, opened, closed or deleted, and never when data are read or committed.
"""

from __future__ import annotations

import json
import os
import threading
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from guest_agents.hotpot.blocks import PAGE
from guest_agents.hotpot.errors import (
    BadArgument,
    Corrupt,
    DatasetBusy,
    DatasetExists,
    HotpotError,
    NoSpace,
    NoSuchDataset,
    VersionMismatch,
)
from guest_agents.hotpot.messages import LEAF, MAX_REPLY, Handler, Links, Message
from guest_agents.hotpot.records import ALIGN, MAX_NAME, MODES, REGION, REGION_BYTES, SETTINGS, Record

_BOOK = "datasets.json"


class Dispatcher:
    """All datasets of the rack; the book of them is a file in `folder`.

    gather -- called before a dataset is made, with the nodes that have registered: let the others do it too
    """

    def __init__(self, links: Links, folder: Path, gather: Callable[[set[int]], None]) -> None:
        self._gather = gather
        self._links = links
        self._book = folder / _BOOK
        self._datasets: dict[str, Record] = {}
        self._nodes: set[int] = set()
        self._open: dict[int, set[int]] = defaultdict(set)
        self._next = 1
        self._lock = threading.Lock()
        self._joining = threading.Lock()

    def handlers(self) -> dict[str, Handler]:
        """What nodes may ask, on PORT."""
        return {"create": self._create, "delete": self._delete, "list": self._list, "open": self._open_asked,
                "close": self._close}  # fmt: skip

    def leaf_handlers(self) -> dict[str, Handler]:
        """What nodes may ask, on LEAF: somebody's `create` may be waiting for it."""
        return {"register": self._register}

    def _register(self, source: int, header: Message, _payload: memoryview) -> Message:
        """A node can own chunks from now on."""
        if header["settings"] != SETTINGS:
            raise VersionMismatch(f"node {source} has {header['settings']}, the manager {SETTINGS}")
        with self._joining:
            self._nodes.add(source)
        return {}

    def nodes(self) -> set[int]:
        """Those that have registered."""
        with self._joining:
            return set(self._nodes)

    def _create(self, _source: int, header: Message, _payload: memoryview) -> Message:
        """Make a dataset and its homes. DatasetExists, NoSpace, BadArgument, NodeLost."""
        self._gather(self.nodes())
        with self._lock:
            record = self._plan(header)
            made: list[int] = []
            try:
                for owner in sorted(set(record.owners)):
                    self._links.call(owner, "home_create", {"record": record.to_json()}, port=LEAF)
                    made.append(owner)
                self._datasets[record.name] = record
                self._next += 1
                self._save()
            except BaseException:
                self._datasets.pop(record.name, None)
                self._drop(record, "home_drop", made)
                raise
            return {"record": record.to_json()}

    def _plan(self, header: Message) -> Record:
        name, size, mode, chunk = header["name"], header["size"], header["mode"], header["chunk"]
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable() or "/" in name:
            raise BadArgument(f"a name has 1 to {MAX_NAME} printable characters and no slash, not {name!r:.40}")
        if name in self._datasets:
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
        living = self._links.living()
        able = self.nodes()
        nodes = [node for node in header.get("owners") or sorted(able) if node in living]
        if unknown := set(nodes) - able:
            raise BadArgument(f"no Hotpot on nodes {sorted(unknown)}")
        if not nodes:
            raise NoSpace("no node can own chunks")
        owners = tuple(nodes[number % len(nodes)] for number in range(chunks))
        return Record(self._next, name, size, mode, chunk, self._place(size), owners)

    def _place(self, size: int) -> int:
        """Where programs map it: the first gap among the others."""
        address = REGION
        for other in sorted(self._datasets.values(), key=lambda record: record.address):
            if address + size <= other.address:
                break
            address = -(-(other.address + other.size) // ALIGN) * ALIGN
        if address + size > REGION + REGION_BYTES:
            raise NoSpace(f"{size} bytes of addresses")
        return address

    def _delete(self, _source: int, header: Message, _payload: memoryview) -> Message:
        """NoSuchDataset, DatasetBusy. What nodes cannot be reached now keep their part; nothing uses it again."""
        with self._lock:
            record = self._find(header["name"])
            if self._open[record.id] & self._links.living():
                raise DatasetBusy(f"{record.name!r} is open on nodes {sorted(self._open[record.id])}")
            del self._datasets[record.name]
            self._save()
            self._drop(record, "home_drop", sorted(set(record.owners)))
            self._drop(record, "replicas_drop", sorted(self.nodes()))
        return {}

    def _drop(self, record: Record, op: str, nodes: list[int]) -> None:
        for node in nodes:
            with suppress(HotpotError):
                self._links.call(node, op, {"dataset": record.id}, port=LEAF)

    def datasets(self) -> list[dict[str, Any]]:
        """All of them: the fields of their records, owners once each, and the nodes that have them open."""
        with self._lock:
            return [{**record.to_json(), "owners": sorted(set(record.owners)), "open": sorted(self._open[record.id])}
                    for record in self._datasets.values()]  # fmt: skip

    def _list(self, _source: int, _header: Message, _payload: memoryview) -> Message:
        return {"datasets": self.datasets()}

    def _open_asked(self, source: int, header: Message, _payload: memoryview) -> Message:
        with self._lock:
            record = self._find(header["name"])
            self._open[record.id].add(source)
            return {"record": record.to_json()}

    def _close(self, source: int, header: Message, _payload: memoryview) -> Message:
        with self._lock:
            self._open[header["dataset"]].discard(source)
        return {}

    def _find(self, name: str) -> Record:
        try:
            return self._datasets[name]
        except KeyError:
            raise NoSuchDataset(f"there is no dataset {name!r}") from None

    def _save(self) -> None:
        """The book is replaced as a whole, so that there is always one."""
        text = json.dumps({"next": self._next, "datasets": [r.to_json() for r in self._datasets.values()]})
        beside = self._book.with_suffix(".new")
        with beside.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self._book)
        folder = os.open(self._book.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def datasets_in(folder: Path) -> list[Record]:
    """What the book of an earlier dispatcher has. Corrupt."""
    try:
        return [Record.from_json(fields) for fields in json.loads((folder / _BOOK).read_text())["datasets"]]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError):
        raise Corrupt(f"{folder / _BOOK} is not a book of datasets") from None
