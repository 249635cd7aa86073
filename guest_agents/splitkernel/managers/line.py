"""The global managers as part of an agent: this blade's holder and, on the manager, the books; their line."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from guest_agents.control import Handler
from guest_agents.lite.links import Links, guarded
from guest_agents.membership import Life, Manager, Membership
from guest_agents.splitkernel.managers.books import GlobalManagers
from guest_agents.splitkernel.managers.holder import Holder


class Line:
    """What the agent of a blade starts, serves and lets follow its membership.

    manager_address -- of the manager on the fabric, as members know it
    bury -- is called with the lives that are over, in a thread of its own
    addresses -- those that vNodes may have, in the order in which they are given
    port -- where agents listen for control connections
    file -- where the ledger of vNodes is kept
    manager -- the list of members, on the manager blade
    """

    def __init__(
        self,
        membership: Membership,
        secret: bytes,
        manager_address: str,
        port: int,
        bury: Callable[[dict[int, int]], None],
        file: Path,
        manager: Manager | None = None,
        addresses: Callable[[], Iterable[str]] = tuple,
    ) -> None:
        self._membership = membership
        self._manager_address = manager_address
        self._port = port
        self._manager = manager
        links = Links(secret, self.life, self._find)
        self._bury = bury
        self.holder = Holder(links, self.life, self._manager_life, self._end, file)
        self.books = GlobalManagers(manager, links, addresses) if manager is not None else None
        links.handlers = guarded(self.life, {**self.holder.handlers(),
                                             **(self.books.member_handlers() if self.books else {})})  # fmt: skip
        self._links = links

    def handlers(self) -> dict[str, Handler]:
        """For the agent's control server."""
        return {**self._links.handlers, **(self.books.handlers() if self.books else {})}

    def start(self) -> None:
        """Before the membership."""
        self.holder.start()
        if self.books is not None:
            self.books.start()

    def life(self) -> Life | None:
        """This blade's present life; None before its first."""
        incarnation = self._membership.incarnation
        return None if incarnation is None else Life(self._membership.node_id, incarnation)

    def _end(self, dead: dict[int, int]) -> None:
        """These lives are over: requests to them end, and what they held here goes back."""
        for node, incarnation in dead.items():
            if node != self._membership.node_id:
                self._links.end(node, incarnation)
        self._bury(dead)

    def _manager_life(self) -> Life | None:
        if not self._membership.joined.is_set():
            return None
        for member in self._membership.living:
            if member["address"] == self._manager_address:
                return Life(member["node_id"], member["incarnation"])
        return None

    def _find(self, life: Life) -> tuple[str, int] | None:
        if self._manager is not None:  # it knows first
            found = self._manager.alive().get(life.node)
            return (found.management, self._port) if found is not None and found.life == life else None
        for member in self._membership.living:
            if Life(member["node_id"], member["incarnation"]) == life:
                return member["management"], self._port
        return None
