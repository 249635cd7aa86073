"""What the asking side of an RPC gets when no answer comes. Apart from rpc.py, which only runs where pyverbs is."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, Protocol


class LostError(OSError):
    """The other side is not there, or went away while asked: EIO.

    sent -- the request may have reached it, and been carried out
    """

    def __init__(self, text: str, sent: bool) -> None:
        super().__init__(errno.EIO, text)
        self.sent = sent


class Caller(Protocol):
    """Asks one service of another agent; see rpc.Client."""

    def call(
        self, opcode: int, first: bytes, second: bytes | memoryview = b"", into: Callable[..., Any] | None = None
    ) -> Any:
        """Ask and wait. OSError with the errno of the answer; LostError if there is none."""
