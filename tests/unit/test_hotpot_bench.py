"""What experiment `hotpot` makes of its samples, in the shape that the issue names."""

from __future__ import annotations

from pathlib import Path

from experiments import hotpot
from orchestrator import bench

RATES = {f"{workload}_ops_per_s": 10.0 * (1 + n) for n, workload in enumerate(hotpot.WORKLOADS)}
COSTS = {"mrmw_1_us": 100.0, "mrmw_2_us": 190.0, "mrsw_1_us": 90.0, "mrsw_2_us": 225.0}


def test_the_summary_is_what_was_asked_for() -> None:
    half = {quantity: rate / 2 for quantity, rate in RATES.items()}
    found = hotpot.summary({"hotpot": half, "redis": RATES, "commits": COSTS})
    assert found["ycsb"]["F"] == {"hotpot_ops_per_s": 30.0, "redis_ops_per_s": 60.0, "ratio": 0.5}  # type: ignore[index]
    assert found["commit_us"] == {"mrmw": {"1": 100.0, "2": 190.0}, "mrsw": {"1": 90.0, "2": 225.0}}
    assert found["commit_2_over_1"] == {"mrmw": 1.9, "mrsw": 2.5}


def test_the_experiment_can_be_loaded_and_drawn(tmp_path: Path) -> None:
    variants = bench.load("hotpot").variants
    samples: dict[str, list[bench.Sample]] = {
        "hotpot": [{**RATES}, {**RATES}],
        "redis": [{**RATES}],
        "commits": [{quantity: [cost] for quantity, cost in COSTS.items()}],
    }
    assert set(samples) == set(variants)
    chart = hotpot.figure({variant: bench.medians(rows) for variant, rows in samples.items()}, samples)
    chart.savefig(tmp_path / "plot.svg")
    assert "commit of 1 KiB" in (tmp_path / "plot.svg").read_text()
