"""A sorted set of pairs (order, key) in pages of a dataset: a B-link tree (Lehman and Yao, TODS 1981).

Every node has a fence on both sides and a link to its right neighbour, so whoever comes to it by a page that has
changed meanwhile notices, and goes right. Thus readers need no transaction, and writers acquire only what they change:
the leaf, and when it is full, its parent. The root stays where it is. Nodes that were emptied stay.
"""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator

from guest_agents import hotpot
from guest_agents.hotpot.apps.pages import Page, Row, Work

Entry = tuple[bytes, bytes]
LEAF = 16
"""Kind of a leaf; its parent is of the next kind, and so on."""
MOST = 255
"""Bytes of an order, or of a key: a node has room for several."""
_ASTRAY_SECONDS = 30.0
_PAUSE_SECONDS = 0.0005
_FENCES = 2  # rows: the least entry that may be here; the least that may not, and whether there is one


class Tree:
    """The tree with its root at an address.

    peek -- reads a page by plain loads
    take -- gives the address of a free page
    """

    def __init__(self, root: int, peek: Callable[[int], Page], take: Callable[[Work], int]) -> None:
        self._root = root
        self._peek = peek
        self._take = take

    def format(self, work: Work) -> None:
        """Make it, empty."""
        work.store(self._root, Page(LEAF, 0, [(b"", b"", b""), (b"", b"", b"")]))

    def walk(self, start: Entry) -> Iterator[Entry]:
        """Entries from `start` on, in order, by plain loads: each leaf as it is when it is read."""
        while True:
            leaf = self._descend(start)[1]
            yield from (row[:2] for row in leaf.rows[_FENCES:] if row[:2] >= start)
            if not leaf.rows[1][2]:
                return
            start = leaf.rows[1][:2]

    def add(self, work: Work, entry: Entry) -> None:
        """Add an entry that is not there."""
        self._insert(work, self._descend(entry)[0], LEAF, (*entry, b""))

    def remove(self, work: Work, entry: Entry) -> None:
        """Remove an entry that is there. hotpot.Retry: it is not, so what the transaction has read is of two times."""
        at, node = _right(work, self._descend(entry)[0][-1], entry, LEAF)
        place = _place(node, entry)
        if place == len(node.rows) or node.rows[place][:2] != entry:
            raise hotpot.Retry("an entry is not in the tree yet")
        del node.rows[place]
        work.store(at, node)

    def _descend(self, entry: Entry) -> tuple[list[int], Page]:
        """Addresses of nodes from the root to the leaf that should have the entry, and that leaf, by plain loads."""
        path, deadline = [self._root], time.monotonic() + _ASTRAY_SECONDS
        while True:
            node = self._peek(path[-1])
            if node.kind < LEAF or entry < node.rows[0][:2]:  # the rest of a commit is to come, or it is taken back
                if time.monotonic() > deadline:
                    raise hotpot.Corrupt(f"the tree leads to {path[-1]:#x}, where nothing of it is")
                time.sleep(_PAUSE_SECONDS)
                path = [self._root]
            elif node.rows[1][2] and entry >= node.rows[1][:2]:
                path[-1] = node.link
            elif node.kind == LEAF:
                return path, node
            else:
                path.append(_child(node, entry))

    def _insert(self, work: Work, path: list[int], kind: int, row: Row) -> None:
        at, node = _right(work, path.pop(), row[:2], kind)
        node.rows.insert(_place(node, row[:2]), row)
        if node.room >= 0:
            work.store(at, node)
            return
        middle = (_FENCES + len(node.rows)) // 2
        cut, upper = node.rows[middle][:2], node.rows[middle:]
        right = Page(kind, node.link, [(*cut, b""), node.rows[1], *upper])
        beyond = self._take(work)
        work.store(beyond, right)
        left = Page(kind, beyond, [node.rows[0], (*cut, b"+"), *node.rows[_FENCES:middle]])
        if at == self._root:
            below = self._take(work)
            work.store(below, left)
            children = [(b"", b"", _pointer(below)), (*cut, _pointer(beyond))]
            work.store(at, Page(kind + 1, 0, [(b"", b"", b""), (b"", b"", b""), *children]))
        else:
            work.store(at, left)
            self._insert(work, path, kind + 1, (*cut, _pointer(beyond)))


def _right(work: Work, at: int, entry: Entry, kind: int) -> tuple[int, Page]:
    """The node of this kind, at `at` or right of it, that should have the entry."""
    while True:
        node = work.load(at)
        if node.kind != kind or entry < node.rows[0][:2]:
            raise hotpot.Retry("a node of the tree is another now")
        if not node.rows[1][2] or entry < node.rows[1][:2]:
            return at, node
        at = node.link


def _place(node: Page, entry: Entry) -> int:
    return bisect_left(node.rows, entry, _FENCES, key=lambda row: row[:2])


def _child(node: Page, entry: Entry) -> int:
    row = node.rows[bisect_right(node.rows, entry, _FENCES, key=lambda row: row[:2]) - 1]
    return int.from_bytes(row[2], "little")


def _pointer(address: int) -> bytes:
    return address.to_bytes(8, "little")
