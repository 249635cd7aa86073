"""Settings of the unit tests."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from guest_agents.lite.core import Config
from tests.unit import lite_pair, stand_in
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


@pytest.fixture(scope="session")
def lite_core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LITE's core with stand-in verbs, compiled once for all workers of pytest-xdist."""
    if reason := lite_pair.missing():
        pytest.skip(reason)
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with (folder / "lite_core.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return lite_pair.build(folder)


@pytest.fixture
def pair(lite_core: Path) -> Iterator[lite_pair.Pair]:
    """Two LITE cores that are connected."""
    made = lite_pair.Pair(lite_core, Config(timeout_ms=5000, spin_us=100))
    yield made
    made.close()


@pytest.fixture
def rackless(stand_in_rack: stand_in.StandInRack, tmp_path: Path) -> Rackless:
    """The `rackless` command on stand-in blades, whose splitkernel only runs the program."""
    stand_in_rack.install("split", SPLIT)
    return Rackless(stand_in_rack, tmp_path)
