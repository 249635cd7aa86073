"""Settings of the unit tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.unit import stand_in
from tests.unit.stand_in_rackless import SPLIT, Rackless

# No deadline: how fast one example runs says more about the machine than about the code.
settings.register_profile("rackless", max_examples=60, deadline=None)
settings.load_profile("rackless")


@pytest.fixture(scope="session")
def stand_in_rack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[stand_in.StandInRack]:
    """A rack of real sshds in a network namespace; tests that use it are marked netns."""
    if reason := stand_in.missing():
        pytest.skip(reason)
    with stand_in.stand_in_rack(tmp_path_factory.mktemp("rack")) as rack:
        yield rack


@pytest.fixture
def rackless(stand_in_rack: stand_in.StandInRack, tmp_path: Path) -> Rackless:
    """The `rackless` command on stand-in blades, whose splitkernel only runs the program."""
    stand_in_rack.install("split", SPLIT)
    return Rackless(stand_in_rack, tmp_path)
