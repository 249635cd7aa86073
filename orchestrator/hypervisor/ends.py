"""Ends of processes."""

from __future__ import annotations

import os
import select


def wait(pid: int, seconds: float) -> bool:
    """Wait until a process has let go of all it held: locks, namespaces, files; returns whether it has by then.

    Its command line is gone long before that, and its entry in /proc may stay long after, until its parent asks.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)  # readable once the last thread has ended, see pidfd_open(2)
        return bool(poll.poll(seconds * 1000))
    finally:
        os.close(pidfd)
