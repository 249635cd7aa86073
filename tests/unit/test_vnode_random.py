"""Random file operations on /vnode do what they do locally: the real FUSE mount over the real file service. No VM."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest

from tests.unit import fsx, vnode_mounts
from tests.unit.vnode_mounts import mounted

pytestmark = [pytest.mark.long, pytest.mark.skipif(bool(vnode_mounts.missing()), reason=str(vnode_mounts.missing()))]

SEED = int(os.environ.get("RACKLESS_FSX_SEED", "20181008"))
STEPS = int(os.environ.get("RACKLESS_FSX_STEPS", "10000"))


@pytest.mark.parametrize("blades", [1, 2])
def test_random_operations_do_what_they_do_locally(tmp_path: Path, blades: int) -> None:
    local = tmp_path / "local"
    local.mkdir()
    local.chmod(0o777)
    with mounted(tmp_path, blades) as mounts:
        mounts.root.chmod(0o777)
        fsx.compare(mounts.blades, local, SEED, STEPS if blades == 1 else STEPS // 5)


def test_random_operations_do_not_notice_where_buffers_are(tmp_path: Path) -> None:
    """The same, while each piece of data goes another way: by this memory blade, by that, by none."""
    local = tmp_path / "local"
    local.mkdir()
    local.chmod(0o777)
    with mounted(tmp_path, 2) as mounts:
        mounts.root.chmod(0o777)
        mounts.tell("memory 2")
        fsx.compare(mounts.blades, local, SEED, STEPS // 5)
        assert sum(stats["hits"] for stats in mounts.counts()["buffers"]) > 0


def test_random_operations_do_not_notice_restarts(tmp_path: Path) -> None:
    """The same, while the storage blade goes away and comes back with nothing kept, and answers are lost."""
    local = tmp_path / "local"
    local.mkdir()
    local.chmod(0o777)
    chance, stop = random.Random(SEED), threading.Event()
    harmless = ["GETATTR", "READ", "OPEN", "TRUNCATE", "CHMOD", "UNLINK", "READDIR", "LOOK", "RMDIR"]
    with mounted(tmp_path) as mounts:
        mounts.root.chmod(0o777)

        def trouble() -> None:
            while not stop.wait(0.1):
                for word in ("down", "restart", "up", f"deaf {chance.choice(harmless)}"):
                    mounts.tell(word)
                    stop.wait(chance.random() / 50)

        troubling = threading.Thread(target=trouble)
        troubling.start()
        try:
            fsx.compare(mounts.blades, local, SEED, STEPS // 8)
        finally:
            stop.set()
            troubling.join()
