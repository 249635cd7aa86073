"""Emptying a node of LITE: what moves, what stays, who is told. In-process blades with real control servers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guest_agents import control
from guest_agents.lite import errors
from tests.unit.lite_blades import SECRET, Rack

ALL = 31


@pytest.fixture
def rack(tmp_path: Path) -> Iterator[Rack]:
    made = Rack(tmp_path, ["gm0", "mb0", "mb1", "mb2"])
    yield made
    made.close()


def drain(rack: Rack, node: str, **fields: Any) -> dict[str, Any]:
    """As the host asks: it learns the manager's life first."""
    with control.ControlClient((rack["gm0"].address, rack.port), SECRET) as client:
        (manager,) = [m for m in client.call("member.list")["members"] if m["name"] == "gm0"]
        life = [manager["node_id"], manager["incarnation"]]
        return client.call("lite.directory.drain", node=node, meant_for=life, **fields)


@pytest.mark.long
def test_what_others_use_moves_while_they_use_it(rack: Rack) -> None:
    free = rack["mb1"].free
    one, two = rack["mb0"].client(), rack["mb2"].client()
    spread = one.call("malloc", size=10 << 20, name="big", nodes=["mb1", "mb2"], spread=True, permissions=ALL)["handle"]
    kept = one.call("malloc", size=4096, name="kept", nodes=["mb1"], keep=True, permissions=ALL)["handle"]
    one.write(kept, 0, b"keep me")
    one.call("unmap", handle=kept)
    mapped = two.call("map", name="big")["handle"]
    written, stop = 0, threading.Event()

    def write() -> None:
        nonlocal written
        while not stop.is_set():
            one.write(spread, written % (5 << 20) * 2, b"%08d" % written)
            written += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert drain(rack, "mb1", dry=True)["moved"] == (6 << 20) + 4096
        assert rack["mb1"].tier.blocks.stat()["blocks"] == 3
        told = drain(rack, "mb1")
    finally:
        stop.set()
        writer.join()
    assert told == {"moved": (6 << 20) + 4096, "own": 0, "locks": []}
    assert (rack["mb1"].tier.blocks.stat()["blocks"], rack["mb1"].free) == (0, free)
    last = (written - 1) % (5 << 20) * 2
    assert two.read(mapped, last, 8) == b"%08d" % (written - 1)
    again = two.call("map", name="kept")["handle"]
    assert two.read(again, 0, 7) == b"keep me"
    new = one.call("malloc", size=8 << 20, spread=True)
    assert {block["node"] for block in new["blocks"]} == {"mb0", "mb2"}, "nothing new goes there"
    assert drain(rack, "mb1") == {"moved": 0, "own": 0, "locks": []}
    drain(rack, "mb1", cancel=True)
    new = one.call("malloc", size=9 << 20, spread=True)
    assert "mb1" in {block["node"] for block in new["blocks"]}


def test_what_ends_with_the_node_is_told_and_stays(rack: Rack) -> None:
    one, two = rack["mb1"].client(), rack["mb2"].client()
    one.call("malloc", size=4096)
    for client in (one, two):
        client.call("lock_create", name="door", home="mb1")
    one.call("lock_create", name="mine")
    assert drain(rack, "mb1", dry=True) == {"moved": 0, "own": 1, "locks": ["door"]}


def test_without_room_elsewhere_it_is_refused_and_works_as_before(rack: Rack) -> None:
    one = rack["mb0"].client()
    for name in ("mb0", "mb2"):
        one.call("malloc", size=15 << 20, nodes=[name])
    handle = one.call("malloc", size=8 << 20, name="box", nodes=["mb1"])["handle"]
    one.write(handle, 5 << 20, b"whole")
    with pytest.raises(control.ControlError, match="LMR 'box' finds no other node"):
        drain(rack, "mb1")
    assert one.read(handle, 5 << 20, 5) == b"whole"
    assert one.call("malloc", size=1 << 20, nodes=["mb1"])["blocks"][0]["node"] == "mb1"
    with pytest.raises(control.ControlError, match="no node is called") as caught:
        drain(rack, "mb9")
    assert caught.value.code == errors.NoSuchNode.code
