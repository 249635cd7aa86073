"""Remote memory for programs: connections to the memory blades, and regions spread over them.

The global memory manager says where a region goes. While it is away, and when it knows a blade to have room that has
none, the next blade in turn gets it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from guest_agents import control
from guest_agents.verbs.connection import Address, address_of

log = logging.getLogger("rackless.process")


Place = Callable[[list[str], int], list[str]]
"""(blades, bytes) -> the blades for a region of that size, best first; none if nobody can tell."""


@dataclass(frozen=True)
class Granted:
    """A region: which of the loan's blades it is on, and where."""

    blade: int
    address: int
    rkey: int


class Lender:
    """Keeps one control connection to each memory blade, for all programs.

    peers -- the memory blades now in the rack: name -> management address
    introduction -- what a memory blade is told of this one: its life, so that all goes back when it is over
    """

    def __init__(
        self,
        name: str,
        secret: bytes,
        peers: Callable[[], dict[str, str]],
        port: int,
        introduction: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self._name = name
        self.introduction = introduction
        self._secret = secret
        self._peers = peers
        self._port = port
        self._clients: dict[str, control.ControlClient] = {}
        self._lock = threading.Lock()

    def open(self, pid: int, among: Collection[str] | None = None, place: Place = lambda _blades, _size: []) -> Loan:
        """A loan for the program `pid`, on the blades there are now, of `among` if that is given."""
        return Loan(self, pid, sorted(name for name in self._peers() if among is None or name in among), place)

    def call(self, blade: str, op: str, **fields: Any) -> control.Message:
        """A request to a memory blade, over a connection that is made again once if it has broken."""
        with self._lock:
            client = self._clients.get(blade)
            if client is None:
                address = self._peers().get(blade)
                if address is None:
                    raise control.ControlError(f"memory blade {blade} is not in the rack any more", None)
                client = self._clients[blade] = control.ControlClient((address, self._port), self._secret)
        try:
            return client.call(op, **fields)
        except control.ControlError as failure:
            if isinstance(failure.__cause__, OSError | EOFError):
                with self._lock:
                    self._clients.pop(blade, None)
            raise

    @property
    def client_name(self) -> str:
        """How this blade names itself to memory blades."""
        return self._name


class Loan:
    """What one program holds."""

    def __init__(self, lender: Lender, pid: int, blades: list[str], place: Place) -> None:
        self._lender = lender
        self._pid = pid
        self._place = place
        self.blades = blades
        self._connections: dict[str, int] = {}
        self._next = pid % len(blades) if blades else 0  # so that small programs do not all start on the first

    def connect(self, blade: str, qpn: int, psn: int, gid: str) -> Address:
        """Connect the program's queue pair to `blade`; returns the other end."""
        reply = self._lender.call(
            blade, "verbs.accept", service="memory", client=self._lender.client_name, qpn=qpn, psn=psn, gid=gid,
            **self._lender.introduction(),
        )
        self._connections[blade] = reply["connection"]
        return address_of(reply)

    def region(self, size: int) -> Granted | None:
        """A region on the first blade in the order of choice that has room; None if none has."""
        for blade in self._order(size):
            try:
                reply = self._lender.call(
                    blade, "memory.allocate", connection=self._connections[blade], pid=self._pid, size=size
                )
            except control.ControlError as failure:
                log.warning("%s gives no region: %s", blade, failure.error)
                continue
            return Granted(self.blades.index(blade), reply["addr"], reply["rkey"])
        return None

    def _order(self, size: int) -> list[str]:
        """The manager's choice, then the others in turn."""
        in_turn = self.blades[self._next :] + self.blades[: self._next]
        self._next = (self._next + 1) % len(self.blades) if self.blades else 0
        chosen = [blade for blade in self._place(self.blades, size) if blade in self.blades]
        return list(dict.fromkeys([*chosen, *in_turn]))

    def close(self) -> None:
        """Give everything back."""
        for blade, connection in self._connections.items():
            with suppress(control.ControlError):  # that blade has gone, and its books with it
                self._lender.call(blade, "verbs.release", connection=connection)
