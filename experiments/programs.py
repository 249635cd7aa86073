"""Experiment `programs`: real programs with an ExCache of 100, 50 and 25 % of their working set, outputs compared.

A program fails when its output, errors or exit code are not those of the run without ExCache before it, on the same
blade. Times are from one emulated machine: figures beside each other compare, microseconds mean little.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from experiments.blades import rack
from experiments.real_programs import PROGRAMS, SCRIPTS, SMALL, TEXT, TEXT_BYTES, RealProgram
from orchestrator.bench import Sample
from orchestrator.corpus import english
from orchestrator.events import Emit, Note, step
from orchestrator.settings import Settings
from orchestrator.ssh import client

if TYPE_CHECKING:
    from fabric import Connection

NAME = "bench-programs"  # a rack of its own: one that runs is not touched
FOLDER = "/root/programs"
STATS = f"{FOLDER}/stats.json"
SMALLEST = 2 << 20
"""Bytes: no ExCache is smaller."""
RUN_SECONDS = 1200.0
COUNTS = ("misses", "flushes", "zero_fills", "faults", "packed_hits", "forks", "managed", "bytes_in", "bytes_out")


@dataclass(frozen=True)
class Bed:
    """A processor blade with everything in FOLDER, and what each program did there without an ExCache."""

    blade: Connection
    local: dict[str, tuple[int, str, str]] = field(default_factory=dict)


@contextmanager
def prepared(rack_file: Path, emit: Emit) -> Iterator[Bed]:
    """A fresh rack; the programs' files are on its processor blade."""
    with rack(rack_file, NAME, emit) as (paths, specs):
        blade = next(spec for spec in specs.values() if spec.kind == "processor")
        with client.connect(paths, blade.name, blade.mgmt_address) as connection:
            put_files(connection)
            yield Bed(connection)


def put_files(blade: Connection) -> None:
    """Make FOLDER on a blade, with texts and scripts."""
    with english(Settings.from_environment()).open("rb") as source, TemporaryDirectory() as made:
        text = source.read(TEXT_BYTES)
        contents = {TEXT: text, SMALL: text[: TEXT_BYTES // 4], **{n: s.encode() for n, s in SCRIPTS.items()}}
        client.run(blade, f"mkdir -p {FOLDER}")
        for name, content in contents.items():
            (Path(made) / name).write_bytes(content)
            blade.put(f"{made}/{name}", f"{FOLDER}/{name}")


def sample(variant: str, bed: Bed, emit: Emit) -> Sample:
    """All programs once; `variant` is "local" or the ExCache in percent of the working set."""
    values: Sample = {}
    for program in PROGRAMS:
        with step(emit, "programs", f"{variant} {program.name}"):
            one = run_local(bed, program) if variant == "local" else run_paged(bed, program, int(variant), emit)
        values.update({f"{program.name}_{quantity}": value for quantity, value in one.items()})
    return values


def run_local(bed: Bed, program: RealProgram) -> dict[str, float]:
    """Without an ExCache; what it did is kept to compare with."""
    bed.local[program.name], seconds = _run(bed, program, "")
    return {"seconds": seconds, "exit_code": bed.local[program.name][0]}


def run_paged(bed: Bed, program: RealProgram, percent: int, emit: Emit) -> dict[str, float]:
    """With an ExCache; counts, and `identical`: 1 or 0."""
    size = excache_of(program, percent)
    client.run(bed.blade, f"rm -f {STATS}")
    did, seconds = _run(bed, program, f"split run --excache {size} --stats {STATS} --")
    counted = json.loads(client.run(bed.blade, f"cat {STATS} || echo {{}}", check=False).stdout)
    same = did == bed.local[program.name] and bool(counted)
    if not same:
        emit(Note(f"{program.name} with an ExCache of {percent} %: {did}, and locally {bed.local[program.name]}"))
    busiest = counted.get("processes") or [{"pages_touched": 0, "hit_ratio_of_faults": None}]
    result: dict[str, float] = {"identical": float(same), "seconds": seconds, "excache_bytes": size,
              "working_set_bytes": max(one["pages_touched"] for one in busiest) * 4096}  # fmt: skip
    result.update({name: counted.get(name, 0) for name in COUNTS})
    if counted.get("hit_ratio_of_faults") is not None:
        result["hit_ratio_of_faults"] = counted["hit_ratio_of_faults"]
    return result


def excache_of(program: RealProgram, percent: int) -> int:
    """Bytes of the ExCache that is so much of a program's working set, or the smallest that there is."""
    return max(int(program.mebibytes * (1 << 20)) * percent // 100, SMALLEST)


def _run(bed: Bed, program: RealProgram, prefix: str) -> tuple[tuple[int, str, str], float]:
    began = monotonic()
    done = client.run(bed.blade, f"cd {FOLDER} && export RUN='{prefix}' && {program.command}", check=False,
                      timeout=RUN_SECONDS)  # fmt: skip
    return (done.exit_code, done.stdout, done.stderr), round(monotonic() - began, 3)


def summary(medians: dict[str, dict[str, float]]) -> dict[str, object]:
    """By program: what it is, its local seconds and, by ExCache in percent, counts and the slowdown.

    A program that fits its ExCache has no pager that counts; so its working set is the largest of all runs.
    """
    local = medians["local"]
    result: dict[str, object] = {}
    paged = {variant: values for variant, values in medians.items() if variant != "local"}
    for program in PROGRAMS:
        seconds = local[f"{program.name}_seconds"]
        most = max(values[f"{program.name}_working_set_bytes"] for values in paged.values())
        row: dict[str, object] = {"what": program.what, "local_seconds": seconds, "working_set_bytes": most}
        for variant, values in paged.items():
            own = {q.removeprefix(f"{program.name}_"): v for q, v in values.items() if q.startswith(program.name)}
            share = round(own["excache_bytes"] / most, 2) if most else None
            row[variant] = {**own, "slowdown": round(own["seconds"] / seconds, 2), "excache_over_working_set": share}
        result[program.name] = row
    runs = [values[f"{program.name}_identical"] for program in PROGRAMS for values in paged.values()]
    return {**result, "outputs_identical": min(runs) == 1}


def figure(medians: dict[str, dict[str, float]], samples: dict[str, list[Sample]]) -> Figure:
    """Misses and wall time against the local run's, by program and size of the ExCache."""
    chart = Figure(figsize=(10, 4), layout="constrained")
    left, right = chart.subplots(1, 2)
    shares = [variant for variant in medians if variant != "local"]
    for at, share in enumerate(shares):
        places = [row + 0.25 * at for row in range(len(PROGRAMS))]
        slow = [medians[share][f"{p.name}_seconds"] / medians["local"][f"{p.name}_seconds"] for p in PROGRAMS]
        left.bar(places, [medians[share][f"{p.name}_misses"] for p in PROGRAMS], 0.25, label=f"{share} %")
        right.bar(places, slow, 0.25, label=f"{share} %")
    for axes, title in ((left, "misses"), (right, "wall time / local (emulated)")):
        axes.set_xticks([row + 0.25 for row in range(len(PROGRAMS))], [p.name for p in PROGRAMS], rotation=45)
        axes.set_yscale("symlog" if axes is left else "log")
        axes.set_title(title)
        axes.legend(title="ExCache / working set")
    return chart
