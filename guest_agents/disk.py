"""The data disk of a storage blade: an ext4 file system, which the host made, on the disk it plugs in."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

DEVICE = Path("/dev/vdc")
ROOT = Path("/srv/vnode")
SHORTCUT = Path("/vnode")
_PLUG_SECONDS = 60.0


def mount() -> None:
    """Mount the disk at ROOT, with /vnode leading there too. Safe to repeat; TimeoutError without a disk."""
    deadline = time.monotonic() + _PLUG_SECONDS
    while not DEVICE.exists():
        if time.monotonic() > deadline:
            raise TimeoutError("the data disk was not plugged in")
        time.sleep(0.05)
    ROOT.mkdir(parents=True, exist_ok=True)
    if not os.path.ismount(ROOT):
        subprocess.run(["mount", "-t", "ext4", "-o", "noatime", str(DEVICE), str(ROOT)], check=True)
    if not SHORTCUT.is_symlink():
        SHORTCUT.rmdir()
        SHORTCUT.symlink_to(ROOT)
