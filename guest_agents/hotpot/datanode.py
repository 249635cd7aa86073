"""Copies of committed pages on this node's media, for others' sake (the paper's DN), and news of pages cached here.

A page whose copy is here and which no program has mapped is what the paper calls redundant.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from guest_agents.hotpot import blocks
from guest_agents.hotpot.blocks import PAGE, STRIDE, Copy
from guest_agents.hotpot.errors import BadArgument
from guest_agents.hotpot.media import Media
from guest_agents.hotpot.messages import Handler, Message


@dataclass
class _Store:
    media: Media
    held: set[int] = field(default_factory=set)


class DataNode:
    """Copies of pages of all datasets.

    updated -- told of each new version of a page, also of those that are not kept here
    """

    def __init__(self, folder: Path, updated: Callable[[int, int, Copy], None]) -> None:
        self._folder = folder
        self._updated = updated
        self._stores: dict[int, _Store] = {}
        self._lock = threading.Lock()

    def handlers(self) -> dict[str, Handler]:
        """What others may ask, on LEAF."""
        return {"replica": self._replica, "update": self._update, "replicas_drop": self._drop, "replicas": self._list}

    def read(self, dataset: int, page: int) -> Copy | None:
        """The copy of a page, if it is kept here: the present version. Corrupt."""
        with self._lock:
            store = self._stores.get(dataset)
            if store is None or page not in store.held:
                return None
            return blocks.unseal(store.media.read(page * STRIDE, STRIDE))

    def held(self, dataset: int) -> set[int]:
        """Pages of which a copy is here."""
        with self._lock:
            store = self._stores.get(dataset)
            return set(store.held) if store else set()

    def _replica(self, _source: int, header: Message, payload: memoryview) -> Message:
        dataset, pages = header["dataset"], _copies(header, payload)
        with self._lock:
            store = self._stores.get(dataset)
            if store is None:
                # Sparse: it holds few pages of many.
                path = self._folder / f"copies-{dataset}"
                store = self._stores[dataset] = _Store(Media(path, header["total"] * STRIDE, reserve=False))
            for page, _copy in pages:
                store.media.reserve(page * STRIDE, STRIDE)
            for page, copy in pages:
                store.media.write(page * STRIDE, blocks.seal(copy))
            store.media.persist_all((page * STRIDE, STRIDE) for page, _copy in pages)
            store.held |= {page for page, _copy in pages}
        return self._update(_source, header, payload)

    def _update(self, _source: int, header: Message, payload: memoryview) -> Message:
        for page, copy in _copies(header, payload):
            self._updated(header["dataset"], page, copy)
        return {}

    def _list(self, _source: int, header: Message, _payload: memoryview) -> Message:
        """Versions of the copies here of some pages; a page without one is left out."""
        copies = {page: self.read(header["dataset"], page) for page in header["pages"]}
        return {"versions": [[page, copy.version] for page, copy in copies.items() if copy]}

    def _drop(self, _source: int, header: Message, _payload: memoryview) -> Message:
        with self._lock:
            store = self._stores.pop(header["dataset"], None)
        if store is not None:
            store.media.remove()
        return {}


def _copies(header: Message, payload: memoryview) -> list[tuple[int, Copy]]:
    pages = header["pages"]
    if len(payload) != len(pages) * PAGE:
        raise BadArgument("the bytes do not fit the pages")
    return [(page, Copy(version, bytes(payload[i * PAGE : (i + 1) * PAGE]))) for i, (page, version) in enumerate(pages)]
