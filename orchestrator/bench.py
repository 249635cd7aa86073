"""Run experiments: variants interleaved (A B A B), every raw sample and where it came from kept beside the result.

An experiment is ``experiments/NAME.yml`` and the module it names, which has ``prepared(rack_file, emit)`` (a context
manager around all samples), ``sample(variant, rack_file, emit) -> {quantity: value}`` and ``summary(medians)``.
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
from pydantic import BaseModel, ConfigDict, ValidationError

from orchestrator.errors import RacklessError
from orchestrator.events import Emit, Note, step

PROJECT = Path(__file__).resolve().parent.parent
EXPERIMENTS = PROJECT / "experiments"


class Experiment(BaseModel):
    """One experiments/NAME.yml."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    title: str
    module: str
    rack: Path
    rounds: int
    quick_rounds: int
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
    """Run an experiment; medians, samples and provenance, also written to files in ``out/NAME-TIME/``."""
    experiment = load(name)
    module = importlib.import_module(experiment.module)
    folder = out / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    folder.mkdir(parents=True)
    rack = PROJECT / experiment.rack
    samples: dict[str, list[dict[str, float]]] = {variant: [] for variant in experiment.variants}
    with module.prepared(rack, emit), (folder / "samples.jsonl").open("w") as raw:
        for number in range(experiment.quick_rounds if quick else experiment.rounds):
            for variant in experiment.variants:
                with step(emit, name, f"round {number + 1} {variant}"):
                    values = module.sample(variant, rack, emit)
                samples[variant].append(values)
                raw.write(json.dumps({"round": number + 1, "variant": variant, "time": time.time(), **values}) + "\n")
                raw.flush()
    medians = {variant: {quantity: round(statistics.median(row[quantity] for row in rows), 3) for quantity in rows[0]}
               for variant, rows in samples.items()}  # fmt: skip
    result = {"experiment": name, "title": experiment.title, "median": medians,
              "summary": {key: round(value, 3) for key, value in module.summary(medians).items()},
              "samples": samples, "provenance": provenance()}  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    emit(Note(f"raw samples and result: {folder}"))
    return result


def provenance() -> dict[str, Any]:
    """Where and from what a measurement was made."""
    git = subprocess.run(["git", "-C", PROJECT, "describe", "--always", "--dirty"], capture_output=True, text=True,
                         check=False)  # fmt: skip
    return {"commit": git.stdout.strip() or None, "time": datetime.now().astimezone().isoformat(timespec="seconds"),
            "host_cpus": os.cpu_count(), "load_before": os.getloadavg()[0], "kernel": platform.release(),
            "python": platform.python_version()}  # fmt: skip
