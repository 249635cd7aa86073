"""The addresses of vNodes: each is held by the first of the vNode's processor blades that lives."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from subprocess import CalledProcessError

from guest_agents.control import Message
from guest_agents.membership import Follower, living
from guest_agents.splitkernel.managers.holder import Holder

log = logging.getLogger("rackless.managers")


class Homes(Follower):
    """Which vNodes are at home on one processor blade.

    hold -- gives this blade exactly these addresses besides its own; called in a thread of its own
    """

    def __init__(self, blade: str, holder: Holder, hold: Callable[[Collection[str]], None]) -> None:
        self._blade = blade
        self._holder = holder
        self._hold = hold
        self._living: list[Message] = []
        self._changed = threading.Event()
        holder.on_change = self._changed.set

    def start(self) -> None:
        """Follow what happens, in a thread of its own."""
        threading.Thread(target=self._run, name="homes", daemon=True).start()

    def news(self, members: list[Message], dead: dict[int, int]) -> None:
        """Blades came or went."""
        self._living = living(self._living, members, dead)
        self._changed.set()

    def _run(self) -> None:
        while True:
            self._changed.wait()
            self._changed.clear()
            try:
                self._hold(self._addresses())
            except (OSError, CalledProcessError):
                log.exception("the addresses of vNodes are not set")

    def _addresses(self) -> set[str]:
        names = {member["name"] for member in self._living}
        homes = {vnode.address: next((name for name in vnode.processors if name in names), None)
                 for vnode in self._holder.ledger.vnodes.values() if vnode.address is not None}  # fmt: skip
        return {address for address, home in homes.items() if home == self._blade}
