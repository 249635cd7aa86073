"""Remote memory for programs: connections to the memory blades, and regions spread over them.

The global memory manager says where a region goes. While it is away, and when it knows a blade to have room that has
none, the next blade in turn gets it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from guest_agents import control
from guest_agents.splitkernel.process.retrieval import Retrieval
from guest_agents.verbs.connection import Address, address_of
from guest_agents.verbs.device import Device

log = logging.getLogger("rackless.process")


Place = Callable[[list[str], int, int], list[str]]
"""(blades, bytes, copies) -> the blades for so many copies of a region of that size, best first; none if nobody can
tell."""


@dataclass(frozen=True)
class Granted:
    """A region: which of the loan's blades it is on, and where."""

    blade: int
    address: int
    rkey: int
    number: int
    """How the memory blade knows it."""


@dataclass(frozen=True)
class Held:
    """A connection to a memory blade, in one of the blade's lives (None: it died meanwhile)."""

    number: int
    life: int | None


class Lender:
    """Keeps one control connection to each memory blade, for all programs.

    peers -- the memory blades now in the rack: name -> management address
    introduction -- what a memory blade is told of this one: its life, so that all goes back when it is over
    device -- this blade's, for `retrieval`
    """

    def __init__(
        self,
        name: str,
        secret: bytes,
        peers: Callable[[], dict[str, str]],
        port: int,
        introduction: Callable[[], dict[str, Any]] = dict,
        device: Device | None = None,
    ) -> None:
        self._name = name
        self._device = device
        self.introduction = introduction
        self._secret = secret
        self._peers = peers
        self._port = port
        self._clients: dict[str, control.ControlClient] = {}
        self._lives: dict[str, int] = {}
        self._leaving: set[str] = set()
        self._watchers: list[Callable[[str, str], None]] = []
        self._lock = threading.Lock()

    def open(self, pid: int, among: Collection[str] | None, place: Place) -> Loan:
        """A loan for the program `pid`, on the blades there are now, of `among` if that is given."""
        blades = sorted(name for name in self._lives if among is None or name in among)
        return Loan(self, pid, [name for name in blades if self.stays(name)] or blades, place)

    def drain(self, blade: str, leaving: bool) -> None:
        """Have programs take all they have on `blade` elsewhere, and ask for nothing there; or no more so."""
        with self._lock:
            (self._leaving.add if leaving else self._leaving.discard)(blade)
        self.announce("drain" if leaving else "keep", blade)

    def stays(self, blade: str) -> bool:
        """Is it a blade that is not drained?"""
        return blade not in self._leaving

    def call(self, blade: str, op: str, **fields: Any) -> control.Message:
        """A request to a memory blade, over a connection that is made again once if it has broken."""
        client = self._client(blade)
        try:
            return client.call(op, **fields)
        except control.LostError:
            with self._lock:
                if self._clients.get(blade) is client:
                    del self._clients[blade]
            raise

    def _client(self, blade: str) -> control.ControlClient:
        with self._lock:
            client = self._clients.get(blade)
        if client is not None:
            return client
        address = self._peers().get(blade)
        if address is None:
            raise control.ControlError(f"memory blade {blade} is not in the rack any more", None)
        # Without the lock: a blade that has just died must not hold up what goes to others.
        made = control.ControlClient((address, self._port), self._secret)
        with self._lock:
            kept = self._clients.setdefault(blade, made)
        if kept is not made:
            made.close()
        return kept

    def members(self, lives: dict[str, int]) -> None:
        """Memory blades came or went: name -> incarnation of those that are alive.

        Who waits for one that is not gets an error now, and programs are told.
        """
        with self._lock:
            before, self._lives = self._lives, dict(lives)
            self._leaving &= {name for name in lives if before.get(name) == lives[name]}
            lost = [name for name, life in before.items() if lives.get(name) != life]
            silent = [self._clients.pop(name) for name in lost if name in self._clients]
        for name in lost:
            self.announce("lost", name)
        for client in silent:  # only now: a program that is refused something because of it has heard the reason
            client.abort()
        for name, life in lives.items():
            if before.get(name) != life:
                self.announce("back", name)

    def life(self, blade: str) -> int | None:
        """The incarnation of a blade that is alive."""
        return self._lives.get(blade)

    def watch(self, told: Callable[[str, str], None]) -> None:
        """Have `told("lost" | "back" | "drain" | "keep", blade)` called; it must be quick."""
        with self._lock:
            self._watchers.append(told)

    def unwatch(self, told: Callable[[str, str], None]) -> None:
        """The opposite of `watch`; nothing happens if it was not watching."""
        with self._lock, suppress(ValueError):
            self._watchers.remove(told)

    def announce(self, what: str, blade: str) -> None:
        """Tell all who watch."""
        with self._lock:
            watchers = list(self._watchers)
        for told in watchers:
            told(what, blade)

    def accept(self, blade: str, own: Address) -> tuple[Held, Address]:
        """Have `blade` make the other end of the queue pair `own`; what is held there now, and that end."""
        life = self.life(blade)
        reply = self.call(
            blade, "verbs.accept", service="memory", client=self._name, **own.fields(), **self.introduction()
        )
        return Held(reply["connection"], life), address_of(reply)

    def retrieval(self, blades: Sequence[str]) -> Retrieval:
        """Reads what a program has on these blades (in its order), on behalf of the program."""
        assert self._device is not None
        return Retrieval(self._device, self, blades)

    def discard(self, name: str) -> None:
        """Give back what memory blades keep of a checkpoint. ControlError if one that is alive does not hear of it."""
        for blade in sorted(self._lives):
            self.call(blade, "memory.discard", name=name)

    def give_back(self, blade: str, held: Held) -> None:
        """Return a connection and all that belongs to it, unless the blade has died: then its books have, too."""
        if held.life == self.life(blade):
            self.call(blade, "verbs.release", connection=held.number)


