"""The free pieces of a range, as a tree that knows its largest one: what fits first is found without looking at all.

LegoOS's memory components keep such a tree of each process's address space on each blade, by `max_gap` (4.4). It
is a treap: a search tree by where pieces start, balanced by random weights, of which a node has more than its children.
Trees are taken apart and joined; a tree that was handed in is used up. None is the empty one.
"""

from __future__ import annotations


class Gap:
    """A free piece, and the tree below it."""

    __slots__ = ("left", "length", "max_gap", "right", "start", "weight")

    def __init__(self, start: int, length: int, weight: float) -> None:
        self.start, self.length, self.weight = start, length, weight
        self.left: Gap | None = None
        self.right: Gap | None = None
        self.max_gap = length
        """The longest piece in the tree."""

    def measure(self) -> Gap:
        """Itself, when its children have changed."""
        left, right = self.left, self.right
        self.max_gap = max(self.length, left.max_gap if left else 0, right.max_gap if right else 0)
        return self


def first_fit(tree: Gap | None, size: int) -> Gap | None:
    """The lowest piece of at least `size`, if there is one."""
    if tree is None or tree.max_gap < size:
        return None
    while True:
        if tree.left is not None and tree.left.max_gap >= size:
            tree = tree.left
        elif tree.length >= size:
            return tree
        else:
            assert tree.right is not None
            tree = tree.right


def rightmost(tree: Gap | None) -> Gap | None:
    """The last piece."""
    while tree is not None and tree.right is not None:
        tree = tree.right
    return tree


def leftmost(tree: Gap | None) -> Gap | None:
    """The first piece."""
    while tree is not None and tree.left is not None:
        tree = tree.left
    return tree


def split(tree: Gap | None, at: int) -> tuple[Gap | None, Gap | None]:
    """The pieces that start below `at`, and the others."""
    if tree is None:
        return None, None
    if tree.start < at:
        tree.right, high = split(tree.right, at)
        return tree.measure(), high
    low, tree.left = split(tree.left, at)
    return low, tree.measure()


def join(low: Gap | None, high: Gap | None) -> Gap | None:
    """One tree of two, of which the first is below the second."""
    if low is None or high is None:
        return high if low is None else low
    if low.weight > high.weight:
        low.right = join(low.right, high)
        return low.measure()
    high.left = join(low, high.left)
    return high.measure()


def without(tree: Gap | None, gap: Gap) -> Gap | None:
    """The tree without one of its pieces."""
    if tree is None or tree is gap:
        return join(gap.left, gap.right)
    if gap.start < tree.start:
        tree.left = without(tree.left, gap)
    else:
        tree.right = without(tree.right, gap)
    return tree.measure()
