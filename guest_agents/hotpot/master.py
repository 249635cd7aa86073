"""Who may write which pages of MRSW datasets (the paper's MN): at most one transaction each.

It keeps nothing on media. After a crash it grants nothing until every node that lives has told it what it holds
(`writing`, when it registers), or may not commit any more.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from guest_agents.hotpot.errors import Retry
from guest_agents.hotpot.messages import Handler, Message


class Master:
    """All pages that are being written. Thread-safe.

    living -- nodes that are alive: what others held is free
    grace -- seconds in which nothing is granted
    """

    def __init__(self, living: Callable[[], set[int]], grace: float = 0.0) -> None:
        self._living = living
        self._from = time.monotonic() + grace
        self._writers: dict[tuple[int, int], int] = {}
        self._nodes: dict[int, int] = {}
        self._lock = threading.Lock()

    def handlers(self) -> dict[str, Handler]:
        """What others may ask, on LEAF."""
        return {"acquire": self._acquire, "let_go": self._let_go}

    def hold(self, node: int, held: Iterable[tuple[int, int, list[int]]]) -> None:
        """What transactions of a node hold (number, dataset, pages), as it says when it registers."""
        listed = list(held)
        for xid in [xid for xid, holder in self._nodes.items() if holder == node]:
            if all(xid != other for other, _dataset, _pages in listed):
                self._drop(xid)  # of an earlier life
        with self._lock:
            for xid, dataset, pages in listed:
                self._nodes[xid] = node
                for page in pages:
                    self._writers.setdefault((dataset, page), xid)

    def _acquire(self, source: int, header: Message, _payload: memoryview) -> Message:
        """All of the pages or none, at once or not at all: nobody waits, so there is no deadlock."""
        xid, pages = header["xid"], [(header["dataset"], page) for page in header["pages"]]
        if time.monotonic() < self._from:
            raise Retry("the master has just begun")
        with self._lock:
            others = {self._writers[page] for page in pages if self._writers.get(page, xid) != xid}
        if others:
            self._free_of_dead(others)
        with self._lock:
            if any(self._writers.get(page, xid) != xid for page in pages):
                raise Retry("somebody is writing a page")
            self._writers |= dict.fromkeys(pages, xid)
            self._nodes[xid] = source
        return {}

    def _free_of_dead(self, xids: set[int]) -> None:
        """Pages whose writers' nodes have died are free. A commit of one of these that is still being settled has the
        pages locked at their owners."""
        living = self._living()
        with self._lock:
            gone = {xid for xid in xids if self._nodes.get(xid, 0) not in living}
        for xid in gone:
            self._drop(xid)

    def _let_go(self, _source: int, header: Message, _payload: memoryview) -> Message:
        """The transaction writes nothing any more."""
        self._drop(header["xid"])
        return {}

    def _drop(self, xid: int) -> None:
        with self._lock:
            self._nodes.pop(xid, None)
            for page in [page for page, writer in self._writers.items() if writer == xid]:
                del self._writers[page]
