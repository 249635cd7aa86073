"""A rack that goes back to what it was, and one that is there twice: memory, RDMA, programs, disks, pmem."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.rack.conftest import Bench, Rack, unique

pytestmark = pytest.mark.rack

BLADES = {
    "gm0": {"kind": "manager", "memory": "256 MiB"},
    "mb0": {"kind": "memory", "memory": "256 MiB", "pmem": "64 MiB"},
    "sb0": {"kind": "storage", "memory": "256 MiB", "disk": {"size": "256 MiB"}},
}
TIMING = {"heartbeat": "0.5 s", "dead_after": "6 s"}  # less than the rack stands still, or lies on the disk
FILE = "/srv/vnode/file"

COUNTER = """
import os, time
from guest_agents import lite
with lite.connect() as node:
    notes = node.malloc(4096, on="mb0", name="notes", permissions=lite.Permission.ALL)
    notes.write(b"before")
    count = 0
    while True:
        count += 1
        notes.write(count.to_bytes(8, "little"), at=64)
        assert int.from_bytes(notes.read(8, at=64), "little") == count
        with open("/run/count.new", "w") as file:
            file.write(str(count))
        os.rename("/run/count.new", "/run/count")
        time.sleep(0.05)
"""
NOTES = """
from guest_agents import lite
with lite.connect() as node:
    notes = node.map("notes")
    print(notes.read(6).decode(), int.from_bytes(notes.read(8, at=64), "little"))
    notes.write(b"after!")
"""
PERSIST = "from guest_agents import pmem; d = pmem.open_device(); d.memory[:6] = b'{0}'; d.persist(0, 6); " \
          "d.memory[4096:4102] = b'{0}'"  # fmt: skip
LOOK = "from guest_agents import pmem; d = pmem.open_device(); print(bytes(d.memory[:6]), bytes(d.memory[4096:4102]))"


@pytest.fixture
def small(bench: Bench) -> Iterator[Rack]:
    """A rack that notices death soon."""
    with bench.up("z", blades=BLADES, links={}, membership=TIMING) as made:
        yield made


def python(rack: Rack, blade: str, source: str) -> str:
    return rack.on(blade, f"cd / && python3 -c {shlex.quote(source)}").strip()


def count(rack: Rack) -> int:
    return int(rack.on("sb0", "cat /run/count"))


def snapshot(rack: Rack, *words: str) -> dict[str, Any]:
    return dict(json.loads(rack.bench.rackless("snapshot", *words, "--rack", rack.name, "--json").stdout))


def states(rack: Rack) -> set[str]:
    return {blade["state"] for blade in rack.bench.status(rack.name).values()}


def assert_it_counts(rack: Rack) -> None:
    """Its program, started before the snapshot, goes on: over queue pairs that were saved and restored."""
    before, deadline = count(rack), time.monotonic() + 60
    while count(rack) <= before:
        assert time.monotonic() < deadline, "the counter stands still"


def test_back_and_twice(small: Rack) -> None:
    small.on("sb0", f"echo before > {FILE}; cd /; "
                    f"nohup python3 -c {shlex.quote(COUNTER)} > /run/counter.log 2>&1 < /dev/null & "
                    "until [ -s /run/count ]; do kill -0 $! || { cat /run/counter.log; exit 1; }; sleep 0.1; done")
    python(small, "mb0", PERSIST.format("before"))
    made = snapshot(small, "create", "one")
    print("created:", made["seconds"], made["bytes"] >> 20, "MiB")  # shown with -s
    assert made["blades"] == sorted(BLADES)
    assert_it_counts(small)

    small.on("sb0", f"echo after > {FILE}; sync")
    assert python(small, "gm0", NOTES).split()[0] == "before"
    python(small, "mb0", PERSIST.format("after!"))
    later = count(small)
    small.bench.rackless("fault", "kill", "sb0", "--rack", small.name)

    made = snapshot(small, "restore", "one")
    print("restored:", made["seconds"], "s")
    assert count(small) < later
    assert states(small) == {"ready"}
    assert small.on("sb0", f"cat {FILE}").strip() == "before"
    said, number = python(small, "gm0", NOTES).split()
    assert (said, int(number) > 0) == ("before", True)
    assert python(small, "mb0", LOOK) == "b'before' b'before'"
    assert_it_counts(small)

    other = Rack(small.bench, unique("y"), small.file)
    made = snapshot(small, "clone", "one", other.name)
    print("cloned:", made["seconds"], "s")
    try:
        assert states(other) == {"ready"}
        assert python(other, "gm0", NOTES).split()[0] == "before"  # the first rack's were changed
        assert other.on("sb0", f"cat {FILE}; echo clone > {FILE}; sync").strip() == "before"
        assert small.on("sb0", f"cat {FILE}").strip() == "before"
        # Its persistent memory has a power failure of its own: what was only stored is gone.
        other.bench.rackless("fault", "reset", "mb0", "--rack", other.name)
        assert python(other, "mb0", LOOK) == f"b'before' {bytes(6)!r}"
        assert_it_counts(small)
    finally:
        other.bench.rackless("down", other.name)
    assert snapshot(small, "delete", "one")["bytes"] > 0
