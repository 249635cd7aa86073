"""A storage blade whose files move away keeps still at the end of that, for seconds, and then for good.

Whoever asks meanwhile is told NOT_NOW, and asks again where the ledger says (process/following.py). Whether it goes on
after all, the manager says, and nobody else: so the hold is kept in a file, which an agent or a blade that is started
anew finds.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from guest_agents.splitkernel.storage import wire

NAME = ".held"
"""The file, in the folder of what is removed, which programs do not see; in it is the token of the move."""

STILL_SECONDS = 10.0


class Hold:
    """Lets requests pass, or not.

    root -- the directory with the files
    """

    def __init__(self, root: Path) -> None:
        self._file = root / wire.ATTIC / NAME
        self._change = threading.Condition()
        self._inside = 0
        self.token = self._file.read_text() if self._file.exists() else None
        """Of the move for which it is held."""

    @contextmanager
    def passing(self) -> Iterator[None]:
        """A request is answered; OSError(NOT_NOW) while it is held."""
        with self._change:
            if self.token is not None:
                raise OSError(wire.NOT_NOW, "the files are moving")
            self._inside += 1
        try:
            yield
        finally:
            with self._change:
                self._inside -= 1
                self._change.notify_all()

    def hold(self, token: str) -> None:
        """Answer no request any more; returns when the last one is answered.

        OSError(EBUSY) if it is held already, or when requests do not come to an end: then it is not held.
        """
        with self._change:
            if self.token not in (None, token):
                raise OSError(errno.EBUSY, "another move is not over yet")
            write(self._file, token)
            self.token = token
            still = self._change.wait_for(lambda: not self._inside, STILL_SECONDS)
        if not still:
            self.release()
            raise OSError(errno.EBUSY, "requests do not come to an end")

    def release(self) -> None:
        """Answer requests again."""
        with self._change:
            self._file.unlink(missing_ok=True)
            self.token = None


def write(file: Path, text: str) -> None:
    """Write a small file that is there, whole, after a power cut."""
    file.parent.mkdir(mode=0o700, exist_ok=True)
    part = file.with_name(f"{file.name}.part")
    with part.open("w") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    part.replace(file)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