class Loan:
    """What one program holds."""

    def __init__(self, lender: Lender, pid: int, blades: list[str], place: Place) -> None:
        self._lender = lender
        self._pid = pid
        self._place = place
        self.blades = blades
        self._connections: dict[str, Held] = {}
        self._granted: dict[tuple[int, int], Granted] = {}
        """By blade and address."""
        self._next = pid % len(blades) if blades else 0  # so that small programs do not all start on the first

    def connect(self, blade: str, qpn: int, psn: int, gid: str) -> Address:
        """Connect the program's queue pair to `blade`; returns the other end."""
        self._connections[blade], peer = self._lender.accept(blade, Address(qpn, psn, gid))
        return peer

    def regions(self, size: int, copies: int, without: Collection[int] = ()) -> list[Granted] | None:
        """Regions on the first `copies` blades, in the order of choice, that have room and are none of `without`.

        None, and nothing held, if there are fewer.
        """
        granted: list[Granted] = []
        for blade in self._order(size, copies, without):
            one = self._region(blade, size)
            if one is None:
                continue
            if not granted:  # where the second copies are has no say in whose turn it is
                self._next = (one.blade + 1) % len(self.blades)
            granted.append(one)
            if len(granted) == copies:
                self._granted.update({(given.blade, given.address): given for given in granted})
                return granted
        for other in granted:
            self._free(other)
        return None

    def give_back(self, places: Iterable[tuple[int, int]]) -> None:
        """These places (blade, address) are not needed any more, nor is anything under way to them."""
        for place in places:
            granted = self._granted.pop(place, None)
            if granted is not None:
                self._free(granted)

    def _region(self, blade: str, size: int) -> Granted | None:
        held = self._reached(blade)
        if held is None:
            return None
        try:
            reply = self._lender.call(blade, "memory.allocate", connection=held.number, pid=self._pid, size=size)
        except control.ControlError as failure:
            log.warning("%s gives no region: %s", blade, failure.error)
            return None
        return Granted(self.blades.index(blade), reply["addr"], reply["rkey"], reply["region"])

    def _order(self, size: int, copies: int, without: Collection[int]) -> list[str]:
        """The manager's choice, then the others in turn."""
        in_turn = [*range(self._next, len(self.blades)), *range(self._next)]
        usable = [self.blades[n] for n in in_turn if n not in without and self._reached(self.blades[n])]
        usable = [blade for blade in usable if self._lender.stays(blade)]
        chosen = [blade for blade in self._place(usable, size, copies) if blade in usable]
        return list(dict.fromkeys([*chosen, *usable]))

    def _reached(self, blade: str) -> Held | None:
        """The connection to a blade, if it is to the blade's present life."""
        held = self._connections.get(blade)
        return held if held is not None and held.life is not None and held.life == self._lender.life(blade) else None

    def _free(self, granted: Granted) -> None:
        blade = self.blades[granted.blade]
        held = self._reached(blade)
        if held is not None:
            with suppress(control.ControlError):  # that blade has gone
                self._lender.call(blade, "memory.free", connection=held.number, region=granted.number)

    def keep(self, name: str, places: int) -> None:
        """Have all that is held kept as checkpoint `name`, so many regions, whatever becomes of this loan.

        ControlError: nothing is. That includes a number that is another one: such a checkpoint could not be claimed.
        """
        kept = 0
        try:
            for blade, held in self._connections.items():
                if self._reached(blade) is None:  # another's connection may have its number now
                    raise control.ControlError(f"{blade} is not there", "it died, or was restarted")
                kept += len(self._lender.call(blade, "memory.keep", connection=held.number, name=name)["regions"])
            if kept != places:
                raise control.ControlError(f"the memory blades have {kept} regions of it, and it knows {places}", None)
        except control.ControlError:
            self._claim(name)
            raise

    def claim(self, name: str, places: int) -> None:
        """Take over what is kept as checkpoint `name`, so many regions. ControlError: it is still kept."""
        claimed = self._claim(name)
        if len(claimed) != places:
            for blade, held in self._connections.items():
                with suppress(control.ControlError):  # then that blade had nothing to claim
                    self._lender.call(blade, "memory.keep", connection=held.number, name=name)
            raise control.ControlError(
                f"the memory blades have {len(claimed)} regions of {name}, and there were {places}",
                "was a memory blade restarted meanwhile?",
            )
        self._granted.update({(one.blade, one.address): one for one in claimed})

    def _claim(self, name: str) -> list[Granted]:
        claimed: list[Granted] = []
        for blade, held in self._connections.items():
            index = self.blades.index(blade)
            with suppress(control.ControlError):  # then there are too few
                regions = self._lender.call(blade, "memory.claim", connection=held.number, name=name)["regions"]
                claimed += [Granted(index, address, rkey, number) for number, address, rkey in regions]
        return claimed

    def release(self, blade: str) -> None:
        """Give back all on one blade, which the program cannot reach; does not wait for it.

        Whoever watches hears "back" when the blade has answered.
        """
        held = self._connections.pop(blade, None)
        self._granted = {place: one for place, one in self._granted.items() if self.blades[one.blade] != blade}
        if held is not None:
            threading.Thread(target=self._release, args=(blade, held), name="release", daemon=True).start()

    def _release(self, blade: str, held: Held) -> None:
        with suppress(control.ControlError):
            self._lender.give_back(blade, held)
            if self._lender.life(blade) == held.life:
                self._lender.announce("back", blade)

    def close(self) -> None:
        """Give everything back."""
        for blade, held in self._connections.items():
            with suppress(control.ControlError):  # that blade has gone, and its books with it
                self._lender.give_back(blade, held)
