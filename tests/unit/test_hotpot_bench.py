"""What experiment `hotpot` makes of its samples, in the shape that the issue names."""

from __future__ import annotations

from pathlib import Path

from experiments import hotpot
from orchestrator import bench

RATES = {f"{workload}_ops_per_s": 10.0 * (1 + n) for n, workload in enumerate(hotpot.WORKLOADS)}
COSTS = {
    **{f"{mode}_copies_{n}_us": cost * n for mode, cost in (("mrmw", 100.0), ("mrsw", 90.0)) for n in hotpot.COPIES},
    "mrmw_size_512_us": 80.0, "mrsw_ranges_8_us": 300.0, "mrmw_owners_3_us": 250.0,
}  # fmt: skip
REST = {
    "fetch": {"fetch_us": 300.0, "lite_read_us": 200.0},
    "rates": {"commits_per_s_1": 20.0, "commits_per_s_2": 30.0},
    "pagerank": {"pagerank_hotpot_us": 800.0, "pagerank_sockets_us": 400.0},
}


def test_the_summary_is_what_was_asked_for() -> None:
    half = {quantity: rate / 2 for quantity, rate in RATES.items()}
    found = hotpot.summary({"hotpot": half, "redis": RATES, "commits": COSTS, **REST})
    assert found["ycsb"]["F"] == {"hotpot_ops_per_s": 30.0, "redis_ops_per_s": 60.0, "ratio": 0.5}  # type: ignore[index]
    assert found["commit_us"]["mrsw"] == {"1": 90.0, "2": 180.0, "3": 270.0, "4": 360.0}  # type: ignore[index]
    assert found["commit_2_over_1"] == {"mrmw": 2.0, "mrsw": 2.0}
    assert found["commit_us_by_bytes"] == {"mrmw": {"512": 80.0}, "mrsw": {}}
    assert found["commit_us_by_ranges"] == {"mrmw": {}, "mrsw": {"8": 300.0}}
    assert found["commit_us_by_owners"] == {"mrmw": {"3": 250.0}, "mrsw": {}}
    assert found["commits_per_s"] == {"1": 20.0, "2": 30.0}
    assert found["fetch_us"] == {"hotpot": 300.0, "lite_read": 200.0, "ratio": 1.5}
    assert found["pagerank_round_us"] == {"hotpot": 800.0, "sockets": 400.0, "ratio": 2.0}


def test_the_experiment_can_be_loaded_and_drawn(tmp_path: Path) -> None:
    variants = bench.load("hotpot").variants
    samples: dict[str, list[bench.Sample]] = {
        "hotpot": [{**RATES}, {**RATES}],
        "redis": [{**RATES}],
        "commits": [{quantity: [cost] for quantity, cost in COSTS.items()}],
        **{variant: [{**values}] for variant, values in REST.items()},
    }
    assert set(samples) == set(variants)
    chart = hotpot.figure({variant: bench.medians(rows) for variant, rows in samples.items()}, samples)
    chart.savefig(tmp_path / "plot.svg")
    assert "commit of 1 KiB" in (tmp_path / "plot.svg").read_text()
