"""Parts that move, and pages that go, under programs that run: services with threads, over the stand-in verbs of LITE,
on devices with less room than the dataset."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from guest_agents.hotpot.blocks import PAGE
from tests.unit import lite_pair
from tests.unit.hotpot_rack import Blade, output, plug, rack, shells

pytestmark = [
    pytest.mark.long, pytest.mark.skipif(lite_pair.missing() is not None, reason=str(lite_pair.missing()))
]  # fmt: skip
Rack = dict[str, Blade]
MIB = 1 << 20
COUNT = """
name, turns, part = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with session.open(name) as d:
    def add(t):
        cell = t.acquire(part * 65536, 8).cast("Q")
        cell[0] += 1
    for turn in range(turns):
        d.run(add, replicas=2)
"""


@pytest.fixture(scope="module")
def blades(tmp_path_factory: pytest.TempPathFactory, lite_core: Path) -> Iterator[Rack]:
    with rack(tmp_path_factory.mktemp("hotpot"), lite_core, "gm0", "mb0", "mb1", prepare=plug) as made:
        yield made


@pytest.mark.parametrize("mode", ["mrmw", "mrsw"])
def test_nothing_is_lost_of_counters_whose_homes_move_all_the_time(blades: Rack, mode: str) -> None:
    with shells(blades["gm0"]) as [shell]:
        shell.do(f"d = session.create({mode!r}, 262144, mode={mode!r}, chunk=65536)")
        running = [blade.start(COUNT, mode, 60, part) for blade in (blades["mb0"], blades["mb1"]) for part in (0, 1, 1)]
        numbers = [blade.service.node.node_id for blade in blades.values()]
        moves, deadline = 0, time.monotonic() + 60
        while any(program.poll() is None for program in running) and time.monotonic() < deadline:
            for part in (0, 1):
                with suppress(AssertionError):  # it is moving already
                    shell.do(f"d.migrate({part * 65536}, {numbers[moves % 3]})")
                    moves += 1
            time.sleep(0.2)
        for program in running:
            output(program)
        assert [shell.do(f"int.from_bytes(d.memory[{part * 65536}:{part * 65536 + 8}], 'little')")
                for part in (0, 1)] == [120, 240]  # fmt: skip
        assert sum(blade.service.owner.counts["migrations"] for blade in blades.values()) > 1
        shell.do("d.close()")
        shell.do(f"session.delete({mode!r})")


def test_a_dataset_larger_than_a_blades_pmem_in_less_memory_than_it_has_pages(blades: Rack) -> None:
    size = 36 * MIB  # a device has 32
    service = blades["mb0"].service
    usual, service.eviction.limits.mapped = service.eviction.limits.mapped, 256 * PAGE
    try:
        with shells(blades["mb0"], blades["mb1"]) as [here, there]:
            here.do(f"d = session.create('large', {size})")
            there.do("d = session.open('large')")
            for at in range(0, size, MIB):
                here.do(f"d.memory[{at}:{at + 8}] = ({at} + 1).to_bytes(8, 'little')")
                here.do(f"d.commit(({at}, 8))")
            for shell in (there, here):
                found = shell.do(f"[int.from_bytes(d.memory[at:at + 8], 'little') for at in range(0, {size}, {MIB})]")
                assert found == [at + 1 for at in range(0, size, MIB)]
            assert here.do(f"sum(d.memory[at] for at in range(8, {size // 8}, 4096))") == 0
            cache = next(opened.cache for opened in service._all_opened())
            deadline = time.monotonic() + 20
            while len(cache.pages()) > 256 and time.monotonic() < deadline:
                time.sleep(0.1)
            assert len(cache.pages()) <= 256
            assert cache.counts["evicted"] > 800
            found = here.do(f"[int.from_bytes(d.memory[at:at + 8], 'little') for at in range(0, {size}, {MIB})]")
            assert found == [at + 1 for at in range(0, size, MIB)]
            for shell in (here, there):
                shell.do("d.close()")
            here.do("session.delete('large')")
    finally:
        service.eviction.limits.mapped = usual
