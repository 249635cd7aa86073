"""Who may write which pages of MRSW datasets (the paper's MN): at most one transaction each."""

from __future__ import annotations

import threading

from guest_agents.hotpot.errors import Retry
from guest_agents.hotpot.messages import Handler, Message


class Master:
    """All pages that are being written. Thread-safe."""

    def __init__(self) -> None:
        self._writers: dict[tuple[int, int], int] = {}
        self._lock = threading.Lock()

    def handlers(self) -> dict[str, Handler]:
        """What others may ask, on LEAF."""
        return {"acquire": self._acquire, "let_go": self._let_go}

    def _acquire(self, _source: int, header: Message, _payload: memoryview) -> Message:
        """All of the pages or none, at once or not at all: nobody waits, so there is no deadlock."""
        xid, pages = header["xid"], [(header["dataset"], page) for page in header["pages"]]
        with self._lock:
            if any(self._writers.get(page, xid) != xid for page in pages):
                raise Retry("somebody is writing a page")
            self._writers |= dict.fromkeys(pages, xid)
        return {}

    def _let_go(self, _source: int, header: Message, _payload: memoryview) -> Message:
        """The transaction writes nothing any more."""
        with self._lock:
            for page in [page for page, xid in self._writers.items() if xid == header["xid"]]:
                del self._writers[page]
        return {}
