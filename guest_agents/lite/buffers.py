"""Registered memory: what lies in it is read and written by RDMA without being copied."""

from __future__ import annotations

import mmap
import os
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from guest_agents.lite.node import Node


class Buffer:
    """Memory that this process and its blade's agent share; get one from `Node.buffer`.

    Any part of `view` (also as a numpy array on it) may be given to reads and writes; those over 8 KiB are zero-copy.
    """

    def __init__(self, node: Node, number: int, descriptor: int, size: int) -> None:
        """Map the agent's file `descriptor` (which is closed) of `size` bytes, registered as `number`."""
        from guest_agents.lite.memory import Pinned

        self._node = node
        self.size = size
        try:
            self._map = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
        self.view = memoryview(self._map)
        pin = Pinned(self._map, writable=True)
        self._region = (pin.address, pin.address + size, number)
        pin.release()
        node.regions.append(self._region)

    def close(self) -> None:
        """Give the registered memory back. Views of it that are still about keep their (now ordinary) memory."""
        if self._region in self._node.regions:
            self._node.regions.remove(self._region)
            self._node.call_agent("buffer_drop", id=self._region[2])
            with suppress(BufferError):  # there are views of the view
                self.view.release()

    def __len__(self) -> int:
        return self.size

    def __enter__(self) -> Buffer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
