"""The steps of the protocols by name: a crash test has a blade stand still at one of them, and cuts its power there.

    send OP, sent OP        a message goes to another node; its answer has come
    serve OP, served OP     a message of another node has come; it is answered
    persist MEDIA           bytes of log, log-copies, intents, home, copies, datasets or node are about to be durable

A blade stands still as a whole: the agent stops (SIGSTOP) before it does anything else, and says so on its console,
where the host sees it. It goes on by SIGCONT. tests/rack/hotpot_crash.py uses it.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from pathlib import Path

SAID = "hotpot stands still at"
"""On the console, and then the step."""
_CONSOLE = Path("/dev/console")
_NUMBERS = re.compile(r"-[0-9].*")


class Trap:
    """Waits for a step to come for the `count`-th time."""

    def __init__(self, step: str, count: int = 1) -> None:
        self.step = step
        self._left = count
        self._lock = threading.Lock()

    def hit(self, step: str) -> bool:
        """Whether this is it; only once."""
        if step != self.step:
            return False
        with self._lock:
            self._left -= 1
            return self._left == 0


_trap: Trap | None = None


def arm(trap: Trap | None) -> None:
    """Stand still at a step, or at none. Only the last one counts."""
    global _trap
    _trap = trap


def at(when: str, what: str) -> None:
    """This step is about to be done. Numbers of datasets and parts do not count."""
    trap = _trap
    if trap is not None and trap.hit(f"{when} {_NUMBERS.sub('', what)}"):
        _stand_still(trap.step)


def _stand_still(step: str) -> None:
    with _CONSOLE.open("w") as console:
        console.write(f"{SAID} {step}\n")
    os.kill(os.getpid(), signal.SIGSTOP)
