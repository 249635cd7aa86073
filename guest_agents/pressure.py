"""Memory pressure on demand: the agent takes memory of its own blade, and gives it back."""

from __future__ import annotations

import mmap

from guest_agents import control
from guest_agents.budget import free_memory

KEPT = 24 << 20
"""Bytes that stay free, or the kernel would end a process: most likely the agent, who could not undo it then."""

_taken: list[mmap.mmap] = []


def take(size: int) -> None:
    """Hold exactly `size` bytes, 0 for none. Raises ControlError when there are not so many."""
    while _taken:
        _taken.pop().close()
    if not size:
        return
    free = free_memory() - KEPT
    if size > free:
        raise control.ControlError(f"there are only {max(free, 0) >> 20} MiB that can be taken", "take less")
    # Blades have no swap: a page that was touched stays.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    _taken.append(mmap.mmap(-1, size, flags=flags))
