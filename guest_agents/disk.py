"""The data disk of a storage blade: an ext4 file system, which the host made, on the disk it plugs in.

Between the two is a device of the kernel's mapper, so that the disk can be made slow or fail while it is used.
"""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from guest_agents import mapper

DEVICE = Path("/dev/vdc")
MAPPED = "vnode"
ROOT = Path("/srv/vnode")
SHORTCUT = Path("/vnode")
_PLUG_SECONDS = 60.0
_FSCK_MENDED = 3
"""Highest exit code of e2fsck that leaves a file system without errors."""
_FLAKEY = {"reads": "0 1 1 error_reads", "writes": "0 1 1 error_writes", "all": "0 1"}
"""dm-flakey: up for 0 s and down for 1 s, again and again, is always down; what a disk that is down refuses."""
_fillers: list[int] = []

log = logging.getLogger("rackless.disk")


def mount() -> None:
    """Mount the disk at ROOT, with /vnode leading there too. Safe to repeat; TimeoutError without a disk."""
    deadline = time.monotonic() + _PLUG_SECONDS
    while not DEVICE.exists():
        if time.monotonic() > deadline:
            raise TimeoutError("the data disk was not plugged in")
        time.sleep(0.05)
    ROOT.mkdir(parents=True, exist_ok=True)
    if not os.path.ismount(ROOT):
        mapped = mapper.device(MAPPED, DEVICE)
        # At once for one that is whole; one that had errors would go on with them.
        checked = subprocess.run(["e2fsck", "-p", mapped], capture_output=True, text=True, check=False)
        if checked.returncode > _FSCK_MENDED:
            log.error("the data disk has errors: %s", " ".join(checked.stdout.split()))
        subprocess.run(["mount", "-t", "ext4", "-o", "noatime", mapped, ROOT], check=True)
    if not SHORTCUT.is_symlink():
        SHORTCUT.rmdir()
        SHORTCUT.symlink_to(ROOT)


def break_as(faults: dict[str, Any]) -> None:
    """Have exactly these faults: `latency` (s) of each operation, `errors` ("reads", "writes", "all"), `full`.

    Without any, a disk that was slow or full is as before; a file system whose disk failed is not, until it is
    mounted again. OSError when it cannot be done.
    """
    if faults.get("errors"):
        mapper.switch(MAPPED, DEVICE, "flakey", f"0 {_FLAKEY[faults['errors']]}")
        Path("/proc/sys/vm/drop_caches").write_text("3")  # what is in memory would be read from there
    elif faults.get("latency"):
        mapper.switch(MAPPED, DEVICE, "delay", f"0 {max(1, round(faults['latency'] * 1000))}")
    else:
        mapper.switch(MAPPED, DEVICE, "linear", "0")
    fill(ROOT, bool(faults.get("full")))


def fill(folder: Path, full: bool) -> None:
    """Take all room there is in the file system of `folder`, or give it back.

    The file has no name: nobody sees it, and it goes with this process.
    """
    while _fillers:
        os.close(_fillers.pop())
    if not full:
        return
    _fillers.append(os.open(folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    size, step = 0, 1 << 30
    while step >= os.fstatvfs(_fillers[0]).f_bsize:
        try:
            os.posix_fallocate(_fillers[0], size, step)
            size += step
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            step //= 2
