"""What a storage blade does when files leave it, or come to it: the host asks for copies, the manager for the end.

Both ends of a move ask the manager what has become of it until they know, also after a restart: `managers.moved`.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from guest_agents.control import ControlError, Handler, Message
from guest_agents.lite.errors import LiteError
from guest_agents.splitkernel.storage import arrival, wire
from guest_agents.splitkernel.storage.arrival import OWN, Arrival
from guest_agents.splitkernel.storage.hold import Hold
from guest_agents.verbs.lost import Caller

IDLE_SECONDS = 120.0
"""What nobody goes on fetching for so long is dropped: whoever asked for it is gone."""
_ASK_SECONDS = 10.0
_POLL_SECONDS = 0.25
_AGAIN_SECONDS = 10.0

log = logging.getLogger("rackless.storage")
Ask = Callable[..., Message]


class Moving:
    """Both ends of moves on one storage blade.

    root -- the directory with the files; `hold` is on its file service
    ask -- (op, seconds, fields): a request to the managers, as holder.ask
    caller -- asks the file service of another storage blade, even if that is held
    """

    def __init__(self, root: Path, hold: Hold, ask: Ask, caller: Callable[[str], Caller]) -> None:
        self._root = root
        self._hold = hold
        self._ask = ask
        self._caller = caller
        self._arrival: Arrival | None = None
        self._source = ""
        self._touched = 0.0
        self._lock = threading.Lock()

    def handlers(self) -> dict[str, Handler]:
        """For the agent's control server."""
        return {"storage.content": self.content, "storage.hold": self.hold, "storage.fetch": self.fetch,
                "storage.publish": self.publish}  # fmt: skip

    def start(self) -> None:
        """Find out, in threads of their own, what has become of moves that an agent before this one was part of."""
        if self._hold.token is not None:
            self._settle(self._decide_hold)
        for stage in arrival.stages(self._root):
            token = arrival.published(stage)
            if token is None:
                arrival.forget(stage)
            else:
                self._settle(partial(self._decide_stage, stage, token))

    def content(self, _request: Message) -> Message:
        """storage.content: the names in the root, and bytes and files that all of it takes; none once it has left."""
        disk = os.statvfs(self._root)
        names = [] if self._left() else [name for name in os.listdir(self._root) if name not in OWN]
        removed = self._root / wire.ATTIC
        if not any(entry.is_file() for entry in removed.glob("[!.]*/*")):
            names = [name for name in names if name != wire.ATTIC]
        return {"names": sorted(names), "free": disk.f_bavail * disk.f_frsize, "free_files": disk.f_favail,
                "bytes": (disk.f_blocks - disk.f_bfree) * disk.f_frsize if names else 0,
                "files": disk.f_files - disk.f_ffree if names else 0}  # fmt: skip

    def hold(self, request: Message) -> Message:
        """storage.hold: answer no requests until the manager says what has become of the move `token`."""
        try:
            self._hold.hold(str(request["token"]))
        except OSError as failure:
            raise _error(failure) from failure
        self._settle(self._decide_hold)
        return {}

    def fetch(self, request: Message) -> Message:
        """storage.fetch: go on copying the files of the blade `source` for some `seconds`; `ready` when it is time to
        publish. With `cancel` drop what has come. ControlError when it does not work: then it is dropped too."""
        source = str(request["source"])
        with self._lock:
            if request.get("cancel"):
                self._drop()
                return {}
            try:
                if self._arrival is None or self._source != source:
                    self._drop()
                    if arrival.stages(self._root):
                        raise ControlError("an earlier move is not over yet", "try again in some seconds")
                    self._arrival, self._source = Arrival(self._root, source, self._caller(source)), source
                    self._touched = time.monotonic()
                    self._settle(self._decide_idle)
                ready = self._arrival.fetch(float(request["seconds"]))
                self._touched = time.monotonic()
            except OSError as failure:
                self._drop()
                raise _error(failure) from failure
            return {"ready": ready, "copied": self._arrival.copied}

    def publish(self, request: Message) -> Message:
        """storage.publish: bring what is left of the blade `source`, which is held, within some `seconds`."""
        with self._lock:
            made, self._arrival = self._arrival, None
            if made is None or self._source != request["source"]:
                raise ControlError(f"nothing of {request['source']} has come here", "remove it again")
            token = str(request["token"])
            try:
                made.publish(token, float(request["seconds"]))
            except OSError as failure:
                arrival.withdraw(made.stage)
                raise _error(failure) from failure
        self._settle(lambda: self._decide_stage(made.stage, token))
        return {}

    def _left(self) -> bool:
        """Whether the files are elsewhere now: what is here are copies that nobody uses."""
        token = self._hold.token
        return token is not None and bool(self._ask("managers.moved", _ASK_SECONDS, token=token).get("moved"))

    def _drop(self) -> None:
        if self._arrival is not None:
            arrival.forget(self._arrival.stage)
            self._arrival = None

    # Deciding: each is asked again until it says True

    def _settle(self, decide: Callable[[], bool]) -> None:
        def run() -> None:
            while True:
                try:
                    if decide():
                        return
                except LiteError:  # the manager is away
                    pass
                except OSError:
                    log.exception("a move of files is not settled yet")
                    time.sleep(_AGAIN_SECONDS)
                time.sleep(_POLL_SECONDS)

        threading.Thread(target=run, name="move", daemon=True).start()

    def _decide_hold(self) -> bool:
        if self._hold.token is None:
            return True
        told = self._ask("managers.moved", _ASK_SECONDS, token=self._hold.token)
        if told["pending"]:
            return False
        if told["moved"] and told["leaving"]:
            return False  # it is about to be removed
        if told["moved"]:
            log.warning("the files have moved away, and this blade stays")
            for path in [*self._root.iterdir(), *(self._root / wire.ATTIC).glob("[!.]*")]:
                if path.name not in OWN and path.name != wire.ATTIC:
                    _remove(path)
        self._hold.release()
        return True

    def _decide_stage(self, stage: Path, token: str) -> bool:
        told = self._ask("managers.moved", _ASK_SECONDS, token=token)
        if told["pending"]:
            return False
        (arrival.forget if told["moved"] else arrival.withdraw)(stage)
        return True

    def _decide_idle(self) -> bool:
        with self._lock:
            if self._arrival is not None and time.monotonic() - self._touched > IDLE_SECONDS:
                self._drop()
            return self._arrival is None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _error(failure: OSError) -> ControlError:
    where = f": {os.fsdecode(failure.filename)}" if failure.filename else ""
    return ControlError(f"{failure.strerror or failure}{where}", "the files are where they were")
