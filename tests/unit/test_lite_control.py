"""The client's control operations against real tiers and a real directory (the core below them is a stand-in)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest_agents import lite
from guest_agents.lite import Permission
from tests.unit.lite_blades import Rack


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[lite.Node, lite.Node]]:
    rack = Rack(tmp_path, ["gm0", "mb0", "mb1", "mb2"])
    try:
        one, two = (lite.connect(str(rack[name].tier.settings.socket)) for name in ("mb0", "mb1"))
        with one, two:
            yield one, two
    finally:
        rack.close()


def test_members(nodes: tuple[lite.Node, lite.Node]) -> None:
    one, two = nodes
    assert (one.name, two.name) == ("mb0", "mb1")
    assert [member.name for member in one.nodes()] == ["gm0", "mb0", "mb1", "mb2"]
    assert all(member.alive for member in two.nodes())
    assert one.stat()["clients"][0]["handles"] == 0


def test_names_rights_and_masters(nodes: tuple[lite.Node, lite.Node]) -> None:
    one, two = nodes
    made = one.malloc(9 << 20, ["mb1", "mb2"], spread=True, name="x", permissions=Permission.READ | Permission.SHARE)
    assert made.blocks == [("mb1", 4 << 20), ("mb2", 4 << 20), ("mb1", 1 << 20)]
    assert made.permissions == Permission.ALL
    mapped = two.map("x", Permission.READ)
    assert (mapped.size, mapped.permissions) == (9 << 20, Permission.READ)
    with pytest.raises(lite.PermissionDenied, match="may not be mapped"):
        two.map("x")
    with pytest.raises(lite.PermissionDenied):
        mapped.free()
    made.grant(Permission.WRITE | Permission.ADMIN, "mb1")
    with two.map("x", Permission.USE | Permission.ADMIN) as master:
        master.revoke(Permission.WRITE)
        with pytest.raises(lite.PermissionDenied):
            two.map("x")
        master.free()
    with pytest.raises(lite.Freed):
        made.grant(Permission.READ)
    mapped.unmap()


def test_what_is_done_at_the_data(nodes: tuple[lite.Node, lite.Node]) -> None:
    one, _ = nodes
    made, other = one.malloc(5 << 20, "mb1"), one.malloc(100)
    made.memset(3)
    made.copy_to(other, at=(4 << 20) - 10, length=20)
    other.move_to(other, at=0, to=5, length=50)
    made.move(["mb0"])
    made.move("mb2", block=1)
    with pytest.raises(lite.OutOfRange):
        made.copy_to(other)
    with pytest.raises(lite.NoSuchNode):
        made.move("mb7")


def test_locks_and_barriers(nodes: tuple[lite.Node, lite.Node]) -> None:
    one, two = nodes
    mine, theirs = one.lock("door", home="mb2"), two.lock("door")
    with mine, pytest.raises(lite.TimedOut):
        theirs.acquire(0.1)
    with theirs:
        pass
    with pytest.raises(lite.NotHeld):
        mine.release()
    other = threading.Thread(target=two.barrier, args=("here", 2, 10))
    other.start()
    one.barrier("here", 2, 10)
    other.join()
    with pytest.raises(lite.TimedOut):
        one.barrier("here", 2, 0.1)
