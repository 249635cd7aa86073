"""FUSE names: renames, removal while open, forgetting. No VM."""

from __future__ import annotations

import pytest

from guest_agents.splitkernel.process.fuse import ROOT
from guest_agents.splitkernel.process.nodes import Nodes


def test_paths_follow_renames() -> None:
    nodes = Nodes()
    d = nodes.looked_up(ROOT, "d")
    f = nodes.looked_up(d, "f")
    assert nodes.path(f) == "d/f"
    nodes.moved(ROOT, "d", ROOT, "e")
    assert nodes.path(f) == "e/f"
    assert nodes.path(d, "new") == "e/new"
    assert nodes.path(ROOT) == ""


def test_a_rename_over_a_file_leaves_the_old_one_nameless() -> None:
    nodes = Nodes()
    a, b = nodes.looked_up(ROOT, "a"), nodes.looked_up(ROOT, "b")
    nodes.moved(ROOT, "a", ROOT, "b")
    assert nodes.path(a) == "b"
    assert nodes.looked_up(ROOT, "b") == a
    nodes.forget(b, 1)
    assert nodes.looked_up(ROOT, "b") == a
    with pytest.raises(KeyError):
        nodes.path(b)


def test_exchange() -> None:
    nodes = Nodes()
    a, b = nodes.looked_up(ROOT, "a"), nodes.looked_up(ROOT, "b")
    nodes.exchanged(ROOT, "a", ROOT, "b")
    assert (nodes.path(a), nodes.path(b)) == ("b", "a")


def test_forgetting_takes_as_many_as_were_given() -> None:
    nodes = Nodes()
    first = nodes.looked_up(ROOT, "a")
    assert nodes.looked_up(ROOT, "a") == first
    nodes.forget(first, 1)
    assert nodes.path(first) == "a"
    nodes.forget(first, 1)
    with pytest.raises(KeyError):
        nodes.path(first)
    assert nodes.looked_up(ROOT, "a") != first
    nodes.forget(ROOT, 100)
    assert nodes.path(ROOT) == ""


def test_removed_while_open() -> None:
    nodes = Nodes()
    a = nodes.looked_up(ROOT, "a")
    nodes.opened(a)
    nodes.opened(a)
    nodes.moved(ROOT, "a", ROOT, "hidden")
    found = nodes.find(ROOT, "hidden")
    assert found is not None
    found.hidden = True
    nodes.forget(a, 1)
    assert nodes.closed(a) is None
    assert nodes.closed(a) == "hidden"
    assert nodes.find(ROOT, "hidden") is None
    assert nodes.closed(a) is None
