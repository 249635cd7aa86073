"""Experiment `up`: the seconds of `rackless up` and `rackless down`, with blades restored and with blades booted."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator import engine, rackfile
from orchestrator.events import Emit
from orchestrator.model import Rack
from orchestrator.settings import Settings

NAME = "bench-up"  # a rack of its own: one that runs is not touched


@contextmanager
def prepared(rack_file: Path, emit: Emit) -> Iterator[None]:
    """Everything cached before the first sample; nothing left after the last."""
    settings, rack = Settings.from_environment(), _own_rack(rack_file)
    try:
        engine.up(settings, rack, emit)
        engine.down(settings, NAME, emit)
        yield
    finally:
        engine.down(settings, NAME, emit)


def sample(variant: str, rack_file: Path, emit: Emit) -> dict[str, float]:
    """One `up` and one `down`; seconds of each."""
    settings, rack = Settings.from_environment(), _own_rack(rack_file)
    result = engine.up(settings, rack, emit, cold=variant == "booted")
    began = time.monotonic()
    engine.down(settings, NAME, emit)
    return {"up_seconds": result.seconds, "down_seconds": time.monotonic() - began}


def summary(medians: dict[str, dict[str, float]]) -> dict[str, float]:
    """The figure that the issue asks for."""
    return {"booted_over_restored": medians["booted"]["up_seconds"] / medians["restored"]["up_seconds"]}


def _own_rack(rack_file: Path) -> Rack:
    return rackfile.load(rack_file).model_copy(update={"name": NAME})
