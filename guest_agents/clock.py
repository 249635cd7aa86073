"""Clock jumps on demand: this blade's wall clock is set off by some seconds, and back."""

from __future__ import annotations

import time


def jump(seconds: float) -> None:
    """Set the wall clock on by `seconds` (back if negative) at once. Clocks that only go forward are not touched."""
    time.clock_settime_ns(time.CLOCK_REALTIME, time.time_ns() + round(seconds * 1e9))
