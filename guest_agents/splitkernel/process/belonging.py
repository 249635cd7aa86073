"""What it means for a program on this blade to belong to a vNode: its memory blades, its files, its place in `ps`."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from guest_agents import control
from guest_agents.control import Message
from guest_agents.lite.errors import LiteError
from guest_agents.splitkernel.managers.holder import Holder
from guest_agents.splitkernel.managers.vnode import DEFAULT, VNode
from guest_agents.splitkernel.process.memory import Place
from guest_agents.splitkernel.process.programs import Programs, signal_number

PLACE_SECONDS = 2.0
"""How long a program that grows waits for the global memory manager, before its region goes to the next in turn."""
LIST_SECONDS = 5.0


class Belonging:
    """The vNodes as this processor blade knows them.

    root_of -- the folder with a vNode's files, None if it has none
    call -- (blade, op, fields): a request to the agent of another processor blade
    """

    def __init__(
        self,
        blade: str,
        holder: Holder,
        root_of: Callable[[VNode], Path | None],
        call: Callable[..., Message],
    ) -> None:
        self._blade = blade
        self._holder = holder
        self._root_of = root_of
        self._call = call
        self.programs = Programs(blade, holder.changed)
        holder.programs = self.programs.describe

    def enter(self, name: str) -> Path | None:
        """The folder that a program of that vNode sees as /vnode; None if it sees what this blade shows.

        ControlError if there is no such vNode, or if this blade is none of its own.
        """
        if name == DEFAULT:
            return None
        vnode = self._holder.ledger.find(name)
        if self._blade not in vnode.processors:
            raise control.ControlError(f"{self._blade} is not a processor blade of vNode {name}",
                                       f"these are: {', '.join(vnode.processors)}")  # fmt: skip
        return self._root_of(vnode)

    def memory(self, name: str) -> tuple[Collection[str] | None, Place]:
        """The memory blades of a vNode (None: all), and who says where its regions go."""
        vnode = self._holder.ledger.vnodes.get(name)

        def place(blades: list[str], size: int, copies: int) -> list[str]:
            try:
                reply = self._holder.ask("managers.region", PLACE_SECONDS, vnode=name, blades=blades, size=size,
                                         copies=copies)  # fmt: skip
            except LiteError:
                return []
            return [str(blade) for blade in reply["blades"]]

        return None if vnode is None else vnode.memory, place

    def kill(self, name: str, signal: str) -> None:
        """Send a signal to a program of this blade, or of another one by its full name. ControlError if none runs."""
        blade, _, _pid = name.rpartition(".")
        if blade in ("", self._blade):
            self.programs.kill(name, signal_number(signal))
        else:
            self._call(blade, "process.kill", id=name, signal=signal)

    def table(self) -> str:
        """The programs of the rack, for people; of this blade alone while the manager is away."""
        try:
            told: list[Message] = self._holder.ask("managers.programs", LIST_SECONDS)["programs"]
        except LiteError:
            told = self.programs.describe()
        return _table(told)


def _table(programs: Sequence[Message]) -> str:
    lines = [("ID", "VNODE", "STATE", "CODE", "STARTED", "COMMAND")]
    for program in programs:
        code = "-" if program["exit_code"] is None else str(program["exit_code"])
        started = time.strftime("%H:%M:%S", time.localtime(program["started"]))
        lines.append((program["id"], program["vnode"], program["state"], code, started, program["command"]))
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[5]]) for line in lines
    )
