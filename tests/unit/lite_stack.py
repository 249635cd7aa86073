"""All of LITE on this machine: real tiers and directory over real native cores, which stand-in verbs join."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from guest_agents.lite import abi
from guest_agents.lite.core import Config, Core
from tests.unit import lite_blades

MEMORY = 64 << 20


def _core(_fabric: object) -> Core:
    return Core(Config(spin_us=100))  # there are more cores here than processors


@contextmanager
def stack(folder: Path, library: Path, *names: str) -> Iterator[dict[str, str]]:
    """Blades with these names, the first the manager; for each the path of its socket for programs."""
    with whole(folder, library, *names) as rack:
        yield {name: str(blade.tier.settings.socket) for name, blade in rack.blades.items()}


@contextmanager
def whole(folder: Path, library: Path, *names: str) -> Iterator[lite_blades.Rack]:
    """The same, with all of each blade in reach."""
    with (
        mock.patch.object(abi, "LIBRARY", library),
        mock.patch.object(lite_blades, "StandInCore", _core),
        mock.patch.dict(os.environ, LD_LIBRARY_PATH=str(library.parent)),  # programs of Hotpot find libhotpot there
    ):
        rack = lite_blades.Rack(folder, list(names), memory=MEMORY)
        try:
            yield rack
        finally:
            rack.close()
