"""Experiment `lite_qos`: one program's high-priority 64 B reads while another writes 64 KiB, 16 at a time, at low
priority, to the same blade (SOSP'17, section 6.2). In `alone` nobody writes; the other variants are LITE's modes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from matplotlib.figure import Figure

from experiments import lite
from experiments.blades import serving
from experiments.lite import Pair
from orchestrator.bench import Sample
from orchestrator.errors import RacklessError
from orchestrator.events import Emit
from orchestrator.ssh import client

COUNT = 100
_RUN_SECONDS = 600
_SET = "from guest_agents import lite; lite.connect().qos({mode!r})"


@contextmanager
def prepared(rack_file: Path, emit: Emit) -> Iterator[Pair]:
    """The two blades of experiment `lite`."""
    with lite.prepared(rack_file, emit) as pair:
        yield pair


def sample(variant: str, pair: Pair, emit: Emit) -> Sample:
    """Microseconds of each read, and per 64 KiB of the bulk writer meanwhile."""
    mode = "none" if variant == "alone" else variant
    for connection in (pair.near, pair.far):
        client.run(connection, f'python3 -c "{_SET.format(mode=mode)}"')
    read = f"{lite.BENCH} urgent 64 {COUNT} {pair.name}"
    if variant == "alone":
        said = client.run(pair.near, read, timeout=_RUN_SECONDS).stdout
        return {"read_64B_us": [float(line) for line in said.split()]}
    with serving(pair.near, f"{lite.BENCH} bulk {pair.name}") as written:
        before = len(written)
        said = client.run(pair.near, read, timeout=_RUN_SECONDS).stdout
        bulk = [float(line) for line in written[before:]]
        if not bulk:
            raise RacklessError(f"the bulk writer wrote nothing during {COUNT} reads ({variant})")
    return {"read_64B_us": [float(line) for line in said.split()], "bulk_65536B_us": bulk}


def summary(medians: dict[str, dict[str, float]]) -> dict[str, object]:
    """By mode: the read's median beside the undisturbed one, and the writer's rate in MB/s."""
    alone = medians["alone"]["read_64B_us"]
    return {
        mode: {
            "read_64B_us": found["read_64B_us"],
            "over_alone": round(found["read_64B_us"] / alone, 2),
            **({"bulk_MB_per_s": round(65536 / found["bulk_65536B_us"], 2)} if "bulk_65536B_us" in found else {}),
        }
        for mode, found in medians.items()
    }


def figure(medians: dict[str, dict[str, float]], samples: dict[str, list[Sample]]) -> Figure:
    """The distribution of the reads' latencies by mode, and what is left for the writer."""
    chart = Figure(figsize=(9, 4), layout="constrained")
    left, right = chart.subplots(1, 2)
    for mode, rows in samples.items():
        values = sorted(value for row in rows for value in _all(row["read_64B_us"]))
        left.step(values, [(n + 1) / len(values) for n in range(len(values))], label=mode)
    left.set(title="64 B reads of high priority", xscale="log", xlabel="µs", ylabel="share of reads")
    left.legend()
    modes = [mode for mode in medians if "bulk_65536B_us" in medians[mode]]
    right.bar(modes, [65536 / medians[mode]["bulk_65536B_us"] for mode in modes])
    right.set(title="bulk writer of low priority", ylabel="MB/s, median")
    return chart


def _all(value: float | list[float]) -> list[float]:
    return value if isinstance(value, list) else [value]
