"""Random transactions of several programs on several nodes, checked: every acknowledged commit is there, none is torn,
nothing was lost, and all copies of a page are the same."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest_agents.hotpot import blocks
from guest_agents.hotpot.blocks import STRIDE as BLOCK
from tests.unit import hotpot_writer, lite_pair
from tests.unit.hotpot_history import CELL, NOBODY, STRIDE, Attempt, Cell, attempts_of, check
from tests.unit.hotpot_rack import PROJECT, SECONDS, Blade, Shell, rack, shells
from tests.unit.lite_blades import eventually

needs_lite = pytest.mark.skipif(lite_pair.missing() is not None, reason=str(lite_pair.missing()))
Rack = dict[str, Blade]
CELLS = 40
_sets = itertools.count()


@pytest.fixture(scope="module")
def blades(tmp_path_factory: pytest.TempPathFactory, lite_core: Path) -> Iterator[Rack]:
    with rack(tmp_path_factory.mktemp("hotpot"), lite_core, "gm0", "mb0", "mb1", "mb2") as made:
        yield made


def writer(blade: Blade, *words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.unit.hotpot_writer", *map(str, words)], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, cwd=PROJECT, env={**os.environ, "RACKLESS_HOTPOT": str(blade.socket)},
    )  # fmt: skip


def make(blades: Rack, mode: str) -> tuple[str, int]:
    name, size = f"random {next(_sets)}", CELLS * STRIDE + 3 * 4096
    blades["mb0"].run(f"session.create({name!r}, {size}, mode={mode!r}, chunk=8192)")
    return name, size


def contents(blade: Blade, name: str) -> bytes:
    return bytes.fromhex(blade.run(f"print(bytes(session.open({name!r}).memory).hex())"))


def agree(blades: Rack, name: str) -> None:
    """Home on media, home in registered memory, copies on other nodes' media, and what each node's programs read."""
    seen = {contents(blade, name) for blade in blades.values()}
    assert len(seen) == 1, "nodes do not read the same"
    [data] = seen
    services = {blade.service.node.node_id: blade.service for blade in blades.values()}
    pages = 0
    for service in services.values():
        for home in service.owner.homes():
            if home.record.name != name:
                continue
            assert not home.locks
            for page in range(home.record.pages):
                if home.record.owner(page) != service.node.node_id:
                    continue
                pages += 1
                kept = home.read(page)
                assert kept.data == data[page * 4096 : (page + 1) * 4096]
                assert kept == blocks.unseal(home.memory.read(BLOCK, at=home.record.slot(page) * BLOCK))
                for node in home.copies[page]:
                    assert services[node].copies.read(home.record.id, page) == kept
    assert pages * 4096 == len(data)
    for service in services.values():
        # What owners keep of MRSW's commits, for others that may ask, goes a while later.
        eventually(lambda service=service: service.stat()["log_used"] == service.stat()["intents_used"] == 0)  # type: ignore[misc]
        assert service._log.records() == service._intents.records() == []


def judge(blades: Rack, name: str, said: list[str]) -> list[Attempt]:
    """What writers said, against what is there."""
    data = contents(blades["gm0"], name)
    final = {cell: Cell.unpack(data[cell * STRIDE : cell * STRIDE + CELL]) for cell in range(CELLS)}
    attempts = [attempt for text in said for attempt in
                attempts_of(line for line in text.splitlines() if not line.startswith("slot"))]  # fmt: skip
    assert check(attempts, final) == []
    agree(blades, name)
    return attempts


@needs_lite
@pytest.mark.long
@pytest.mark.parametrize("mode", ["mrmw", "mrsw"])
@pytest.mark.parametrize("seed", range(3))
def test_random_transactions(blades: Rack, mode: str, seed: int) -> None:
    name, _size = make(blades, mode)
    writers = [writer(blades[node], name, CELLS, slot, seed * 100 + slot, 60, 3, 3 if node == "mb2" else 61)
               for slot, node in enumerate(("gm0", "mb0", "mb0", "mb1", "mb2"))]  # fmt: skip
    said = []
    for program in writers:
        out, errors = program.communicate(timeout=SECONDS)
        assert program.returncode == 0, errors
        said.append(out)
    attempts = judge(blades, name, said)
    assert sum(attempt.acknowledged for attempt in attempts) > 60
    data = contents(blades["mb2"], name)
    for slot, out in enumerate(said):
        place = CELLS * STRIDE // 4096 * 4096 + 4096 + slot * hotpot_writer.SLOT
        assert f"slot {int.from_bytes(data[place : place + 8], 'little')}" in out.splitlines()
    blades["gm0"].run(f"session.delete({name!r})")


@needs_lite
@pytest.mark.long
@pytest.mark.parametrize("mode", ["mrmw", "mrsw"])
def test_programs_that_are_killed_leave_nothing_half_done(blades: Rack, mode: str) -> None:
    rand = random.Random(mode)
    name, _size = make(blades, mode)
    keeper = blades["mb1"].start(f"d = session.open({name!r})\nprint('ready', flush=True)\ninput()")
    assert keeper.stdout is not None
    keeper.stdout.readline()
    said: list[str] = []
    nodes = ("gm0", "mb0", "mb1", "mb1")
    slots = [
        (slot, writer(blades[node], name, CELLS, slot, slot, 10_000, 3, 10_001)) for slot, node in enumerate(nodes)
    ]
    for round_ in range(12):
        time.sleep(rand.uniform(0.2, 0.8))
        index = rand.randrange(len(slots))
        slot, program = slots[index]
        program.kill()
        said.append(program.communicate(timeout=SECONDS)[0])
        # Its stores to the page of slots stay, as those of a thread would; another slot is not held up by them.
        slots[index] = (slot, writer(blades[nodes[slot]], name, CELLS, slot, 1000 + round_, 10_000, 3, 10_001))
    for _, program in slots:
        program.kill()
        said.append(program.communicate(timeout=SECONDS)[0])
    keeper.communicate("\n", timeout=SECONDS)
    attempts = judge(blades, name, said)
    assert sum(attempt.acknowledged for attempt in attempts) > 20


def until_it_works(program: Shell, commit: str) -> None:
    """Homes hold pages still, too, while they make copies: then who commits is told to retry."""
    while True:
        try:
            program.do(commit)
            return
        except AssertionError as failure:
            if not str(failure).startswith("Retry"):
                raise


@needs_lite
@pytest.mark.long
@pytest.mark.parametrize("mode", ["mrmw", "mrsw"])
def test_plain_stores_of_neighbours_against_a_model(blades: Rack, mode: str) -> None:
    """Stripes of two pages belong to nodes in turn; who stores in them, commits parts, and takes pages back."""
    rand = random.Random(mode)
    name, stripe, size = f"striped {mode}", 24, 2 * 4096
    hosts = ("mb0", "mb0", "mb1", "mb2")
    nodes = sorted(set(hosts))
    committed = bytearray(size)
    wanted = {node: bytearray(size) for node in nodes}
    with shells(*(blades[host] for host in hosts)) as programs:
        programs[0].do(f"d = session.create({name!r}, {size}, mode={mode!r}, chunk=4096)")
        for program in programs[1:]:
            program.do(f"d = session.open({name!r})")
        for _ in range(250):
            program, node = rand.choice(list(zip(programs, hosts, strict=True)))
            number = rand.randrange(nodes.index(node), size // stripe, len(nodes))
            low = rand.randrange(number * stripe, (number + 1) * stripe)
            high = rand.randrange(low, (number + 1) * stripe) + 1
            step = rand.random()
            if step < 0.6:
                data = rand.randbytes(high - low)
                program.do(f"d.memory[{low}:{high}] = {data!r}")
                wanted[node][low:high] = data
            elif step < 0.95:
                until_it_works(program, f"d.commit(({low}, {high - low}), replicas={rand.randint(1, 3)})")
                committed[low:high] = wanted[node][low:high]
            else:
                program.do(f"d.discard(({low}, 1))")
                page = low // 4096 * 4096
                wanted[node][page : page + 4096] = committed[page : page + 4096]
            seen: bytes = program.do("bytes(d.memory)")
            for place in range(nodes.index(node) * stripe, size, len(nodes) * stripe):
                mine = slice(place, min(place + stripe, size // stripe * stripe))
                assert seen[mine] == wanted[node][mine]
        for program, node in zip(programs, hosts, strict=True):
            program.do("d.discard((0, d.size))")
            assert program.do("bytes(d.memory)") == committed, node
        for program in programs:
            program.do("d.close()")
    agree(blades, name)


# The checker itself


def attempt(number: int, done: bool = True, **read: tuple[int, int]) -> Attempt:
    return Attempt(number, {int(cell[1:]): Cell(*found) for cell, found in read.items()}, done)


def test_the_checker_is_content_with_a_possible_history() -> None:
    attempts = [attempt(1, c0=(0, 0), c1=(0, 0)), attempt(2, False, c1=(1, 1)), attempt(3, c1=(2, 2)),
                attempt(4, False, c0=(1, 1))]  # fmt: skip
    assert check(attempts, {0: Cell(1, 1), 1: Cell(3, 3), 2: Cell(0, NOBODY)}) == []


@pytest.mark.parametrize(("attempts", "final", "word"), [
    ([attempt(1, c0=(0, 0)), attempt(2, c0=(0, 0))], {0: Cell(1, 2)}, "lost"),
    ([attempt(1, c0=(0, 0))], {0: Cell(0, 0)}, "at the end"),
    ([attempt(1, False, c0=(0, 0), c1=(0, 0))], {0: Cell(1, 1), 1: Cell(0, 0)}, "cell 1 is"),
    ([attempt(1, c0=(0, 0), c1=(1, 2)), attempt(2, c0=(1, 1), c1=(0, 0))], {0: Cell(2, 2), 1: Cell(2, 1)}, "before"),
    ([], {0: None}, "torn"),
    ([attempt(1, c0=(0, 0)), attempt(2, c0=(1, 3)), attempt(3, False, c0=(5, 0))], {0: Cell(2, 2)}, "read"),
])  # fmt: skip
def test_the_checker_finds(attempts: list[Attempt], final: dict[int, Cell | None], word: str) -> None:
    assert any(word in complaint for complaint in check(attempts, final))
