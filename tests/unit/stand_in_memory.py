"""Memory blades without RDMA: the real memory monitor and control channel, over a device that does nothing."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from guest_agents import control
from guest_agents.budget import Budget
from guest_agents.extents import Extents
from tests.unit import stand_in_pyverbs

stand_in_pyverbs.install()

from guest_agents.splitkernel.memory import monitor  # noqa: E402
from guest_agents.splitkernel.process.memory import Lender  # noqa: E402
from guest_agents.verbs.node import Accepted  # noqa: E402

SECRET = b"a secret of the test"
GID = "::ffff:10.77.0.2"


class Slab:
    """In place of a registered arena."""

    numbers = itertools.count(1)

    def __init__(self, device: Any, size: int) -> None:
        del device
        self.size = size
        self.rkey = next(self.numbers)
        self.address = self.rkey << 32
        self.extents = Extents(size)

    def close(self) -> None:
        """Nothing was registered."""


class StandInNode:
    """The part of `verbs.node.Node` that memory monitors use, with queue pairs that are only numbers."""

    def __init__(self) -> None:
        self.device: Any = None
        self.services: dict[str, Any] = {}
        self._accepted: dict[int, Accepted] = {}
        self._numbers = itertools.count(1)

    def accept(self, request: control.Message) -> control.Message:
        """verbs.accept"""
        accepted = Accepted(next(self._numbers), request["service"], request["client"], _Idle())  # type: ignore[arg-type]
        self.services[accepted.service](accepted, self.device)
        self._accepted[accepted.number] = accepted
        caller = control.current_peer()
        assert caller is not None
        caller.on_close(lambda: self._close(accepted.number))
        return {"qpn": accepted.number, "psn": 7, "gid": GID, "connection": accepted.number}

    def release(self, request: control.Message) -> control.Message:
        """verbs.release"""
        self._close(int(request["connection"]))
        return {}

    def accepted(self, number: int) -> Accepted:
        """A connection."""
        if number not in self._accepted:
            raise control.ControlError(f"no connection {number}", None)
        return self._accepted[number]

    def _close(self, number: int) -> None:
        accepted = self._accepted.pop(number, None)
        if accepted is not None:
            accepted.close()


class _Idle:
    def close(self) -> None:
        pass


@dataclass
class Blades:
    """Memory blades by name, and the lender of a processor blade that knows them."""

    lender: Lender
    monitors: dict[str, monitor.MemoryMonitor] = field(default_factory=dict)
    handlers: dict[str, dict[str, control.Handler]] = field(default_factory=dict)
    lives: dict[str, int] = field(default_factory=dict)

    def books(self) -> dict[str, dict[str, int]]:
        """What each has lent: regions, bytes, connections; those that have lent something."""
        asked = {"requests", "refused"}  # of this there is ever more
        found = {name: {key: value for key, value in blade.stats({}).items() if key not in asked}
                 for name, blade in self.monitors.items()}  # fmt: skip
        return {name: held for name, held in found.items()
                if held["regions"] or held["bytes_registered"] or held["connections"]}  # fmt: skip

    def tell(self) -> None:
        """Membership has news."""
        self.lender.members(dict(self.lives))


@contextmanager
def memory_blades(*names: str, size: int = 256 << 20) -> Iterator[Blades]:
    """Blades that lend `size` bytes each."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    addresses: dict[str, str] = {}
    made = Blades(Lender("pb0", SECRET, lambda: {name: addresses[name] for name in made.lives}, port))
    with patch.object(monitor, "Arena", Slab), ExitStack() as stack:
        for name in names:
            node = StandInNode()
            made.monitors[name] = blade = monitor.MemoryMonitor(node, Budget(size))  # type: ignore[arg-type]
            made.handlers[name] = {**blade.handlers(), "verbs.accept": node.accept, "verbs.release": node.release}
            addresses[name] = f"127.0.0.{2 + len(addresses)}"  # with one port, as in a rack
            stack.enter_context(control.Server((addresses[name], port), SECRET, made.handlers[name]).start())
            made.lives[name] = 1
        made.tell()
        yield made
