"""FUSE nodes: files and their names, renames, removal while open, forgetting. No VM."""

from __future__ import annotations

import pytest

from guest_agents.splitkernel.process.fuse import ROOT
from guest_agents.splitkernel.process.nodes import Nodes


def test_paths_follow_renames() -> None:
    nodes = Nodes()
    d = nodes.looked_up(ROOT, "d", 10, directory=True)
    f = nodes.looked_up(d, "f", 11)
    assert nodes.file(f) == ("d/f", 11)
    nodes.moved(ROOT, "d", ROOT, "e")
    assert nodes.path(f) == "e/f"
    assert nodes.path(d, "new") == "e/new"
    assert nodes.path(ROOT) == ""


def test_a_subtree_has_another_root() -> None:
    nodes = Nodes("vnodes/web")
    assert nodes.path(ROOT) == "vnodes/web"
    assert nodes.path(nodes.looked_up(ROOT, "a", 10)) == "vnodes/web/a"


def test_a_rename_over_a_file_leaves_the_old_one_nameless() -> None:
    nodes = Nodes()
    a, b = nodes.looked_up(ROOT, "a", 10), nodes.looked_up(ROOT, "b", 11)
    nodes.moved(ROOT, "a", ROOT, "b")
    assert nodes.path(a) == "b"
    assert nodes.looked_up(ROOT, "b", 10) == a
    with pytest.raises(KeyError):
        nodes.path(b)
    nodes.forget(b, 1)
    assert nodes.looked_up(ROOT, "c", 11) != b


def test_exchange() -> None:
    nodes = Nodes()
    a, b = nodes.looked_up(ROOT, "a", 10), nodes.looked_up(ROOT, "b", 11)
    nodes.exchanged(ROOT, "a", ROOT, "b")
    assert (nodes.path(a), nodes.path(b)) == ("b", "a")


def test_hard_links_are_one_node_with_the_names_that_are_left() -> None:
    nodes = Nodes()
    a = nodes.looked_up(ROOT, "a", 10)
    assert nodes.looked_up(ROOT, "b", 10) == a
    assert nodes.path(a) == "b"
    nodes.moved(ROOT, "a", ROOT, "b")  # two names of one file: nothing happens
    nodes.removed(ROOT, "b")
    assert nodes.path(a) == "a"


def test_what_other_blades_did_is_found_out_by_looking() -> None:
    nodes = Nodes()
    d = nodes.looked_up(ROOT, "d", 10, directory=True)
    f = nodes.looked_up(d, "f", 11)
    assert nodes.looked_up(ROOT, "e", 10, directory=True) == d  # moved: a directory has one name
    assert nodes.path(f) == "e/f"
    other = nodes.looked_up(d, "f", 12)  # replaced
    assert other != f
    with pytest.raises(KeyError):
        nodes.path(f)


def test_directories_in_a_ring_have_no_path() -> None:
    nodes = Nodes()
    a = nodes.looked_up(ROOT, "a", 10, directory=True)
    b = nodes.looked_up(a, "b", 11, directory=True)
    nodes.looked_up(b, "a", 10, directory=True)  # as if elsewhere b had moved out of a, and a into b
    with pytest.raises(KeyError):
        nodes.path(a)


def test_forgetting_takes_as_many_as_were_given() -> None:
    nodes = Nodes()
    first = nodes.looked_up(ROOT, "a", 10)
    assert nodes.looked_up(ROOT, "a", 10) == first
    nodes.forget(first, 1)
    assert nodes.path(first) == "a"
    nodes.forget(first, 1)
    with pytest.raises(KeyError):
        nodes.path(first)
    assert nodes.looked_up(ROOT, "a", 10) != first
    nodes.forget(ROOT, 100)
    assert nodes.path(ROOT) == ""


def test_removed_while_open() -> None:
    nodes = Nodes()
    a = nodes.looked_up(ROOT, "a", 10)
    nodes.opened(a)
    nodes.opened(a)
    node = nodes.find(ROOT, "a")
    assert node is not None
    nodes.hide(node, "attic/1")
    assert nodes.find(ROOT, "a") is None
    assert nodes.file(a) == ("attic/1", 10)
    assert nodes.hidden(a)
    nodes.forget(a, 1)
    assert nodes.closed(a) is None
    assert nodes.closed(a) == "attic/1"
    assert nodes.closed(a) is None
