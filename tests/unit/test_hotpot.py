"""Hotpot on all of LITE but the hardware: datasets, loads and stores, commits, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit import lite_pair
from tests.unit.hotpot_rack import Blade, output, rack

pytestmark = pytest.mark.skipif(lite_pair.missing() is not None, reason=str(lite_pair.missing()))
Rack = dict[str, Blade]


@pytest.fixture(scope="module")
def blades(tmp_path_factory: pytest.TempPathFactory, lite_core: Path) -> Iterator[Rack]:
    with rack(tmp_path_factory.mktemp("hotpot"), lite_core, "gm0", "mb0", "mb1", "mb2") as made:
        yield made


def test_a_dataset_is_at_one_address_and_spread_over_owners(blades: Rack) -> None:
    made = blades["mb0"].run("""
with session.create("one", 100_000, chunk=16384) as d:
    print(d.address, d.size, bytes(d.memory) == bytes(d.size))
""")
    there = blades["mb2"].run("""
with session.open("one") as d: print(d.address, d.size, bytes(d.memory) == bytes(d.size))
[about] = [about for about in session.datasets() if about["name"] == "one"]
assert about["owners"] == [1, 2, 3, 4] and about["open"] == [], about
""")
    assert made == there
    assert made.split()[1:] == ["102400", "True"]
    assert [len(blade.service.owner.homes()) for blade in blades.values()] == [1, 1, 1, 1]
    assert sum(home.record.owners.count(1) for home in blades["gm0"].service.owner.homes()) == 2
    blades["gm0"].run('session.delete("one")\nassert not session.datasets()')
    assert not any(list(blade.folder.glob("home-*")) for blade in blades.values())


COUNT = """
import random
d = session.open("counters")
def body(t):
    views = [t.acquire(at, 8).cast("Q") for at in random.sample(range(0, 12 * 4096, 4096), 2)]
    for view in views:
        view[0] += 1
for _ in range(int(sys.argv[1])):
    d.run(body, replicas=2)
"""


@pytest.mark.parametrize("mode", ["mrmw", "mrsw"])
def test_increments_of_many_are_all_there(blades: Rack, mode: str) -> None:
    blades["gm0"].run(f'session.create("counters", 12 * 4096, mode="{mode}", chunk=4096)')
    programs = [blades[name].start(COUNT, 10) for name in ("mb0", "mb1", "mb1", "mb2")]
    for program in programs:
        output(program)
    total = blades["gm0"].run('print(sum(session.open("counters").memory[:].cast("Q")))')
    assert int(total) == 4 * 10 * 2
    blades["gm0"].run('session.delete("counters")')
