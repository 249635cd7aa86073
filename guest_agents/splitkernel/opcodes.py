"""Requests counted by opcode, under the names that LegoOS has for them (include/lego/rpc/opcode.h; legoos.md 1.2).

A name with one of LegoOS's prefixes (P2M_, M2S_, ...) is what stands in that file. What has no counterpart there is
counted under our own name: an operation of the control channel (managers.hear) or of the file service (SYMLINK).
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

from guest_agents.control import Handler, Message
from guest_agents.splitkernel.storage.wire import Op

CONTROL = {
    "memory.allocate": "P2M_MMAP",
    "memory.free": "P2M_MUNMAP",
    "managers.region": "M2MM_CONSULT",
    "managers.load": "M2MM_STATUS_REPORT",
    "vnode.create": "P2PM_REQUEST_VNODE",
    "holder.keep": "PM2P_BROADCAST_VNODE",
}
"""Operations of the control channel. Memory is asked for by regions of 4 MiB here, by calls of mmap there."""

STORAGE = {
    Op.GETATTR: "P2S_STAT",
    Op.READ: "M2S_READ",
    Op.WRITE: "M2S_WRITE",
    Op.CREATE: "P2S_OPEN",
    Op.OPEN: "P2S_OPEN",
    Op.TRUNCATE: "P2S_TRUNCATE",
    Op.RENAME: "P2S_RENAME",
    Op.UNLINK: "P2S_UNLINK",
    Op.MKDIR: "P2S_MKDIR",
    Op.RMDIR: "P2S_RMDIR",
    Op.READDIR: "P2S_GETDENTS",
    Op.STATFS: "P2S_STATFS",
    Op.READLINK: "P2S_READLINK",
    Op.SEEK: "M2S_LSEEK",
}
"""Requests of the file service; others (FSYNC, SYMLINK, ...) LegoOS's storage component does not get."""

BUFFERED = {Op.READ: "P2M_READ", Op.WRITE: "P2M_WRITE"}
"""The same, asked of a memory blade's buffer cache by a processor blade."""

MISS, FLUSH, REPLICA = "P2M_PCACHE_MISS", "P2M_PCACHE_FLUSH", "P2M_PCACHE_REPLICA"
"""What a pager sends, by RDMA READ and WRITE: no processor at the memory blade sees or counts these."""


class Tally:
    """Counts by name; thread-safe."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, name: str) -> None:
        """One more."""
        with self._lock:
            self._counts[name] += 1

    def counts(self) -> dict[str, int]:
        """What there has been so far."""
        with self._lock:
            return dict(sorted(self._counts.items()))

    def counting(self, handlers: dict[str, Handler]) -> dict[str, Handler]:
        """The handlers, which count the requests that come to them, also those that they refuse."""
        return {op: self._counted(CONTROL.get(op, op), handler) for op, handler in handlers.items()}

    def _counted(self, name: str, handler: Callable[[Message], Message]) -> Handler:
        def handle(request: Message) -> Message:
            self.add(name)
            return handler(request)

        return handle


def storage_name(opcode: int) -> str:
    """The name of a request to the file service; "unknown" for a number that it does not know."""
    try:
        op = Op(opcode)
    except ValueError:
        return "unknown"
    return STORAGE.get(op, op.name)
