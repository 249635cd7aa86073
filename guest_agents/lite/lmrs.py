"""The LMRs that programs of this node have mapped, as the directory tells of them.

The directory's changes (put, freeze, thaw, kill) come one at a time for each LMR. A freeze holds up the core's requests
and this tier's own copies alike.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from guest_agents.control import Handler, Message
from guest_agents.lite.errors import Freed, LiteError, TimedOut
from guest_agents.lite.records import Record
from guest_agents.membership import Life

LOST = 0
"""The node of a block that is gone with its node: operations on it get NODE_DEAD."""
FREEZE_SECONDS = 30.0
CoreBlock = tuple[int, int, int, int]


class Tables(Protocol):
    """What of the core this needs."""

    def lmr_put(self, lmr: int, blocks: list[CoreBlock]) -> None: ...

    def lmr_freeze(self, lmr: int, timeout: float) -> None: ...

    def lmr_replace(self, lmr: int, blocks: list[CoreBlock]) -> None: ...

    def lmr_thaw(self, lmr: int) -> None: ...

    def lmr_kill(self, lmr: int, code: int) -> None: ...


@dataclass
class _Local:
    number: int
    """Its id in the core: an LMR that this node lost and maps again is another one there."""
    record: Record
    blocks: list[CoreBlock]
    frozen: bool = False
    gone: bool = False
    busy: int = 0
    """Copies of this tier that use it now."""
    change: threading.Lock = field(default_factory=threading.Lock)


class Lmrs:
    """All of them.

    is_over -- whether a life has ended
    reach -- connects to a node if that is not done yet; never fails
    """

    def __init__(self, core: Tables, is_over: Callable[[Life], bool], reach: Callable[[Life], None]) -> None:
        self._core = core
        self._is_over = is_over
        self._reach = reach
        self._lmrs: dict[int, _Local] = {}
        self._numbers = itertools.count(1)
        self._changed = threading.Condition()

    def handlers(self) -> dict[str, Handler]:
        """Control operations of the directory."""
        return {"lite.lmr.put": self.put, "lite.lmr.freeze": self.freeze, "lite.lmr.thaw": self.thaw,
                "lite.lmr.kill": self.kill}  # fmt: skip

    def put(self, request: Message) -> Message:
        """An LMR that somebody here maps, or a newer state of it (if its blocks changed it is frozen)."""
        record = Record.from_json(request["record"])
        for host in record.hosts():
            self._reach(host)
        with self._changed:
            local = self._lmrs.get(record.lmr)
            if local is None:
                local = self._lmrs[record.lmr] = _Local(next(self._numbers), record, self._core_blocks(record))
                self._core.lmr_put(local.number, local.blocks)
        with local.change:
            if record.version > local.record.version:
                local.record = record
                self._replace(local)
        return {}

    def freeze(self, request: Message) -> Message:
        """Hold up all use of it; answers when nothing is in flight any more."""
        local = self._lmrs.get(request["lmr"])
        if local is None:
            return {}
        with local.change:
            with self._changed:
                local.frozen = True
                idle = self._changed.wait_for(lambda: not local.busy, FREEZE_SECONDS)
            try:
                if not idle:
                    raise TimedOut("a copy is under way")
                self._core.lmr_freeze(local.number, FREEZE_SECONDS)
            except LiteError:
                self._unfreeze(local)
                raise
        return {}

    def thaw(self, request: Message) -> Message:
        """Let it be used again."""
        local = self._lmrs.get(request["lmr"])
        if local is not None:
            with local.change:
                if local.frozen:
                    self._core.lmr_thaw(local.number)
                    self._unfreeze(local)
        return {}

    def kill(self, request: Message) -> Message:
        """It is gone, or nobody here has a handle any more; answers when nothing is in flight."""
        with self._changed:
            local = self._lmrs.get(request["lmr"])
            if local is None:
                return {}
            local.gone = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not local.busy)
        with local.change:
            self._core.lmr_kill(local.number, request["code"])
        with self._changed:
            self._lmrs.pop(request["lmr"], None)
        return {}

    def number(self, lmr: int) -> int:
        """Its id in the core. FREED if it is not here (any more)."""
        local = self._lmrs.get(lmr)
        if local is None or local.gone:
            raise Freed
        return local.number

    def kill_all(self, code: int) -> None:
        """A new life begins."""
        for lmr in list(self._lmrs):
            self.kill({"lmr": lmr, "code": code})

    def drop_lost(self) -> None:
        """Lives have ended: what was there answers NODE_DEAD, also when their nodes are back."""
        for local in list(self._lmrs.values()):
            with local.change:
                if local.gone or self._core_blocks(local.record) == local.blocks:
                    continue
                if local.frozen:
                    self._replace(local)
                else:
                    self._core.lmr_freeze(local.number, FREEZE_SECONDS)
                    self._replace(local)
                    self._core.lmr_thaw(local.number)

    @contextmanager
    def use(self, *lmrs: int, seconds: float = FREEZE_SECONDS) -> Iterator[list[Record]]:
        """The records of LMRs, which neither move nor go meanwhile. FREED, TIMED_OUT."""
        with self._changed:
            used = [self._lmrs[lmr] for lmr in lmrs if lmr in self._lmrs]
            if not self._changed.wait_for(lambda: all(local.gone or not local.frozen for local in used), seconds):
                raise TimedOut("the LMR is being moved")
            if len(used) < len(lmrs) or any(local.gone for local in used):
                raise Freed
            for local in used:
                local.busy += 1
        try:
            yield [local.record for local in used]
        finally:
            with self._changed:
                for local in used:
                    local.busy -= 1
                self._changed.notify_all()

    def records(self) -> list[Record]:
        """All that are mapped here."""
        return [local.record for local in list(self._lmrs.values())]

    def frozen(self) -> list[int]:
        """Ids of those that are being moved."""
        return [lmr for lmr, local in list(self._lmrs.items()) if local.frozen]

    def _replace(self, local: _Local) -> None:
        blocks = self._core_blocks(local.record)
        if blocks != local.blocks:
            self._core.lmr_replace(local.number, blocks)
            local.blocks = blocks

    def _unfreeze(self, local: _Local) -> None:
        with self._changed:
            local.frozen = False
            self._changed.notify_all()

    def _core_blocks(self, record: Record) -> list[CoreBlock]:
        return [(LOST if self._is_over(piece.life) else piece.node, piece.address, piece.rkey, piece.length)
                for piece in record.blocks]  # fmt: skip
