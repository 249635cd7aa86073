"""Names the kernel knows: FUSE node numbers and the paths they stand for now."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from guest_agents.splitkernel.process.fuse import ROOT


@dataclass
class Name:
    """One node: its place in the tree, how often the kernel has looked it up, and who has it open."""

    number: int
    parent: int
    name: str
    lookups: int = 0
    opens: int = 0
    hidden: bool = False
    """Removed while open: it has another name at the storage blade until the last close."""


class Nodes:
    """The tree; all methods are safe to call from several threads."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._nodes = {ROOT: Name(ROOT, 0, "", lookups=1)}
        self._children: dict[tuple[int, str], int] = {}
        self._next = ROOT + 1

    def path(self, number: int, name: str | None = None) -> str:
        """Path of a node, or of `name` in it. KeyError: the kernel uses a number it has forgotten."""
        parts = [] if name is None else [name]
        with self._lock:
            while number != ROOT:
                node = self._nodes[number]
                parts.append(node.name)
                number = node.parent
        return "/".join(reversed(parts))

    def looked_up(self, parent: int, name: str) -> int:
        """The number of a name, made if new; the kernel will `forget` it as often as it was told."""
        with self._lock:
            number = self._children.get((parent, name))
            if number is None:
                number, self._next = self._next, self._next + 1
                self._nodes[number] = Name(number, parent, name)
                self._children[parent, name] = number
            self._nodes[number].lookups += 1
            return number

    def forget(self, number: int, count: int) -> None:
        """The kernel has dropped `count` of its references."""
        with self._lock:
            node = self._nodes.get(number)
            if node is None or number == ROOT:
                return
            node.lookups -= count
            if node.lookups <= 0 and not node.opens:
                self._drop(node)

    def find(self, parent: int, name: str) -> Name | None:
        """The node of a name, if the kernel knows it."""
        with self._lock:
            number = self._children.get((parent, name))
            return None if number is None else self._nodes[number]

    def moved(self, parent: int, name: str, new_parent: int, new_name: str) -> None:
        """A rename has happened; what had the new name is no longer reachable."""
        with self._lock:
            self.removed(new_parent, new_name)
            number = self._children.pop((parent, name), None)
            if number is not None:
                node = self._nodes[number]
                node.parent, node.name = new_parent, new_name
                self._children[new_parent, new_name] = number

    def exchanged(self, parent: int, name: str, other_parent: int, other_name: str) -> None:
        """Two names have changed places (RENAME_EXCHANGE)."""
        with self._lock:
            first = self._children.pop((parent, name), None)
            second = self._children.pop((other_parent, other_name), None)
            for number, where in ((first, (other_parent, other_name)), (second, (parent, name))):
                if number is not None:
                    self._nodes[number].parent, self._nodes[number].name = where
                    self._children[where] = number

    def removed(self, parent: int, name: str) -> None:
        """A name is gone; its node stays until the kernel forgets it."""
        with self._lock:
            self._children.pop((parent, name), None)

    def opened(self, number: int) -> None:
        """One more open file."""
        with self._lock:
            self._nodes[number].opens += 1

    def closed(self, number: int) -> str | None:
        """One less; returns the path to delete now if it was removed while open."""
        with self._lock:
            node = self._nodes.get(number)
            if node is None:
                return None
            node.opens -= 1
            if node.opens > 0:
                return None
            path = self.path(number) if node.hidden else None
            if node.lookups <= 0 or path is not None:
                node.hidden = False
                self.removed(node.parent, node.name)
                if node.lookups <= 0:
                    self._drop(node)
            return path

    def _drop(self, node: Name) -> None:
        self._nodes.pop(node.number, None)
        if self._children.get((node.parent, node.name)) == node.number:
            del self._children[node.parent, node.name]
