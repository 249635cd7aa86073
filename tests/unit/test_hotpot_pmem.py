"""Hotpot on pmem: at the moment a commit is acknowledged, media have it, and nothing that was only stored."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest_agents.hotpot import media
from guest_agents.hotpot.blocks import PAGE, STRIDE, unseal
from guest_agents.hotpot.media import Folder
from orchestrator.settings import BladePaths
from tests.unit import lite_pair
from tests.unit.hotpot_rack import Blade, plug, rack, shells

pytestmark = [
    pytest.mark.skipif(lite_pair.missing() is not None, reason=str(lite_pair.missing())),
    pytest.mark.long,
]
PAGES = 6


@pytest.fixture(scope="module")
def blades(tmp_path_factory: pytest.TempPathFactory, lite_core: Path) -> Iterator[dict[str, Blade]]:
    with rack(tmp_path_factory.mktemp("hotpot"), lite_core, "gm0", "mb0", "mb1", prepare=plug) as made:
        yield made


def survivors(blade: Blade, folder: Path, prefix: str) -> list[bytes]:
    """The pages that a power failure at this moment would leave in a blade's media of these names."""
    folder.mkdir()
    shutil.copy(BladePaths(blade.folder).pmem, folder / "pmem.raw")
    plug(folder)
    found = []
    there = Folder(folder)
    for name in there.names():
        if name.startswith(prefix):
            kept = there.open(name, (folder / name).stat().st_size)
            found += [unseal(kept.read(at, STRIDE)).data for at in range(0, kept.size, STRIDE)]
            kept.close()
    return found


@pytest.mark.parametrize("mode", ["mrmw", "mrsw"])
def test_what_is_acknowledged_is_on_media_and_nothing_else(blades: dict[str, Blade], tmp_path: Path, mode: str) -> None:
    with shells(blades["mb0"]) as (program,):
        program.do(f"d = session.create({mode!r}, {PAGES * PAGE}, chunk={PAGE}, mode={mode!r})")
        for turn in range(1, 4):
            program.do(f"t = d.transaction(replicas=2); v = t.acquire(0, {PAGES * PAGE})")
            program.do(f"v[:] = bytes([{turn}]) * len(v)")
            program.do("v = None; t.commit()")
            program.do(f"d.memory[0:{PAGES * PAGE}] = b'x' * {PAGES * PAGE}")
            homes, copies = ([page for name, blade in blades.items()
                              for page in survivors(blade, tmp_path / f"{turn}-{name}-{prefix}", prefix)]
                             for prefix in ("home-", "copies-"))  # fmt: skip
            assert homes == [bytes([turn]) * PAGE] * PAGES
            assert sum(page == bytes([turn]) * PAGE for page in copies) == PAGES
            assert {page[:1] for page in copies} <= {b"\0", bytes([turn])}, "no store, and nothing of before"
            program.do(f"d.discard((0, {PAGES * PAGE}))")
        program.do("d.close()")
        program.do(f"session.delete({mode!r})")
    assert all(media.backing(blade.folder) == "pmem" for blade in blades.values())
