"""Asking the storage blade that has the files now: they may move to another one, and programs go on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from guest_agents.verbs.lost import Caller, LostError


class Following:
    """A caller of the file service of one storage blade after the other.

    blade -- that has the files now, None if there is none
    caller -- asks that of a storage blade
    """

    def __init__(self, blade: Callable[[], str | None], caller: Callable[[str], Caller]) -> None:
        self._blade = blade
        self._caller = caller
        self._now: tuple[str, Caller] | None = None
        self._lock = threading.Lock()

    def call(
        self, opcode: int, first: bytes, second: bytes | memoryview = b"", into: Callable[..., Any] | None = None
    ) -> Any:
        """As Caller.call."""
        blade = self._blade()
        if blade is None:
            raise LostError("the rack has no storage blade: add one to have files under /vnode", sent=False)
        with self._lock:
            if self._now is None or self._now[0] != blade:
                self._now = blade, self._caller(blade)  # the other ends with the last request that uses it
            caller = self._now[1]
        return caller.call(opcode, first, second, into)
