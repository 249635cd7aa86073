"""One `rackless` at a time changes a rack; a second one says who is at it."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.errors import RacklessError
from orchestrator.settings import RackPaths

_POLL_SECONDS = 0.05


@contextmanager
def hold(paths: RackPaths) -> Iterator[None]:
    """Hold the rack's lock; RacklessError naming the holder when it is not free within ``lock_seconds``.

    The kernel lets go of it when the holder dies, also by kill -9.
    """
    path = _file(paths)
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + paths.settings.lock_seconds
    with path.open("a+") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    file.seek(0)
                    raise RacklessError(f"rack {paths.name} is being changed by {_holder(file.read())}",
                                        hint="wait for it to end, or stop it") from None  # fmt: skip
            time.sleep(_POLL_SECONDS)
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "command": " ".join(sys.argv), "since": time.time()}))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def held(paths: RackPaths) -> bool:
    """Is somebody, this process included, changing the rack right now?"""
    try:
        with _file(paths).open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _file(paths: RackPaths) -> Path:
    return paths.settings.state_dir / "locks" / paths.name  # not in the rack's folder, which `down` removes


def _holder(text: str) -> str:
    try:
        about = json.loads(text)
        return f"process {about['pid']} (`{about['command']}`, {time.time() - about['since']:.0f} s ago)"
    except (ValueError, KeyError, TypeError):
        return "another process"
