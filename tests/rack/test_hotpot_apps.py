"""The programs on Hotpot, on real blades: what one blade commits the others see."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from guest_agents.hotpot.apps.pagerank import kronecker
from tests.lite_reference import pagerank
from tests.rack.conftest import Rack, unique

pytestmark = [pytest.mark.rack, pytest.mark.timeout(600)]
APP = "python3 -m guest_agents.hotpot.apps"


@pytest.fixture
def name(rack: Rack) -> Iterator[str]:
    """Of a dataset, which is deleted at the end: the next agent of a blade would stumble over it."""
    made = unique("h")
    yield made
    delete = f'from guest_agents import hotpot; s = hotpot.connect(); s.delete("{made}")'
    rack("ssh", "gm0", "--", f"python3 -c '{delete}'", check=False)


def test_a_store_that_three_blades_change_at_once(rack: Rack, name: str) -> None:
    rack.on("pb0", f"echo put start 0 | {APP}.store {name} --mib 1 --replicas 2")
    lines = "for i in 1 2 3 4 5; do echo put {0}$i {0}; echo put same {0}; done; echo delete {0}3; echo delete start"
    running = [
        subprocess.Popen(
            rack.bench.command("ssh", "--rack", rack.name, blade, "--",
                               f"({lines.format(blade)}) | {APP}.store {name} --replicas 2"),
            env=rack.bench.env(), stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
        for blade in ("pb0", "mb0", "mb1")
    ]  # fmt: skip
    assert [process.communicate(timeout=300) and process.returncode for process in running] == [0, 0, 0]
    found = dict(line.split() for line in rack.on("gm0", f"echo scan a 100 | {APP}.store {name}").splitlines())
    assert found.pop("same") in ("pb0", "mb0", "mb1")
    assert found == {f"{blade}{i}": blade for blade in ("pb0", "mb0", "mb1") for i in (1, 2, 4, 5)}


def test_pagerank_of_two_blades(rack: Rack, name: str) -> None:
    scale, rounds = 7, 5
    words = f"{APP}.pagerank {name} --parts 2 --rounds {rounds}"
    other = subprocess.Popen(
        rack.bench.command("ssh", "--rack", rack.name, "mb1", "--", f"{words} --part 1"),
        env=rack.bench.env(), stdin=subprocess.DEVNULL)  # fmt: skip
    said = rack.on("pb0", f"{words} --part 0 --scale {scale}")
    assert other.wait(60) == 0
    got = {int(vertex): float(rank) for vertex, rank in map(str.split, said.splitlines())}
    edges = [(int(a), int(b)) for a, b in kronecker(scale, seed=1)]
    assert got == pytest.approx(pagerank(edges, rounds, count=1 << scale), rel=1e-12)


MOVING = """
import sys
from guest_agents import hotpot
name, first = sys.argv[1], sys.argv[2] == "first"
with hotpot.connect() as s:
    if first:
        s.create(name, 256 << 10, chunk=128 << 10, owners=[s.node_id]).close()
    s.barrier(name + "made", 2)
    d = s.open(name)
    def add(t):
        cell = t.acquire(4096, 8).cast("Q")
        cell[0] += 1
    for turn in range(20):
        if turn == 4 and not first:
            d.migrate(4096, s.node_id)
        d.run(add, replicas=2)
        with s.lock(name):
            count = int.from_bytes(d.memory[8192:8200], "little") + 1
            d.memory[8192:8200] = count.to_bytes(8, "little")
            while True:
                try:
                    d.commit((8192, 8), replicas=2)
                    break
                except hotpot.Retry:
                    pass
    s.barrier(name + "done", 2)
    owners = [about["owners"] for about in s.datasets() if about["name"] == name]
    print(int.from_bytes(d.memory[4096:4104], "little"), int.from_bytes(d.memory[8192:8200], "little"),
          owners == [[s.node_id]], s.stat()["counts"].get("migrations", 0))
    d.close()
"""


def test_a_part_goes_to_another_blade_while_two_write_under_locks_and_barriers_of_lite(rack: Rack, name: str) -> None:
    other = subprocess.Popen(
        rack.bench.command("ssh", "--rack", rack.name, "mb1", "--", f"python3 -c '{MOVING}' {name} second"),
        env=rack.bench.env(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)  # fmt: skip
    old = rack.on("pb0", f"python3 -c '{MOVING}' {name} first").split()
    new = other.communicate(timeout=120)[0].split()
    assert other.returncode == 0
    assert (old, new) == (["40", "40", "False", "1"], ["40", "40", "True", "0"])
