"""The files of vNodes on a processor blade: each has a folder of its name on its storage blade, shown as its /vnode.

`split run` binds that folder over /vnode in a mount namespace of the program. It is a view, not a wall: a program that
is root finds the other folders where they are mounted here.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from guest_agents import control
from guest_agents.splitkernel.managers.vnode import VNode

WHERE = Path("/run/rackless/storage")
_MOUNT_SECONDS = 10.0
_POLL_SECONDS = 0.02


class Roots:
    """Mounts the storage blades that vNodes use, each when it is first needed.

    serve -- mounts all files of a storage blade at a folder and answers until it is unmounted
    left -- (blade): how often the files of a storage blade of that name have moved away: what is mounted went with
            them, and a new blade of that name is another
    """

    def __init__(
        self, serve: Callable[[str, Path], None], where: Path = WHERE, left: Callable[[str], int] = lambda _blade: 0
    ) -> None:
        self._serve = serve
        self._left = left
        self._where = where
        self._mounted: set[str] = set()
        self._lock = threading.Lock()
        for stale in where.glob("*"):  # of an agent that was here before: nobody answers any more
            subprocess.run(["umount", "--lazy", stale], check=False, capture_output=True)

    def of(self, vnode: VNode) -> Path | None:
        """The folder with the files of `vnode`, None if it has no storage blade. ControlError if it cannot be had."""
        if vnode.storage is None:
            return None
        left = self._left(vnode.storage)
        folder = self._where / (f"{vnode.storage}.{left}" if left else vnode.storage)
        with self._lock:
            if folder.name not in self._mounted:
                self._mount(vnode.storage, folder)
                self._mounted.add(folder.name)
        root = folder / vnode.name
        try:
            root.mkdir(exist_ok=True)
        except OSError as failure:
            raise control.ControlError(
                f"no folder {vnode.name} on {vnode.storage} for the files of vNode {vnode.name}: {failure.strerror}",
                f"is {vnode.storage} up? see `rackless status`",
            ) from failure
        return root

    def _mount(self, blade: str, folder: Path) -> None:
        threading.Thread(target=self._serve, args=(blade, folder), name=f"files of {blade}", daemon=True).start()
        deadline = time.monotonic() + _MOUNT_SECONDS
        while not _is_mounted(folder):  # not asked of the folder itself: that would wait for the storage blade
            if time.monotonic() > deadline:
                raise control.ControlError(f"the files of {blade} cannot be mounted here", "see the agent's log")
            time.sleep(_POLL_SECONDS)


def _is_mounted(folder: Path) -> bool:
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split()[4] == str(folder) for line in mounts)
