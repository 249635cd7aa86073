"""Experiment `excache` without blades: the shape of its result, and what becomes of peers that cannot be measured."""

from __future__ import annotations

import json
from typing import Any

import pytest

from experiments import excache, iops, misses
from orchestrator import bench
from orchestrator.bench import Sample


def sample(seconds: float, **more: float) -> dict[str, float]:
    """One variant's: gawk and sort at 50 and 25 %."""
    names = [f"{name}_{share}" for name in excache.PROGRAMS for share in excache.SHARES]
    counts = {f"{name}_{key}": 10.0 for name in names for key in (*excache.COUNTED, "peak_bytes")}
    swapped = {f"{name}_{key}": 3.0 for name in names for key in ("swapped_in", "swapped_out")}
    return {**dict.fromkeys(names, seconds), **counts, **swapped, **more}


LOCAL = {"gawk_100": 2.0, "sort_100": 1.0}


def test_every_variant_of_the_file_is_known() -> None:
    experiment = bench.load("excache")
    assert set(experiment.variants) == {"local", "excache", *excache.PEERS, "misses", "files", "nfs"}
    assert (bench.PROJECT / experiment.rack).exists()


def test_the_result_has_the_shape_that_was_asked_for() -> None:
    medians = {"local": LOCAL, "excache": sample(6), **{peer: sample(12) for peer in excache.PEERS}, "nbd": sample(8)}
    found: dict[str, Any] = json.loads(json.dumps(excache.summary(medians)))
    assert set(found) == {"gawk", "sort", "one_miss", "storage"}
    row = found["gawk"]["25"]
    assert row["slowdown"] == 3
    assert row["peers"] == {"nbd": 4, "nvme_tcp": 6, "nvme_rdma": 6, "zram": 6, "disk": 6}
    assert (row["ratio_to_best_network_swap"], row["ratio_to_disk"]) == (0.75, 0.5)
    assert row["modelled_slowdown"] == pytest.approx(1 + (20 * 6.31 + 10 * 6.11) / 1e6 / 2, abs=1e-4)
    assert row["counts"]["misses"] == 10
    assert row["peers_counts"]["disk"] == {"swapped_in": 3, "swapped_out": 3}
    assert excache.figure(medians, {}).axes


def test_a_peer_that_cannot_be_made_is_null_and_its_reason_is_in_the_result() -> None:
    reason: Sample = {f"{name}_{share}": "no such module" for name in excache.PROGRAMS for share in excache.SHARES}
    samples: dict[str, list[Sample]] = {"nbd": [reason], "disk": [{**sample(12)}], "local": [{**LOCAL}]}
    medians = {"excache": sample(6), **{variant: bench.medians(rows) for variant, rows in samples.items()}}
    row: Any = excache.summary(medians)["sort"]
    assert row["50"]["peers"] == {"nbd": None, "nvme_tcp": None, "nvme_rdma": None, "zram": None, "disk": 12}
    assert row["50"]["ratio_to_best_network_swap"] is None
    assert row["50"]["ratio_to_best_network_swap_at_most"] is None
    assert bench.missing(samples) == {"nbd": dict.fromkeys(reason, "no such module")}
    assert excache.figure(medians, {}).axes


def test_a_peer_that_was_stopped_counts_as_so_slow_at_least() -> None:
    medians = {"local": LOCAL, "excache": sample(6), "nbd": {"gawk_25_at_least": 12.0}}
    row: Any = excache.summary(medians)["gawk"]
    assert (row["25"]["peers"]["nbd"], row["25"]["peers_at_least"]) == (None, {"nbd": 6})
    assert row["25"]["ratio_to_best_network_swap_at_most"] == 0.5


def test_without_ours_there_are_no_ratios() -> None:
    row: Any = excache.summary({"local": LOCAL, "nbd": sample(6)})["gawk"]
    assert (row["25"]["slowdown"], row["25"]["ratio_to_best_network_swap"]) == (None, None)


def test_the_parts_of_a_miss_add_up() -> None:
    counted = {"misses": 4, "miss_nanoseconds": 8e6, "read_nanoseconds": 6e6, "install_nanoseconds": 4e5}
    found = misses.parts([2500.0, 2100.0, 2300.0, 2700.0], counted)
    assert found["touch_mean"] == 2400
    assert sum(value for part in misses.PARTS if isinstance(value := found[part], float)) == pytest.approx(2400)
    assert (found["read"], found["delivery"]) == (1500, 400)
    assert misses.summary({}) == {}
    assert iops.summary({}, {}) == {}


def test_files_stand_beside_nfs() -> None:
    found: Any = iops.summary({"read_random": 100.0}, {"read_random": 50.0})
    assert found["read_random"] == {"vnode": 100, "nfs": 50}
    assert found["write_random"] == {"vnode": None, "nfs": None}
