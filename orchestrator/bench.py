"""Run experiments: variants interleaved (A B A B), every raw sample and where it came from kept beside the result.

An experiment is ``experiments/NAME.yml`` and the module it names, which has

- ``prepared(rack_file, emit)``: a context manager around all samples; what it yields is the test bed;
- ``sample(variant, bed, emit) -> {quantity: value or list of values}``: one round of one variant;
- ``summary(medians) -> {key: JSON}``: the figures people ask for, from ``medians[variant][quantity]``;
- ``figure(medians, samples) -> matplotlib Figure``.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import statistics
import subprocess
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from orchestrator.errors import RacklessError
from orchestrator.events import Emit, Note, step

Sample = dict[str, float | list[float] | str]
"""Quantity -> its value in one round, or its values, one for each operation; or, a text, why it has none."""

PROJECT = Path(__file__).resolve().parent.parent
EXPERIMENTS = PROJECT / "experiments"


class Experiment(BaseModel):
    """One experiments/NAME.yml."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    title: str
    module: str
    rack: Path
    rounds: PositiveInt
    quick_rounds: PositiveInt
    variants: tuple[str, ...]


def load(name: str) -> Experiment:
    """The experiment called ``name``; RacklessError when there is none."""
    path = EXPERIMENTS / f"{name}.yml"
    try:
        return Experiment.model_validate(yaml.safe_load(path.read_text()))
    except FileNotFoundError:
        known = ", ".join(sorted(p.stem for p in EXPERIMENTS.glob("*.yml")))
        raise RacklessError(f"there is no experiment called {name!r}", hint=f"experiments here: {known}") from None
    except (ValidationError, yaml.YAMLError) as error:
        raise RacklessError(f"{path} is not a valid experiment: {error}") from None


def run(name: str, quick: bool, out: Path, emit: Emit) -> dict[str, Any]:
    """Run an experiment; its summary, medians, samples and provenance, also written into ``out/NAME-TIME/``.

    The folder has ``samples.jsonl`` (a line per sample, written as they come), ``result.json`` and ``plot.svg``.
    """
    experiment = load(name)
    module = importlib.import_module(experiment.module)
    rounds = experiment.quick_rounds if quick else experiment.rounds
    folder = out / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    folder.mkdir(parents=True)
    where = provenance()  # before the measurement: it tells how busy this machine was already
    samples: dict[str, list[Sample]] = {variant: [] for variant in experiment.variants}
    with module.prepared(PROJECT / experiment.rack, emit) as bed, (folder / "samples.jsonl").open("w") as raw:
        for number in range(rounds):
            for variant in experiment.variants:
                with step(emit, name, f"round {number + 1} {variant}"):
                    values = module.sample(variant, bed, emit)
                samples[variant].append(values)
                raw.write(json.dumps({"round": number + 1, "variant": variant, "time": time.time(), **values}) + "\n")
                raw.flush()
    middle = {variant: medians(rows) for variant, rows in samples.items()}
    summary = module.summary(middle)
    result = {**summary, "summary": list(summary), "experiment": name, "title": experiment.title, "rounds": rounds,
              "median": middle, "missing": missing(samples), "provenance": where}  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    module.figure(middle, samples).savefig(folder / "plot.svg", bbox_inches="tight")
    emit(Note(f"raw samples, result and plot: {folder}"))
    return result


def medians(rows: list[Sample]) -> dict[str, float]:
    """The median of each quantity over all rounds; the values of all rounds count alike."""
    pooled: dict[str, list[float]] = {}
    for row in rows:
        for quantity, value in row.items():
            if isinstance(value, str):
                continue
            pooled.setdefault(quantity, []).extend(value if isinstance(value, list) else [value])
    return {quantity: round(statistics.median(values), 3) for quantity, values in pooled.items()}


def missing(samples: dict[str, list[Sample]]) -> dict[str, dict[str, str]]:
    """Variant -> quantity -> why it had no value in some round."""
    reasons = {variant: {quantity: value for row in rows for quantity, value in row.items() if isinstance(value, str)}
               for variant, rows in samples.items()}  # fmt: skip
    return {variant: said for variant, said in reasons.items() if said}


def provenance() -> dict[str, Any]:
    """Where and from what a measurement was made."""
    git = subprocess.run(["git", "-C", PROJECT, "describe", "--always", "--dirty"], capture_output=True, text=True,
                         check=False)  # fmt: skip
    return {"commit": git.stdout.strip() or None, "time": datetime.now().astimezone().isoformat(timespec="seconds"),
            "host_cpus": os.cpu_count(), "load_before": os.getloadavg()[0], "kernel": platform.release(),
            "python": platform.python_version()}  # fmt: skip
