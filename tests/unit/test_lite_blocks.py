"""The memory a node gives to LMRs: one account for all who give, slabs that come and go, zeroed blocks."""

from __future__ import annotations

import ctypes
import random
import threading
import time

import pytest

from guest_agents.budget import Budget
from guest_agents.lite.blocks import Blocks
from guest_agents.lite.errors import Freed, NoMemory
from guest_agents.lite.records import Piece, Record
from tests.unit.lite_blades import Fabric, StandInCore

MIB = 1 << 20


@pytest.fixture
def core() -> StandInCore:
    return StandInCore(Fabric())


def test_two_users_share_one_account(core: StandInCore) -> None:
    budget = Budget(8 * MIB)
    blocks = Blocks(core, budget, MIB)
    assert budget.take("splitkernel", 5 * MIB)
    with pytest.raises(NoMemory):
        blocks.allocate(1, [4 * MIB])
    held = blocks.allocate(1, [3 * MIB])
    assert not budget.take("splitkernel", 1)
    assert budget.taken() == {"splitkernel": 5 * MIB, "lite": 3 * MIB}
    blocks.free(1, [held[0].address])
    assert budget.taken() == {"splitkernel": 5 * MIB}
    assert core.slabs == []


def test_all_or_nothing(core: StandInCore) -> None:
    budget = Budget(8 * MIB)
    blocks = Blocks(core, budget, MIB)
    with pytest.raises(NoMemory):
        blocks.allocate(1, [4 * MIB, 4 * MIB, 1])
    assert (budget.room, core.slabs, blocks.held()) == (8 * MIB, [], [])


def test_a_slab_that_cannot_be_registered_costs_nothing(core: StandInCore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(size: int) -> None:
        raise NoMemory(f"{size} bytes cannot be pinned")

    monkeypatch.setattr(core, "slab", fail)
    budget = Budget(8 * MIB)
    with pytest.raises(NoMemory, match="cannot be pinned"):
        Blocks(core, budget, MIB).allocate(1, [64])
    assert budget.room == 8 * MIB


def test_random_blocks_never_overlap_are_zero_and_all_come_back(core: StandInCore) -> None:
    chance = random.Random(5)
    budget = Budget(32 * MIB)
    blocks = Blocks(core, budget, MIB)
    held: dict[int, int] = {}
    for _ in range(3000):
        if held and chance.random() < 0.5:
            address = chance.choice(list(held))
            ctypes.memset(address, 0xFF, held.pop(address))
            blocks.free(7, [address])
        else:
            lengths = [chance.randint(1, 100_000) for _ in range(chance.randint(1, 3))]
            try:
                given = blocks.allocate(7, lengths)
            except NoMemory:
                assert sum(held.values()) > 16 * MIB
                continue
            for block, length in zip(given, lengths, strict=True):
                assert block.address % 64 == 0
                assert ctypes.string_at(block.address, length) == bytes(length)
                assert all(block.address + length <= a or a + n <= block.address for a, n in held.items())
                held[block.address] = length
        stat = blocks.stat()
        assert stat["bytes_allocated"] == sum(held.values())
        assert stat["bytes_registered"] == sum(slab.bytes for slab in core.slabs) == budget.total - budget.room
    blocks.free(8, held)
    assert blocks.stat()["blocks"] == len(held)
    blocks.free(7, [*held, *held])
    assert (budget.room, core.slabs) == (32 * MIB, [])


def test_a_block_is_not_given_back_under_a_copy(core: StandInCore) -> None:
    blocks = Blocks(core, Budget(8 * MIB), MIB)
    block = blocks.allocate(1, [4096])[0]
    freed = threading.Event()

    def free() -> None:
        blocks.free(1, [block.address])
        freed.set()

    with blocks.using(1, block.address + 100, 200):
        threading.Thread(target=free, daemon=True).start()
        time.sleep(0.2)
        assert not freed.is_set()
    assert freed.wait(5)
    for owner, address, length in [(1, block.address, 1), (2, block.address, 1), (1, block.address + 4000, 100)]:
        with pytest.raises(Freed), blocks.using(owner, address, length):
            pass


def test_parts_of_an_lmr() -> None:
    record = Record(1, 250, [Piece(2, 9, 1000, 5, 100), Piece(3, 9, 5000, 6, 100), Piece(2, 9, 9000, 5, 50)])
    assert [(p.piece.node, p.address, p.length, p.offset) for p in record.parts(90, 120)] == [
        (2, 1090, 10, 90), (3, 5000, 100, 100), (2, 9000, 10, 200)]  # fmt: skip
    assert list(record.parts(90, 0)) == []
    assert Record.from_json(record.to_json()) == record
