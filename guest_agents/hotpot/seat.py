"""Which node is the dispatcher, and how another becomes it when its blade is gone (the paper's standby CD).

Every node has the dispatcher's book (`mirror`), with the number of the term in which it was written. Who has not been
answered for long stands for the next term. A node that has lost touch with the dispatcher too votes for it, and obeys
no earlier term from then on; a majority of the book's voters makes it the dispatcher, with the latest book of them. A
dispatcher for its part has changed nothing before so many have its book that no majority is without (`save` in
dispatcher.py). So what one has promised, the next knows, whatever clocks say; and one that is cut off can change
nothing. Of one or two voters there is no majority without the dispatcher: they wait for it.

Source: the paper has a mirrored dispatcher and does not say how; terms and majorities are those of Raft.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from guest_agents.hotpot.book import Book
from guest_agents.hotpot.errors import HotpotError
from guest_agents.hotpot.lease import Lease
from guest_agents.hotpot.media import Media
from guest_agents.hotpot.messages import LEAF, Call, Handler, Message

log = logging.getLogger("rackless.hotpot")


class Seat:
    """What this node knows of it, on `media`. Thread-safe.

    install -- makes this node the dispatcher, with a book. HotpotError: it does not come to be
    followed -- told when another node is
    """

    def __init__(
        self, lease: Lease, media: Media, install: Callable[[Message], None], followed: Callable[[], None]
    ) -> None:
        self._lease = lease
        self._links = lease.links
        self._book = Book(media)
        self._install = install
        self._followed = followed
        self._lock = threading.Lock()
        self._seen = 0
        """The latest term of which this node has heard."""
        kept = self._book.document or {}
        self.document: Message | None = kept.get("book")
        """The latest book that this node was sent."""
        lease.term = kept.get("promised", 0)
        if self.document is not None:
            lease.manager = self.document["seat"]

    def handlers(self) -> dict[str, Handler]:
        """What others may ask, on LEAF."""
        return {"mirror": self._mirror, "mirrored": self._mirrored, "vote": self._vote}

    def _keep(self) -> None:
        self._book.save({"promised": self._lease.term, "book": self.document})

    def _mirror(self, _source: int, header: Message, _payload: memoryview) -> Message:
        """The dispatcher's book, unless there is, or may be, a later dispatcher (`refused`)."""
        document = header["document"]
        with self._lock:
            known = (self._lease.term, 0) if self.document is None else max((self._lease.term, 0), age(self.document))
            if age(document) < known:
                return {"refused": self._lease.term}
            self._lease.term, self.document = document["term"], document
            self._keep()
            self._lease.manager = document["seat"]
        self._follow()
        return {}

    def _mirrored(self, _source: int, _header: Message, _payload: memoryview) -> Message:
        with self._lock:
            return {"document": self.document}

    def _vote(self, source: int, header: Message, _payload: memoryview) -> Message:
        """A node wants to be the dispatcher in a term. It may stay it; another may become it where it is missed.

        would -- it only asks whether it would get this vote
        """
        with self._lock:
            granted = header["term"] > self._lease.term and (source == self._lease.manager or not self._lease.valid)
            if granted and not header["would"]:
                self._lease.term = header["term"]
                self._keep()
            return {"granted": granted, "term": self._lease.term, "document": self.document}

    def _follow(self) -> None:
        if self._lease.manager != self._links.node.node_id:
            self._followed()

    def look(self) -> None:
        """Ask all nodes who the dispatcher is."""
        calls: list[Call] = [(node, "mirrored", {}, b"") for node in sorted(self._links.living())]
        for reply in self._links.call_all(calls, LEAF):
            document = None if isinstance(reply, HotpotError) else reply["document"]
            with self._lock:
                if document is None or (self.document is not None and age(document) <= age(self.document)):
                    continue
                if document["term"] >= self._lease.term:
                    self._lease.term, self.document = document["term"], document
                    self._lease.manager = document["seat"]
                    self._keep()
        self._follow()

    def due(self) -> bool:
        """Whether this node should stand: the dispatcher was silent for long, and others before it had their turn."""
        if self.document is None:
            return False
        others = [node for node in self.document["voters"] if node != self._lease.manager]
        if self._links.node.node_id not in others or len(others) < 2:
            return False
        timing = self._lease.timing
        turn = timing.takeover + 2 * timing.beat * others.index(self._links.node.node_id)
        return time.monotonic() - self._lease.heard > turn

    def stand(self) -> bool:
        """Become the dispatcher, or stay it, if a majority wants that; whether it does."""
        me = self._links.node.node_id
        with self._lock:
            term = max(self._lease.term, self._seen) + 1
        # A node that nobody wants must not begin terms: it would obey no dispatcher when it is back among the others.
        if self._elected(term, would=True) is None:
            return False
        with self._lock:
            if self._lease.term >= term:
                return False
            self._lease.term = term
            self._keep()
        latest = self._elected(term, would=False)
        if latest is None:
            return False
        log.warning("node %d is the dispatcher now (term %d)", me, term)
        try:
            self._install({**latest, "term": term, "seat": me})
        except HotpotError as failure:
            log.warning("the book of the new dispatcher does not reach enough nodes yet: %s", failure.message)
            return False
        return True

    def _elected(self, term: int, *, would: bool) -> Message | None:
        """The latest book, if a majority of its voters vote for this node; with `would`, if they would."""
        me = self._links.node.node_id
        documents = [] if self.document is None else [self.document]
        granted = {me}
        about = {"term": term, "would": would}
        calls: list[Call] = [(node, "vote", about, b"") for node in sorted(self._links.living() - {me})]
        for call, reply in zip(calls, self._links.call_all(calls, LEAF), strict=True):
            if isinstance(reply, HotpotError):
                continue
            if reply["granted"]:
                granted.add(call[0])
            self._seen = max(self._seen, reply["term"])
            if reply["document"] is not None:
                documents.append(reply["document"])
        latest = max(documents, key=age, default=None)
        if latest is None or me not in latest["voters"]:
            return None
        return latest if 2 * len(granted & set(latest["voters"])) > len(latest["voters"]) else None


def age(document: Message) -> tuple[int, int]:
    """Which of two books is the later."""
    return document["term"], document["number"]
