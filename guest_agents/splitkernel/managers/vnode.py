"""vNodes: virtual servers that span blades, as users see a splitkernel (LegoOS, OSDI'18, section 3.2)."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace

from guest_agents.control import ControlError, Message

DEFAULT = "default"
"""The vNode of programs that name none: all blades there are, whoever comes and goes."""
_NAME = re.compile(r"[a-z][a-z0-9-]{0,31}")
_SAID = 80


@dataclass(frozen=True)
class VNode:
    """One virtual server: the names of its blades. Its files are below its name on its storage blade."""

    name: str
    id: int
    address: str | None
    processors: tuple[str, ...]
    memory: tuple[str, ...]
    storage: str | None
    placement: str
    """How its programs' regions are placed on its memory blades: one of memory.PLACEMENTS."""

    def to_json(self) -> Message:
        """For messages and files; `from_json` reads it."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Message) -> VNode:
        """What `to_json` wrote."""
        made = cls(**data)
        return replace(made, processors=tuple(made.processors), memory=tuple(made.memory))


@dataclass(frozen=True)
class Move:
    """All files of one storage blade are on another since, the vNodes' and what else there was."""

    source: str
    target: str
    token: str
    """No two moves have the same."""


@dataclass(frozen=True)
class Ledger:
    """What the managers want to know again after a restart: every blade keeps the newest, whole."""

    version: int = 0
    """Grows with every change: of two ledgers the one with the higher version is right."""
    next_id: int = 1
    vnodes: Mapping[str, VNode] = field(default_factory=dict)
    lost: tuple[Message, ...] = ()
    """Programs whose processor blade died while they ran, the last ones."""
    files: str | None = None
    """The storage blade with the files of the default vNode, once they have moved; else it is the first."""
    moves: tuple[Move, ...] = ()
    """Of files, in order."""

    def to_json(self) -> Message:
        """For messages and files; `from_json` reads it."""
        return {"version": self.version, "next_id": self.next_id, "lost": list(self.lost),
                "vnodes": [vnode.to_json() for vnode in self.vnodes.values()], "files": self.files,
                "moves": [asdict(move) for move in self.moves]}  # fmt: skip

    @classmethod
    def from_json(cls, data: Message) -> Ledger:
        """What `to_json` wrote."""
        vnodes = [VNode.from_json(vnode) for vnode in data["vnodes"]]
        moves = tuple(Move(**move) for move in data.get("moves", ()))  # an agent of before knew of none
        return cls(data["version"], data["next_id"], {vnode.name: vnode for vnode in vnodes}, tuple(data["lost"]),
                   data.get("files"), moves)  # fmt: skip

    def moved(self, move: Move, living: Collection[str]) -> Ledger:
        """This, after a move of files; living -- the storage blades."""
        vnodes = {name: replace(vnode, storage=move.target) if vnode.storage == move.source else vnode
                  for name, vnode in self.vnodes.items()}  # fmt: skip
        files = move.target if self.home(living) == move.source else self.files
        return replace(self, vnodes=vnodes, files=files, moves=(*self.moves, move))

    def followed(self, blade: str, before: Ledger) -> str:
        """The storage blade that now has what `blade` had when the ledger was `before`."""
        for move in self.moves[len(before.moves) :]:
            if move.source == blade:
                blade = move.target
        return blade

    def left(self, blade: str) -> int:
        """How often the files of a storage blade of that name have moved away."""
        return sum(move.source == blade for move in self.moves)

    def home(self, living: Collection[str]) -> str | None:
        """The storage blade with the files of the default vNode, of those that live; None without any."""
        return self.files if self.files in living else min(living, default=None)

    def find(self, name: str) -> VNode:
        """The vNode called `name`. ControlError if there is none."""
        if name not in self.vnodes:
            known = ", ".join(sorted(self.vnodes)) or "only the default one, which has no need of a name"
            raise ControlError(f"there is no vNode {name[:_SAID]!r}", f"there are: {known}")
        return self.vnodes[name]


def check_name(name: str, taken: Collection[str]) -> None:
    """ControlError if a new vNode cannot have this name. It becomes a folder's."""
    if not _NAME.fullmatch(name):
        raise ControlError(f"{name[:_SAID]!r} cannot name a vNode", "write 1 to 32 of a-z, 0-9 and -, a letter first")
    if name == DEFAULT or name in taken:
        raise ControlError(f"there is a vNode {name} already", "see `rackless vnode list`")
