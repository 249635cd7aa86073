"""Touch with the dispatcher: every node calls it all the time, and commits nothing when it has not answered for long.

So the side of a partition that has the dispatcher can go on, and the other side refuses. That no acknowledged commit is
lost does not rest on clocks, but on copies: an owner acknowledges nothing that is not on all nodes of which the
dispatcher knows that they have its copies, and those obey one owner only (promotion.py).
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from guest_agents.hotpot.errors import HotpotError, Isolated
from guest_agents.hotpot.messages import LEAF, Links, Message


@dataclass(frozen=True)
class Timing:
    """All in seconds."""

    beat: float = 0.5
    """From one call of the dispatcher to the next; also how often what is unfinished is looked at."""
    lease: float = 5.0
    """After that long without an answer a node commits nothing."""
    promote: float = 15.0
    """After that long without a call of its node, a part gets another home, if there are copies of all of it."""
    patience: float = 10.0
    """How long a commit waits for an owner that does not answer, before it is InDoubt (and goes on without anybody)."""
    takeover: float = 20.0
    """After that long without an answer of the dispatcher, another node becomes it."""
    window: float = 15.0
    """How long accesses are counted before it is decided whether a part moves."""
    settle: float = 2.0
    """How old something unfinished must be before its owner asks what became of it."""


class Lease:
    """This node's. Thread-safe."""

    def __init__(self, links: Links, manager: int, timing: Timing) -> None:
        self.links = links
        self.manager = manager
        self.timing = timing
        self.term = 0
        """No dispatcher of an earlier one is obeyed (seat.py)."""
        self.heard = time.monotonic()
        """When the dispatcher has last answered, or this began."""
        self._until = 0.0

    @property
    def valid(self) -> bool:
        """Whether the dispatcher has answered lately."""
        return time.monotonic() < self._until

    def check(self) -> None:
        """Isolated, if it has not."""
        if not self.valid:
            raise Isolated

    def renew(self, about: Message) -> Message | None:
        """Call the dispatcher; its answer, None if there is none."""
        began = time.monotonic()
        try:
            answer = self.ask("beat", {**about, "term": self.term})
        except HotpotError:
            return None
        if answer.get("term", 0) < self.term:
            return None
        if "unknown" not in answer:
            self._until, self.heard = began + self.timing.lease, began
        return answer

    def ask(self, op: str, about: Message) -> Message:
        """Ask the dispatcher something that it answers by itself."""
        return self.links.call(self.manager, op, about, port=LEAF)
