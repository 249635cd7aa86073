"""Files the kernel knows: FUSE node numbers, and the paths that lead to them now.

A node is a file and not a name, as the kernel has one page cache per node: two hard links must share it. Files are
told apart by the identity that the storage blade gives them. So what other blades rename or replace is found out when
the kernel next looks up a name: the file moves in the tree with all below it, or the name leads to a new node.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from guest_agents.splitkernel.process.fuse import ROOT, VALID_SECONDS
from guest_agents.splitkernel.storage import wire
from guest_agents.splitkernel.storage.wire import Attributes, Version

DEEPEST = 2048
"""Most directories above a file: a path of MAX_PATH bytes has no more."""


@dataclass(slots=True)
class Node:
    """One file: its names, how often the kernel has looked it up, and how often it is open here."""

    number: int
    identity: int
    names: dict[tuple[int, str], None] = field(default_factory=dict)
    """(parent, name), the latest confirmed last; a directory has one."""
    lookups: int = 0
    opens: int = 0
    told: bytes = b""
    """The attributes that the kernel was last told, packed: there may be a hundred thousand nodes."""
    version: Version | None = None
    """Of its contents, as the storage blade last said; None if answers have crossed and nobody can tell."""
    heard: float = 0.0
    """When it said so."""
    hidden: str | None = None
    """Removed while open: the path at the storage blade until the last close."""


class Nodes:
    """The tree; all methods are safe to call from several threads. KeyError: a file that has no path any more.

    top -- what the root is called at the storage blade
    """

    def __init__(self, top: str = "") -> None:
        self._top = top
        self._lock = threading.RLock()
        self._nodes = {ROOT: Node(ROOT, 0, lookups=1)}
        self._by_identity: dict[int, int] = {}
        self._children: dict[tuple[int, str], int] = {}
        self._next = ROOT + 1

    def path(self, number: int, name: str | None = None) -> str:
        """Path of a node, or of `name` in it."""
        parts = [] if name is None else [name]
        with self._lock:
            while number != ROOT:
                node = self._nodes[number]
                if node.hidden is not None:
                    parts.append(node.hidden)
                    break
                if not node.names or len(parts) > DEEPEST:  # a ring: other blades have moved directories about
                    raise KeyError(number)
                number, part = next(reversed(node.names))
                parts.append(part)
            else:
                if self._top:
                    parts.append(self._top)
        return "/".join(reversed(parts))

    def file(self, number: int) -> tuple[str, int]:
        """Path and identity of a node, as requests name it."""
        with self._lock:
            return self.path(number), self._nodes[number].identity

    def looked_up(self, parent: int, name: str, identity: int, directory: bool = False) -> int:
        """The number of the file that has this name, made if new; the kernel will `forget` it as often as told."""
        with self._lock:
            number = self._by_identity.get(identity)
            if number is None:
                number, self._next = self._next, self._next + 1
                self._nodes[number] = Node(number, identity)
                self._by_identity[identity] = number
            node = self._nodes[number]
            if directory and (parent, name) not in node.names:
                for old in list(node.names):
                    self.removed(*old)
            self._place(node, parent, name)
            node.lookups += 1
            return number

    def forget(self, number: int, count: int) -> None:
        """The kernel has dropped `count` of its references."""
        with self._lock:
            node = self._nodes.get(number)
            if node is None or number == ROOT:
                return
            node.lookups -= count
            self._drop_if_unused(node)

    def find(self, parent: int, name: str) -> Node | None:
        """The file of a name, if the kernel knows it."""
        with self._lock:
            number = self._children.get((parent, name))
            return None if number is None else self._nodes[number]

    def tell(self, number: int, told: Attributes) -> None:
        """Remember what the kernel is told of a file."""
        with self._lock:
            if number in self._nodes:
                self._nodes[number].told = wire.repack_attributes(told)
                self.know(number, wire.version_of(told))

    def know(self, number: int, version: Version) -> None:
        """The storage blade has just said which version of its contents a file has."""
        with self._lock:
            node = self._nodes.get(number)
            if node is not None:
                late = node.version is not None and version.moment < node.version.moment
                node.version = None if late else version
                node.heard = time.monotonic()

    def version(self, number: int) -> Version | None:
        """What is known of a file's contents and may be believed still."""
        with self._lock:
            node = self._nodes[number]
            return node.version if time.monotonic() - node.heard < VALID_SECONDS else None

    def told(self, number: int) -> Attributes | None:
        """What it was last told."""
        with self._lock:
            told = self._nodes[number].told
            return wire.unpack_attributes(told) if told else None

    def last(self, number: int) -> Attributes | None:
        """What was told of a file that this blade has removed since."""
        with self._lock:
            node = self._nodes[number]
            return None if node.names or node.hidden else self.told(number)

    def hidden(self, number: int) -> bool:
        """Whether a file has been removed while open."""
        with self._lock:
            node = self._nodes.get(number)
            return node is not None and node.hidden is not None

    def moved(self, parent: int, name: str, new_parent: int, new_name: str) -> None:
        """A rename has happened; what had the new name has it no more."""
        with self._lock:
            node = self.find(parent, name)
            if node is self.find(new_parent, new_name) is not None:
                return  # two names of one file: rename(2) does nothing
            self.removed(new_parent, new_name)
            self.removed(parent, name)
            if node is not None:
                self._place(node, new_parent, new_name)

    def exchanged(self, parent: int, name: str, other_parent: int, other_name: str) -> None:
        """Two names have changed places (RENAME_EXCHANGE)."""
        with self._lock:
            first, second = self.find(parent, name), self.find(other_parent, other_name)
            self.removed(parent, name)
            self.removed(other_parent, other_name)
            if first is not None:
                self._place(first, other_parent, other_name)
            if second is not None:
                self._place(second, parent, name)

    def removed(self, parent: int, name: str) -> None:
        """A name is gone; its file stays until the kernel forgets it."""
        with self._lock:
            number = self._children.pop((parent, name), None)
            if number is not None:
                self._nodes[number].names.pop((parent, name), None)

    def hide(self, node: Node, path: str) -> None:
        """A file that is open has lost its last name: it is at `path` until the last close."""
        with self._lock:
            for name in list(node.names):
                self.removed(*name)
            node.hidden = path

    def opened(self, number: int) -> None:
        """One more open file."""
        with self._lock:
            self._nodes[number].opens += 1

    def closed(self, number: int) -> str | None:
        """One less; returns the path to delete now if the file was removed while open."""
        with self._lock:
            node = self._nodes.get(number)
            if node is None:
                return None
            node.opens -= 1
            path = None
            if not node.opens:
                path, node.hidden = node.hidden, None
            self._drop_if_unused(node)
            return path

    def _place(self, node: Node, parent: int, name: str) -> None:
        self.removed(parent, name)
        self._children[parent, name] = node.number
        node.names[parent, name] = None

    def _drop_if_unused(self, node: Node) -> None:
        if node.lookups > 0 or node.opens:
            return
        for name in list(node.names):
            self.removed(*name)
        self._nodes.pop(node.number, None)
        if self._by_identity.get(node.identity) == node.number:
            del self._by_identity[node.identity]
