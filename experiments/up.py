"""Experiment `up`: the seconds of `rackless up` and `rackless down`, with blades restored and with blades booted."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from matplotlib.figure import Figure

from orchestrator import engine, rackfile
from orchestrator.bench import Sample
from orchestrator.events import Emit
from orchestrator.model import Rack
from orchestrator.settings import Settings

NAME = "bench-up"  # a rack of its own: one that runs is not touched


@contextmanager
def prepared(rack_file: Path, emit: Emit) -> Iterator[Rack]:
    """Everything cached before the first sample; nothing left after the last."""
    settings, rack = Settings.from_environment(), rackfile.load(rack_file).model_copy(update={"name": NAME})
    try:
        engine.up(settings, rack, emit)
        engine.down(settings, NAME, emit)
        yield rack
    finally:
        engine.down(settings, NAME, emit)


def sample(variant: str, rack: Rack, emit: Emit) -> Sample:
    """One `up` and one `down`; seconds of each."""
    settings = Settings.from_environment()
    result = engine.up(settings, rack, emit, cold=variant == "booted")
    began = time.monotonic()
    engine.down(settings, NAME, emit)
    return {"up_seconds": result.seconds, "down_seconds": time.monotonic() - began}


def summary(medians: dict[str, dict[str, float]]) -> dict[str, float]:
    """The figure that the issue asks for."""
    return {"booted_over_restored": round(medians["booted"]["up_seconds"] / medians["restored"]["up_seconds"], 2)}


def figure(medians: dict[str, dict[str, float]], samples: dict[str, list[Sample]]) -> Figure:
    """Every sample as a dot, the median as a bar."""
    chart = Figure(figsize=(6, 3))
    axes = chart.subplots()
    for row, (variant, values) in enumerate(samples.items()):
        axes.barh(row, medians[variant]["up_seconds"], color="#9ecae1")
        axes.plot([value["up_seconds"] for value in values], [row] * len(values), "k.")
    axes.set_yticks(range(len(samples)), list(samples))
    axes.set_xlabel("seconds of `rackless up`")
    return chart
