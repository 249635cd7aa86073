"""The workload generator of YCSB: its distributions are those that are published."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from experiments import ycsb

DRAWS = 40_000


def near(seen: int, share: float) -> bool:
    """Within five standard deviations of what such a share makes of DRAWS."""
    return bool(abs(seen - DRAWS * share) < 5 * (DRAWS * share * (1 - share)) ** 0.5 + 1)


def test_fnv_is_the_published_one() -> None:
    """FNV-1a of eight zero bytes."""
    assert ycsb.fnv64(0) == 0xA8C7F832281A39C5
    assert len({ycsb.key_of(number) for number in range(1000)}) == 1000
    assert all(len(ycsb.key_of(number)) == 24 for number in range(1000))


def test_zipfian_has_the_probabilities_of_its_law() -> None:
    rand, zipfian, items = random.Random(1), ycsb.Zipfian(100), 100
    seen = Counter(zipfian.pick(rand) for _ in range(DRAWS))
    total = ycsb.zeta(items)
    assert set(seen) <= set(range(items))
    assert near(seen[0], 1 / total)
    assert near(seen[1], 2**-ycsb.THETA / total)
    tail = sum(seen[i] for i in range(10, items))  # the others are an approximation, in the original too
    assert tail / DRAWS == pytest.approx(sum((i + 1) ** -ycsb.THETA for i in range(10, items)) / total, abs=0.03)


def test_zipfian_that_grows_is_like_one_that_was_made_so() -> None:
    grown = ycsb.Zipfian(50)
    for _ in range(30):
        grown.grow()
    one, other = random.Random(3), random.Random(3)
    made = ycsb.Zipfian(80)
    assert [grown.pick(one) for _ in range(500)] == [made.pick(other) for _ in range(500)]


def test_scrambled_scatters_the_popular() -> None:
    rand, pick = random.Random(2), ycsb.scrambled(1000)
    seen = Counter(pick(rand) for _ in range(DRAWS))
    top = [number for number, _ in seen.most_common(2)]
    assert top == [ycsb.fnv64(0) % 1000, ycsb.fnv64(1) % 1000]
    assert abs(top[0] - top[1]) > 1
    assert seen[top[0]] > 2 * DRAWS / 100  # 1 / 26.47 of all, and not 1 / 1000
    assert len(seen) > 900


@pytest.mark.parametrize("workload", ycsb.WORKLOADS)
def test_shares_of_operations(workload: str) -> None:
    seen = Counter(operation.what for operation in ycsb.operations(workload, 500, DRAWS // 4))
    shares = ycsb.WORKLOADS[workload].shares
    assert sum(shares.values()) == pytest.approx(1)
    assert set(seen) == set(shares)
    for what, share in shares.items():
        assert seen[what] / (DRAWS // 4) == pytest.approx(share, abs=0.02)


def test_latest_prefers_what_was_inserted_last() -> None:
    inserted = [ycsb.key_of(number) for number in range(100)]
    ages: Counter[int] = Counter()
    for operation in ycsb.operations("D", 100, 10_000, client=1, clients=3):
        if operation.what == "insert":
            inserted.append(operation.key)
        else:
            ages[len(inserted) - 1 - inserted.index(operation.key)] += 1
    assert ages[0] > ages[1] > ages[4] > ages[30]
    assert set(inserted[100:]) <= {ycsb.key_of(101 + 3 * i) for i in range(10_000)}


def test_scans_are_of_any_length_up_to_the_most() -> None:
    lengths = Counter(op.length for op in ycsb.operations("E", 100, DRAWS // 2) if op.what == "scan")
    assert set(lengths) == set(range(1, ycsb.SCAN_MOST + 1))
    assert max(lengths.values()) < 2 * min(lengths.values())


def test_clients_differ_and_insert_different_records() -> None:
    one, other = ([*ycsb.operations("D", 50, 2000, client, 2)] for client in (0, 1))
    assert one != other
    assert one == [*ycsb.operations("D", 50, 2000, 0, 2)]
    assert not {op.key for op in one if op.what == "insert"} & {op.key for op in other if op.what == "insert"}
