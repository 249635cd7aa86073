"""Where files that are removed while programs have them open live on until the last close, as POSIX wants.

The storage blade does not know who has what open. So such a file gets another name, in a folder that programs do not
see and that is this blade's own. What an agent that died has left there goes when the next one first needs the folder.
"""

from __future__ import annotations

import errno
import secrets
from collections.abc import Callable
from contextlib import suppress

from guest_agents.splitkernel.storage import wire
from guest_agents.splitkernel.storage.wire import Op

NAME = wire.ATTIC
"""In the root of what is mounted; refused as a name there, and in no listing."""


class Attic:
    """The folder of one mount.

    ask -- asks the storage blade, as Vnode does; top -- the mounted subtree; client -- whose folder it is
    """

    def __init__(self, ask: Callable[..., bytes], top: str, client: str) -> None:
        self._ask = ask
        self._folders = [f"{top}/{NAME}".lstrip("/"), f"{top}/{NAME}/{client}".lstrip("/")]
        self._ready = False

    def move(self, path: str) -> str:
        """Move a file there; returns its new path."""
        return self._put(Op.RENAME, path, 0)

    def link(self, path: str, identity: int) -> str:
        """Give a file a second name there, which outlives the first; returns it."""
        return self._put(Op.LINK, path, identity)

    def remove(self, path: str) -> None:
        """The last close: the file goes for good."""
        self._ask(Op.UNLINK, path)

    def _put(self, op: Op, path: str, identity: int) -> str:
        self._prepare()
        target = f"{self._folders[-1]}/{secrets.token_hex(8)}"
        self._ask(op, path, target, identity=identity)
        return target

    def _prepare(self) -> None:
        if self._ready:
            return
        for folder in self._folders:
            try:
                self._ask(Op.MKDIR, folder, a=0o700)
            except OSError as failure:
                if failure.errno != errno.EEXIST:
                    raise
        last = self._folders[-1]
        while left := wire.unpack_entries(self._ask(Op.READDIR, last)):
            for _, _, name in left:
                with suppress(FileNotFoundError):
                    self._ask(Op.UNLINK, f"{last}/{name.decode()}")
        self._ready = True
