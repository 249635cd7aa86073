"""The way of data between a processor and a storage blade: through the buffer cache of a memory blade, if one lives.

Which one is computed from who lives, alike on all processor blades (managers/storage.py). When it does not answer, data
goes to the storage blade directly for some seconds: what the memory blade keeps meanwhile is of an older version.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from guest_agents.splitkernel.opcodes import BUFFERED, Tally, storage_name
from guest_agents.splitkernel.storage import wire
from guest_agents.splitkernel.storage.wire import Op
from guest_agents.verbs.lost import Caller, LostError

REST_SECONDS = 5.0
_LOST = {errno.ECOMM: True, wire.NOT_NOW: False}
"""What a memory blade says when the storage blade is silent (memory/buffers.py): whether that had the request. A
storage blade whose files are moving says the second itself."""
log = logging.getLogger("rackless.vnode")


class Buffered:
    """A caller of a storage blade's file service, which sends READs and WRITEs of files by a memory blade.

    storage -- asks the storage blade itself
    home -- (path) -> the names of the storage blade and of the memory blade with the buffers of that file; None if
            there are none
    memory -- asks the buffer cache of that memory blade
    """

    def __init__(
        self, storage: Caller, home: Callable[[str], tuple[str, str] | None], memory: Callable[[str], Caller]
    ) -> None:
        self._storage = storage
        self._home = home
        self._memory = memory
        self._callers: dict[str, Caller] = {}
        self._resting: dict[str, float] = {}
        self._lock = threading.Lock()
        self.tally = Tally()
        self.counts = {"buffer_hits": 0, "buffer_misses": 0}

    def call(
        self, opcode: int, first: bytes, second: bytes | memoryview = b"", into: Callable[..., Any] | None = None
    ) -> Any:
        """As Caller.call. A READ's second part is the version that is known; its reply begins with the version that
        the storage blade has now, if it was asked."""
        if opcode not in (Op.READ, Op.WRITE):
            return self._directly(opcode, first, second, into)
        op, request = Op(opcode), wire.decode(first)
        home = self._home(request.path) if request.identity else None
        if home is not None and self._resting.get(home[1], 0.0) <= time.monotonic():
            storage, memory = home
            addressed = wire.encode(request.path, storage, *request[1:5], request.identity)
            try:
                self.tally.add(BUFFERED[op])
                return self._caller(memory).call(op, addressed, second, self._counting(op, into))
            except LostError as lost:
                log.warning("%s keeps no buffers for now: %s", memory, lost)
                self._resting[memory] = time.monotonic() + REST_SECONDS
                if lost.sent and op is Op.WRITE and request.flags & os.O_APPEND:
                    raise
            except OSError as answer:
                if answer.errno in _LOST:
                    raise LostError(f"{storage} does not answer {memory}", _LOST[answer.errno]) from answer
                raise
        self.tally.add(storage_name(op))
        return self._directly(op, first, second if op is Op.WRITE else b"", into)

    def _directly(
        self, opcode: int, first: bytes, second: bytes | memoryview, into: Callable[..., Any] | None
    ) -> Any:
        try:
            return self._storage.call(opcode, first, second, into)
        except LostError:
            raise
        except OSError as answer:
            if answer.errno == wire.NOT_NOW:
                raise LostError("the files are moving to another storage blade", sent=False) from answer
            raise

    def _caller(self, memory: str) -> Caller:
        with self._lock:
            if memory not in self._callers:
                self._callers[memory] = self._memory(memory)
            return self._callers[memory]

    def _counting(self, op: Op, into: Callable[..., Any] | None) -> Callable[..., Any] | None:
        if op is Op.WRITE:
            return into

        def take(first: memoryview, data: memoryview) -> Any:
            (asked,) = wire.COUNT.unpack_from(first, wire.VERSION_BYTES)
            with self._lock:
                self.counts["buffer_misses" if asked else "buffer_hits"] += 1
            return into(first[: wire.VERSION_BYTES if asked else 0], data) if into else None

        return take
