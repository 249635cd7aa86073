"""Hotpot on pmem: at the moment a commit is acknowledged, media have it, and nothing that was only stored."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest_agents.hotpot import media
from guest_agents.hotpot.blocks import PAGE, STRIDE, Copy, unseal
from guest_agents.hotpot.media import Media
from guest_agents.pmem import Places
from orchestrator import pmem
from orchestrator.settings import BladePaths
from tests.unit import lite_pair
from tests.unit.hotpot_rack import Blade, rack, shells

pytestmark = [
    pytest.mark.skipif(lite_pair.missing() is not None, reason=str(lite_pair.missing())),
    pytest.mark.long,
]
SIZE = 32 << 20
PAGES = 6


def _plug(folder: Path) -> None:
    """Give the blade of a folder a device."""
    files = BladePaths(folder)
    pmem.prepare(files, SIZE)
    Places("devdax", SIZE, str(files.pmem_vol), 0, str(files.pmem), 0).save(folder / media.DEVICE)


@pytest.fixture(scope="module")
def blades(tmp_path_factory: pytest.TempPathFactory, lite_core: Path) -> Iterator[dict[str, Blade]]:
    with rack(tmp_path_factory.mktemp("hotpot"), lite_core, "gm0", "mb0", "mb1", prepare=_plug) as made:
        yield made


def survivors(blade: Blade, folder: Path, name: str) -> dict[int, Copy]:
    """What a power failure at this moment would leave of a blade's pages, by their place."""
    folder.mkdir()
    shutil.copy(BladePaths(blade.folder).pmem, folder / "pmem.raw")
    _plug(folder)
    there = Media(folder / "nothing", 4096)  # the first: now it is known what there is
    try:
        size = (folder / name).stat().st_size
        found = Media(folder / name, size)
        pages = {at // STRIDE: unseal(found.read(at, STRIDE)) for at in range(0, size, STRIDE)}
        found.close()
        return pages
    finally:
        there.close()


@pytest.mark.parametrize("mode", ["mrmw", "mrsw"])
def test_what_is_acknowledged_is_on_media_and_nothing_else(
    blades: dict[str, Blade], tmp_path: Path, mode: str
) -> None:
    with shells(blades["mb0"]) as (program,):
        program.do(f"d = session.create({mode!r}, {PAGES * PAGE}, chunk={PAGE}, mode={mode!r})")
        record = blades["mb0"].service.dispatcher("open", name=mode)["record"]
        for turn in range(1, 4):
            program.do(f"t = d.transaction(replicas=2); v = t.acquire(0, {PAGES * PAGE})")
            program.do(f"v[:] = bytes([{turn}]) * len(v)")
            program.do("v = None; t.commit()")
            program.do(f"d.memory[0:{PAGES * PAGE}] = b'x' * {PAGES * PAGE}")
            homes = copies = 0
            for name, blade in blades.items():
                owned = record["owners"].count(blade.service.node.node_id)
                found = survivors(blade, tmp_path / f"{turn}-{name}", f"home-{record['id']}")
                assert [page.data for page in found.values()] == [bytes([turn]) * PAGE] * owned
                assert {page.version for page in found.values()} == {turn}
                homes += owned
                if blade.service.copies.held(record["id"]):
                    kept = survivors(blade, tmp_path / f"{turn}-{name}-copies", f"copies-{record['id']}")
                    copies += sum(page == Copy(turn, bytes([turn]) * PAGE) for page in kept.values())
            assert (homes, copies) == (PAGES, PAGES)
            program.do(f"d.discard((0, {PAGES * PAGE}))")
        program.do("d.close()")
        program.do(f"session.delete({mode!r})")
    assert all(media.backing(blade.folder) == "pmem" for blade in blades.values())
