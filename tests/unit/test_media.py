"""Hotpot's media on a pmem device: what other files of Hotpot may expect of media.py, with files and with a device."""

from __future__ import annotations

from pathlib import Path

import pytest

from guest_agents.hotpot import media
from guest_agents.hotpot.errors import Corrupt, NoSpace, VersionMismatch
from guest_agents.hotpot.media import Folder, Media
from guest_agents.pmem import Places, open_device
from orchestrator import pmem
from orchestrator.settings import BladePaths

SIZE = 4 << 20


class Node:
    """A folder of media and the two files of its blade's device."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "hotpot"
        self.folder.mkdir()
        self.files = BladePaths(root)
        self.on()

    def on(self, mode: str = "devdax") -> None:
        """The blade starts; what was in its folder is gone with its memory."""
        pmem.prepare(self.files, SIZE)
        for file in self.folder.iterdir():
            file.unlink()
        Places(mode, SIZE, str(self.files.pmem_vol), 0, str(self.files.pmem), 0).save(self.folder / media.DEVICE)

    def power_cycle(self, survive: float = 0.0) -> None:
        """Cut its power, and start it again."""
        pmem.pull_power(self.files, survive)
        self.on()


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def test_only_what_was_persisted_is_there_after_a_power_failure(node: Node) -> None:
    one, two = Media(node.folder / "home-1", 100_000), Media(node.folder / "home-2", 1 << 40, reserve=False)
    one.write(0, b"persisted")
    one.persist(0, 9)
    one.write(4096, b"stored")
    two.reserve(1 << 39, 10)
    two.write(1 << 39, b"far")
    two.persist_all([(1 << 39, 3)])
    assert one.read(4096, 6) == b"stored"
    assert media.backing(node.folder) == "pmem"
    assert sorted(path.name for path in node.folder.glob("home-*")) == ["home-1", "home-2"]
    one.close()
    two.close()
    node.power_cycle()
    log = Media(node.folder / "log", 4096)
    assert {path.name: path.stat().st_size for path in node.folder.glob("home-*")} == {
        "home-1": 100_000, "home-2": 1 << 40}, "whoever looks what is there finds it"  # fmt: skip
    one, two = Media(node.folder / "home-1", 100_000), Media(node.folder / "home-2", 1 << 40, reserve=False)
    assert one.read(0, 9) == b"persisted"
    assert one.read(4096, 6) == bytes(6), "a store that was not persisted is gone"
    assert two.read(1 << 39, 3) == b"far"
    one.remove()
    assert not (node.folder / "home-1").exists()
    two.close()
    log.close()
    node.power_cycle()
    one = Media(node.folder / "home-1", 50_000)
    assert one.read(0, 50_000) == bytes(50_000)
    one.close()


def test_a_store_may_survive_and_the_test_above_would_see_it(node: Node) -> None:
    one = Media(node.folder / "home-1", 8192)
    one.write(4096, b"stored")
    one.close()
    node.power_cycle(1.0)
    one = Media(node.folder / "home-1", 8192)
    assert one.read(4096, 6) == b"stored"
    one.close()


@pytest.mark.parametrize("mode", ["devdax", "fsdax"])
def test_a_folder_knows_its_media(node: Node, mode: str) -> None:
    node.on(mode)
    folder = Folder(node.folder)
    assert folder.names() == []
    for name in ("log", "home-1", "home-2"):
        folder.open(name, 4096).close()
    kept = folder.open("home-2", 4096)
    kept.write(0, b"kept")
    kept.persist(0, 4)
    folder.remove("home-1")
    folder.remove("never")
    assert folder.names() == ["home-2", "log"]
    kept.close()
    node.power_cycle()
    assert folder.names() == (["home-2", "log"] if mode == "devdax" else []), "files are gone with the blade's memory"


def test_a_device_that_is_full_or_in_use_says_so(node: Node) -> None:
    with pytest.raises(NoSpace, match="are free"):
        Media(node.folder / "media", SIZE)
    assert not (node.folder / "media").exists()
    media_ = Media(node.folder / "media", SIZE, reserve=False)
    with pytest.raises(NoSpace):
        media_.reserve(0, SIZE)
    with pytest.raises(VersionMismatch, match="media has"):
        Media(node.folder / "media", 4096)
    media_.close()
    with open_device(node.folder / media.DEVICE), pytest.raises(NoSpace, match="somebody uses"):
        Media(node.folder / "media", SIZE, reserve=False)
    Media(node.folder / "media", SIZE, reserve=False).close()


def test_a_device_that_others_were_given_is_left_alone(node: Node) -> None:
    with open_device(node.folder / media.DEVICE) as device:
        device.memory[100:104] = b"mine"
    one = Media(node.folder / "home-1", 4096)
    one.write(0, b"in a file")
    assert media.backing(node.folder) == "files (the persistent memory holds something else)"
    assert (node.folder / "home-1").read_bytes()[:9] == b"in a file"
    one.close()
    with open_device(node.folder / media.DEVICE) as device:
        assert bytes(device.memory[:104]) == bytes(100) + b"mine"
    node.on("fsdax")
    assert media.backing(node.folder) == "files (its pmem is in mode fsdax)"
    one = Media(node.folder / "home-1", 4096)
    assert media.backing(node.folder) == "files (its pmem is in mode fsdax)"
    one.close()


def test_looking_for_what_is_there_changes_nothing(node: Node) -> None:
    """A device is given to Hotpot by its first media, not by a look; after a power failure it alone can tell."""
    new = node.files.pmem.read_bytes()
    assert not media.holds(node.folder, "node")
    assert node.files.pmem.read_bytes() == node.files.pmem_vol.read_bytes() == new == bytes(len(new))
    Media(node.folder / "node", 4096).close()
    (node.folder / "node").unlink()
    assert media.holds(node.folder, "node")
    assert not media.holds(node.folder, "other")
    with open_device(node.folder / media.DEVICE) as device:
        device.memory[4100] ^= 1
    (node.folder / "node").unlink(missing_ok=True)
    with pytest.raises(Corrupt):
        media.holds(node.folder, "node")
    with open_device(node.folder / media.DEVICE) as device:
        device.memory[:4] = b"else"
    assert not media.holds(node.folder, "node")


def test_damage_is_reported_and_nothing_is_used(node: Node) -> None:
    Media(node.folder / "home-1", 4096).close()
    with open_device(node.folder / media.DEVICE) as device:
        device.memory[4100] ^= 1
    before = node.files.pmem_vol.read_bytes()
    for _ in range(2):
        with pytest.raises(Corrupt, match="entry 0 of the names"):
            Media(node.folder / "home-2", 4096)
    assert node.files.pmem_vol.read_bytes() == before


def test_without_a_device_media_are_files(tmp_path: Path) -> None:
    one = Media(tmp_path / "one", 4096)
    assert media.backing(tmp_path) == "files"
    one.write(0, b"x")
    one.close()
    kept = Media(tmp_path / "one", 4096)
    assert kept.read(0, 1) == b"x"
    kept.remove()
    assert not (tmp_path / "one").exists()
