"""What a service does again and again: a thread that takes its turn at every beat."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

log = logging.getLogger("rackless.hotpot")


class Beat:
    """Calls `turn` every `seconds`; what it raises is logged, and the next turn comes.

    name -- of the thread, and in the log
    """

    def __init__(self, name: str, seconds: float, turn: Callable[[], None]) -> None:
        self._name = name
        self._seconds = seconds
        self._turn = turn
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, in a thread."""
        self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop. Returns when the turn under way has ended."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            try:
                self._turn()
            except Exception:
                log.exception("%s", self._name)
