"""Memory that the host takes back from a running blade, and returns: the blade's part of it.

The host's balloon (virtio) moves the pages; its driver is loaded when it is first needed.
"""

from __future__ import annotations

import subprocess

from guest_agents import control
from guest_agents.budget import Budget, free_memory
from guest_agents.pressure import KEPT


def resize(before: int, after: int, budget: Budget | None, dry: bool = False) -> None:
    """Make ready for having `after` bytes in place of `before`; with `dry` only see whether that can be.

    budget -- what a memory blade gives to others, None on other blades: it shrinks now, before the memory goes, and
    grows when this is called after more memory has come. ControlError when so much is in use.
    """
    less = before - after
    if less > 0:
        free = max(free_memory() - KEPT, 0)
        room = free if budget is None else min(free, budget.room)
        if less > room or (budget is not None and not dry and not budget.grow(-less)):
            raise control.ControlError(f"all but {room >> 20} MiB of its memory are in use", "shrink it by less")
    elif budget is not None and not dry:
        budget.grow(-less)
    if not dry:
        subprocess.run(["modprobe", "virtio_balloon"], check=True)
