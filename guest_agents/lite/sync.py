"""Locks: mutual exclusion among all programs of a rack."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from guest_agents.lite.channel import milliseconds

if TYPE_CHECKING:
    from guest_agents.lite.node import Node


class Lock:
    """A lock by its name, from `Node.lock`; a context manager.

    Uncontended it costs one remote fetch-add; those who wait are served in the order they came. It belongs to the
    process, not to a thread. If the holder or its node dies, the next in order gets it: what it
    protects may be half done.
    """

    def __init__(self, node: Node, name: str) -> None:
        """Made by the node once the lock exists."""
        self._node = node
        self.name = name

    def acquire(self, timeout: float | None = None) -> None:
        """Wait for the lock (LT_lock). TimedOut after `timeout` seconds; None waits for ever."""
        self._node.call_agent("lock", name=self.name, timeout_ms=milliseconds(timeout))

    def release(self) -> None:
        """Give the lock to the next (LT_unlock). NotHeld if this process does not hold it."""
        self._node.call_agent("unlock", name=self.name)

    def __enter__(self) -> Lock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
