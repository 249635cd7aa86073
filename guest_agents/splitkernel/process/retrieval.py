"""READs of a program's memory by the process monitor, when the program itself has gone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from guest_agents.control import ControlError
from guest_agents.splitkernel.process.heirs import PAGE, RUN_PAGES
from guest_agents.verbs.arena import LOCAL, Arena
from guest_agents.verbs.completion import Completions, check
from guest_agents.verbs.connection import Connection
from guest_agents.verbs.device import Device, VerbsError

if TYPE_CHECKING:
    from guest_agents.splitkernel.process.memory import Held, Lender

SECONDS = 20.0
"""For one READ: Soft-RoCE gives up after some 7.5."""


class Retrieval:
    """Connections to the memory blades of a program (`blades`, in its order), made when they are needed.

    The program's regions must not be given back before the end; a key of a region is good for any connection.
    """

    def __init__(self, device: Device, lender: Lender, blades: Sequence[str]) -> None:
        self._device = device
        self._lender = lender
        self._blades = blades
        self._links: dict[int, tuple[Connection, Held]] = {}
        self._silent: set[int] = set()
        self._completions: Completions | None = None
        self._arena: Arena | None = None
        self._number = 0

    def __enter__(self) -> Retrieval:
        return self

    def __exit__(self, *exception: object) -> None:
        for blade in list(self._links):
            self._part(blade)
        if self._arena is not None:
            self._arena.close()
        if self._completions is not None:
            self._completions.close()

    def read(self, blade: int, address: int, rkey: int, size: int) -> bytes:
        """heirs.Read. ControlError if that blade has died or does not answer; it is not asked again then."""
        try:
            if blade in self._silent or blade >= len(self._blades):
                raise ControlError(f"memory blade {blade} of the program does not answer", None)
            return self._read(blade, address, rkey, size)
        except (VerbsError, ControlError) as failure:
            self._silent.add(blade)
            if blade in self._links:
                self._part(blade)
            raise ControlError(str(failure), None) from failure

    def _read(self, blade: int, address: int, rkey: int, size: int) -> bytes:
        if self._completions is None or self._arena is None:
            self._completions = self._completions or Completions(self._device, depth=16)
            self._arena = Arena(self._device, RUN_PAGES * PAGE, LOCAL)
        connection, held = self._links.get(blade) or self._connect(blade, self._completions)
        name = self._blades[blade]
        if held.life is None or held.life != self._lender.life(name):
            raise ControlError(f"{name} has died", None)
        self._number += 1
        connection.post_read(self._number, self._arena.address, size, self._arena.lkey, address, rkey)
        while True:
            entries = self._completions.wait(SECONDS)
            if not entries:
                raise ControlError(f"no answer from {name} in {SECONDS:g} s", None)
            mine = [entry for entry in entries if entry.wr_id == self._number]  # not of a connection that was parted
            for entry in mine:
                check(entry, name)
            if mine:
                return bytes(self._arena.view[:size])

    def _connect(self, blade: int, completions: Completions) -> tuple[Connection, Held]:
        connection = Connection(self._device, completions, depth=8)
        try:
            held, peer = self._lender.accept(self._blades[blade], connection.address)
            connection.connect(peer)
        except BaseException:
            connection.close()
            raise
        self._links[blade] = connection, held
        return self._links[blade]

    def _part(self, blade: int) -> None:
        connection, held = self._links.pop(blade)
        connection.close()
        with suppress(ControlError):  # that blade has gone
            self._lender.give_back(self._blades[blade], held)
