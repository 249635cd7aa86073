"""Waiting for work completions without starving Soft-RoCE.

A blade may have one CPU, and rxe works in kernel threads on it: a loop that only polls takes the CPU from the very
work it waits for. So: poll once or a few times, then sleep on the completion channel.
"""

from __future__ import annotations

import os
import select
import threading
from typing import Any

from pyverbs.cq import CQ, CompChannel

from guest_agents.verbs.device import Device, VerbsError
from guest_agents.verbs.enums import E

_making = threading.Lock()  # descriptors are told apart by what is new: one channel at a time may come or go


def _channel_files() -> set[int]:
    """Descriptors of completion channels (judged by name: the listing's own descriptor is in every listing)."""
    numbers = (int(name) for name in os.listdir("/proc/self/fd"))
    return {number for number in numbers if _link(number) == "anon_inode:[infinibandevent]"}


def _channel(device: Device) -> tuple[Any, int]:
    """A completion channel and its descriptor, which pyverbs shows only since version 57."""
    with _making:
        before = _channel_files()
        channel = CompChannel(device.context)
        fd = getattr(channel, "fd", None)
        if fd is None:
            new = list(_channel_files() - before)
            if len(new) != 1:
                raise VerbsError("cannot tell the completion channel's descriptor", "close no channel meanwhile")
            fd = new[0]
    os.set_blocking(fd, False)
    return channel, fd


def _link(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


class Completions:
    """A completion queue with a channel of its own (pyverbs raises if a channel serves two queues).

    solicited -- sleep until a SEND comes that is marked so, or something fails: one's own SENDs wake nobody
    """

    def __init__(self, device: Device, depth: int = 256, solicited: bool = False) -> None:
        self._solicited = solicited
        self._channel, self.fd = _channel(device)
        self.cq: Any = CQ(device.context, depth, None, self._channel, 0)
        self._poller = select.poll()
        self._poller.register(self.fd, select.POLLIN)

    def wait(self, timeout: float | None = None, most: int = 16) -> list[Any]:
        """Completions that have come, at least one; none only after `timeout` seconds.

        A completion's `status` is not looked at here: see `check`.
        """
        got, entries = self.cq.poll(most)
        if got:
            return list(entries)
        while True:
            self.cq.req_notify(self._solicited)
            got, entries = self.cq.poll(most)  # what came before arming raises no event
            if got:
                return list(entries)
            if not self._poller.poll(None if timeout is None else timeout * 1000):
                return []
            try:
                self._channel.get_cq_event(self.cq)  # non-blocking: pyverbs would hold the GIL while waiting
            except Exception:  # no event after all (another thread took it, or a spurious wake-up)
                continue
            self.cq.ack_events(1)

    def close(self) -> None:
        """Close the queue, then its channel."""
        with _making:
            self.cq.close()
            self._channel.close()


_STATUS = {int(getattr(E, name)): name for name in dir(E) if name.startswith("IBV_WC_") and "ERR" in name}


def check(entry: Any, peer: str) -> None:
    """Raise VerbsError if a completion reports failure."""
    if entry.status != E.IBV_WC_SUCCESS:
        name = _STATUS.get(int(entry.status), str(entry.status))
        raise VerbsError(f"no RDMA to {peer}: {name}", "is that blade up, and its fabric link?")
