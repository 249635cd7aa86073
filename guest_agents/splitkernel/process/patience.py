"""Asking a storage blade that may be away for a while: its agent restarts, or its link is down.

Programs wait meanwhile, and go on where they were: the service knows nothing of them that it could forget. After
`PATIENCE` seconds they get EIO, and until the blade is back every further request gets it at once, but for one a
second that tries.

A request whose answer was lost may have been carried out. Most can be repeated without harm. Of the others, what was
there and is gone by the second time was removed or renamed by the first; what cannot be told (O_EXCL, an append) is
EIO, never a guess.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from guest_agents.splitkernel.storage import wire
from guest_agents.splitkernel.storage.wire import Op
from guest_agents.verbs.lost import Caller, LostError

log = logging.getLogger("rackless.vnode")

PATIENCE = 60.0
"""Seconds from the first failure: a storage blade without KVM is back after less, agent or whole."""
PAUSE = 0.25
PROBE = 1.0
_ONLY_ONCE = {Op.CREATE, Op.MKDIR, Op.SYMLINK, Op.LINK}
_GONE_MEANS_DONE = {Op.UNLINK, Op.RMDIR, Op.RENAME}


class Patient:
    """A caller of the file service that does not give up at once; any number of threads may call."""

    def __init__(self, storage: Caller, seconds: float = PATIENCE) -> None:
        self._storage = storage
        self._seconds = seconds
        self._turn = threading.Lock()
        self._since: float | None = None
        self._tried = 0.0

    def call(
        self,
        op: Op,
        request: bytes,
        data: bytes | memoryview = b"",
        into: Callable[..., Any] | None = None,
        flags: int = 0,
    ) -> Any:
        """As Caller.call. flags -- those in the request: appends and exchanges must not happen twice."""
        once = (op is Op.WRITE and flags & os.O_APPEND) or (op is Op.RENAME and flags & wire.RENAME_EXCHANGE)
        unsure = False
        while True:
            try:
                return self._attempt(op, request, data, into)
            except LostError as lost:
                unsure = unsure or lost.sent
                if unsure and once:
                    raise
                time.sleep(PAUSE)
            except OSError as answer:
                if unsure and op in _GONE_MEANS_DONE and answer.errno == errno.ENOENT:
                    return None
                if unsure and op in _ONLY_ONCE and answer.errno == errno.EEXIST:
                    raise OSError(errno.EIO, "whether it was done before the blade went away cannot be told") from None
                raise

    def _attempt(self, op: Op, request: bytes, data: bytes | memoryview, into: Callable[..., Any] | None) -> Any:
        if self._since is None:
            return self._ask(op, request, data, into)
        with self._turn:  # one at a time finds out whether it is back: each may take seconds
            since = self._since
            now = time.monotonic()
            if since is not None and now - since > self._seconds and now - self._tried < PROBE:
                raise OSError(errno.EIO, "the storage blade does not answer")
            self._tried = now
            return self._ask(op, request, data, into)

    def _ask(self, op: Op, request: bytes, data: bytes | memoryview, into: Callable[..., Any] | None) -> Any:
        try:
            result = self._storage.call(op, request, data, into)
        except LostError as lost:
            now = time.monotonic()
            if self._since is None:
                self._since = now
                log.warning("no storage blade: %s", lost)
            if now - self._since > self._seconds:
                self._tried = now
                raise OSError(errno.EIO, "the storage blade does not answer") from lost
            raise
        except OSError:
            self._back()
            raise
        self._back()
        return result

    def _back(self) -> None:
        if self._since is not None:
            log.info("the storage blade is back after %.1f s", time.monotonic() - self._since)
            self._since = None
