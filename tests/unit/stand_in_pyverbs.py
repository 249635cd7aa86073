"""A stand-in for pyverbs, which only blades have: queue pairs, memory regions and completion queues without RDMA.

The only work that is done is a READ: of this process's own memory, where the stand-in blades have theirs.

`install` once, before the first import of guest_agents.verbs.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from guest_agents.verbs.device import Device

_numbers = itertools.count(1)


class _Thing:
    """Takes any arguments and attributes."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.qp_num = self.lkey = self.rkey = next(_numbers)
        self.fd = -1

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class _Init(_Thing):
    """Of a queue pair."""

    def __init__(self, scq: Any = None, **named: Any) -> None:
        super().__init__()
        self.scq = scq


class _Piece(_Thing):
    def __init__(self, address: int, length: int, lkey: int) -> None:
        super().__init__()
        self.address, self.length = address, length


class _Request(_Thing):
    def __init__(self, wr_id: int, sg: list[_Piece], **named: Any) -> None:
        super().__init__()
        self.wr_id, self.sg, self.remote = wr_id, sg, 0

    def set_wr_rdma(self, rkey: int, remote: int) -> None:
        self.remote = remote


class _QueuePair(_Thing):
    """Notes how far it has come, and which are open."""

    open: set[int] = set()  # noqa: RUF012

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__()
        self.open.add(self.qp_num)
        self._queue: _Queue | None = getattr(arguments[1], "scq", None) if len(arguments) > 1 else None

    def to_init(self, attributes: Any) -> None: ...
    def to_rtr(self, attributes: Any) -> None: ...
    def to_rts(self, attributes: Any) -> None: ...

    def post_send(self, request: _Request) -> None:
        piece = request.sg[0]
        ctypes.memmove(piece.address, request.remote, piece.length)
        assert self._queue is not None
        self._queue.done.append(_Done(request.wr_id))

    def close(self) -> None:
        self.open.discard(self.qp_num)


class _Channel(_Thing):
    """A completion channel on which nothing ever comes."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__()
        self.fd = os.eventfd(0)


@dataclass
class _Done:
    """A completion."""

    wr_id: int
    status: int = 0


class _Queue(_Thing):
    def __init__(self, *arguments: Any) -> None:
        super().__init__()
        self.done: list[_Done] = []

    def poll(self, most: int) -> tuple[int, list[Any]]:
        done, self.done = self.done[:most], self.done[most:]
        return len(done), done

    def req_notify(self, solicited: bool) -> None: ...


NAMES = {"addr": ("GID", "AHAttr", "GlobalRoute"), "qp": ("QPAttr", "QPCap"), "mr": ("MR",), "wr": ("RecvWR",),
         "device": ("Context",), "pd": ("PD",)}  # fmt: skip
ENUMS = ("IBV_QPT_RC", "IBV_WR_SEND", "IBV_WR_RDMA_READ", "IBV_WR_RDMA_WRITE", "IBV_SEND_SIGNALED",
         "IBV_SEND_SOLICITED", "IBV_WC_SUCCESS", "IBV_ACCESS_LOCAL_WRITE", "IBV_ACCESS_REMOTE_READ",
         "IBV_ACCESS_REMOTE_WRITE", "IBV_ACCESS_REMOTE_ATOMIC")  # fmt: skip


def install() -> None:
    """Make `import pyverbs...` find these."""
    modules: dict[str, dict[str, Any]] = {name: dict.fromkeys(things, _Thing) for name, things in NAMES.items()}
    modules["qp"] |= {"QP": _QueuePair, "QPInitAttr": _Init}
    modules["wr"] |= {"SGE": _Piece, "SendWR": _Request}
    modules["cq"] = {"CQ": _Queue, "CompChannel": _Channel}
    modules["enums"] = {name: 1 << number for number, name in enumerate(ENUMS)} | {"IBV_WC_SUCCESS": 0}
    for name, contents in modules.items():
        made = ModuleType(f"pyverbs.{name}")
        made.__dict__.update(contents)
        sys.modules.setdefault(f"pyverbs.{name}", made)
    sys.modules.setdefault("pyverbs", ModuleType("pyverbs"))


def device(address: str) -> Device:
    """A device whose GID is that of an IPv4 address."""
    from guest_agents.verbs.device import Device

    return Device(_Thing(), _Thing(), f"::ffff:{address}", 1, 5)


def open_queue_pairs() -> int:
    """How many there are in this process."""
    return len(_QueuePair.open)
