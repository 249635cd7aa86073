"""A blade's persistent-memory devices, on a tree of files like the kernel's; tests/rack/test_pmem.py has the kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from guest_agents import nvdimm
from guest_agents.control import ControlError
from guest_agents.pmem import Device, Places

MIB = 1 << 20
SIZE, HEAD = 16 * MIB, 2 * MIB
ADDRESSES = {"size": SIZE, "vol": 1 << 32, "media": (1 << 32) + SIZE}
NDCTL = """#!/bin/sh -e
echo "$@" >> {root}/asked
namespace=$(ls -d {root}/nd/devices/*/$4)
case $6 in devdax) echo dax;; fsdax) echo memory;; esac > $namespace/mode
printf "now $6" | dd of={root}/mem bs=4096 seek={page} conv=notrunc 2>/dev/null
"""


class Kernel:
    """What the kernel shows of two devices; region0 is media, as seen on blades."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root, self.memory, self.file = root, root / "mem", root / "pmem.json"
        with self.memory.open("wb") as file:
            file.truncate((1 << 32) + 2 * SIZE)
        for number, which in enumerate(("media", "vol")):
            region = root / f"nd/devices/region{number}"
            (region / f"namespace{number}.0").mkdir(parents=True)
            (region / "resource").write_text(hex(ADDRESSES[which]))
            (region / "driver").mkdir()
            (region / f"namespace{number}.0/mode").write_text("raw")
            (region / "namespace_seed").write_text("")
        (root / "nd/devices/wait_probe").write_text("1")
        (root / "nd_region").mkdir()
        self.program("ndctl", NDCTL.format(root=root, page=ADDRESSES["vol"] // 4096 + 1))
        self.program("modprobe", "#!/bin/sh\n")
        patch.setenv("PATH", f"{root}:/usr/bin:/bin")
        patch.setattr(nvdimm, "_DEVICES", root / "nd/devices")
        patch.setattr(nvdimm, "_DRIVER", root / "nd_region")
        patch.setattr(nvdimm, "_DAX", root / "dax")
        patch.setattr(nvdimm, "_PHYSICAL", str(self.memory))
        patch.setattr(nvdimm, "_dev", lambda name: root / "dev" / name)
        dax = root / "dax/dax1.0"
        dax.mkdir(parents=True)
        (dax / "resource").write_text(hex(ADDRESSES["vol"] + HEAD))
        (dax / "size").write_text(str(SIZE - HEAD))
        block = root / "nd/devices/region1/pfn1.0/block/pmem1"
        block.mkdir(parents=True)
        (block / "size").write_text(str((SIZE - HEAD) // 512))
        (block.parent.parent / "resource").write_text(hex(ADDRESSES["vol"] + HEAD))
        (root / "dev").mkdir()
        for name in ("dax1.0", "pmem1"):
            with (root / "dev" / name).open("wb") as file:
                file.truncate(SIZE - HEAD)

    def program(self, name: str, text: str) -> None:
        """A program on the PATH."""
        (self.root / name).write_text(text)
        (self.root / name).chmod(0o755)

    def asked(self) -> list[str]:
        """What ndctl was asked for."""
        file = self.root / "asked"
        return file.read_text().splitlines() if file.exists() else []

    def at(self, which: str, offset: int, length: int) -> bytes:
        """What is in one of the devices."""
        with self.memory.open("rb") as file:
            file.seek(ADDRESSES[which] + offset)
            return file.read(length)

    def put(self, which: str, offset: int, data: bytes) -> None:
        """Change it."""
        with self.memory.open("r+b") as file:
            file.seek(ADDRESSES[which] + offset)
            file.write(data)


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(tmp_path, monkeypatch)


def ask(kernel: Kernel, op: str, **fields: Any) -> dict[str, Any]:
    """A request of the host."""
    return nvdimm.handlers(ADDRESSES, lambda: "files", kernel.file)[op]({"op": op, **fields})


def test_a_new_device_becomes_devdax_and_media_belong_to_nobody(kernel: Kernel) -> None:
    places = nvdimm.setup(ADDRESSES, kernel.file)
    assert kernel.asked() == ["create-namespace -f -e namespace1.0 -m devdax -M mem -a 4096"], "of vol, by its address"
    assert kernel.at("media", 4096, 10) == b"now devdax", "the mode is durable"
    assert places == Places("devdax", SIZE - HEAD, str(kernel.root / "dev/dax1.0"), 0, str(kernel.memory),
                            ADDRESSES["media"] + HEAD)  # fmt: skip
    assert nvdimm.setup(ADDRESSES, kernel.file) == places
    assert len(kernel.asked()) == 1, "it is so already"
    assert (kernel.root / "nd_region/unbind").read_text() == "region0", "this time nothing was done to vol"
    with Device(kernel.file) as device:
        device.memory[64:69] = b"store"
        device.persist(64, 1)
    assert kernel.at("media", HEAD + 64, 5) == b"store"


def test_what_a_rack_of_before_has_is_left_alone_until_forced(kernel: Kernel) -> None:
    kernel.put("media", 100, b"old")
    (kernel.root / "nd/devices/region1/namespace1.0/block/pmem1").mkdir(parents=True)
    (kernel.root / "nd/devices/region1/namespace1.0/resource").write_text(hex(ADDRESSES["vol"]))
    (kernel.root / "nd/devices/region1/namespace1.0/block/pmem1/size").write_text(str(SIZE // 512))
    (kernel.root / "nd/devices/region1/pfn1.0/block/pmem1").rename(kernel.root / "gone")
    places = nvdimm.setup(ADDRESSES, kernel.file)
    assert (places.mode, places.size, places.media_offset) == ("raw", SIZE, ADDRESSES["media"])
    assert kernel.asked() == []
    with pytest.raises(ControlError, match="would be damaged"):
        ask(kernel, "pmem.mode", mode="devdax")
    assert ask(kernel, "pmem.mode", mode="devdax", force=True)["mode"] == "devdax"
    assert kernel.at("media", 4096, 10) == b"now devdax"


def test_modes_change_and_what_is_stored_can_be_made_durable(kernel: Kernel) -> None:
    nvdimm.setup(ADDRESSES, kernel.file)
    with pytest.raises(ControlError, match="no mode ext4"):
        ask(kernel, "pmem.mode", mode="ext4")
    with Device(kernel.file), pytest.raises(ControlError, match="somebody uses"):
        ask(kernel, "pmem.mode", mode="fsdax")
    assert ask(kernel, "pmem.mode", mode="fsdax")["device"] == str(kernel.root / "dev/pmem1")
    for op in ("pmem.mark", "pmem.erase"):
        with pytest.raises(ControlError, match="in mode fsdax"):
            ask(kernel, op, line="00" * 64)
    for block in (b"one" * 1000, b"two" * 1000):
        with (kernel.root / "dev/pmem1").open("r+b") as file:
            file.seek(5 * MIB)
            file.write(block)
        assert ask(kernel, "pmem.persist") == {"bytes": 4096}
        assert kernel.at("media", HEAD + 5 * MIB, 3000) == block
        assert ask(kernel, "pmem.persist") == {"bytes": 0}
    assert ask(kernel, "pmem.mode", mode="devdax")["mode"] == "devdax"
    with Device(kernel.file) as device:
        device.memory[0:3] = b"one"
        assert ask(kernel, "pmem.stat")["in_use"] is True
    assert ask(kernel, "pmem.persist")["bytes"] >= 4096
    assert kernel.at("media", HEAD, 3) == b"one"
    assert ask(kernel, "pmem.erase") == {}
    assert kernel.at("media", HEAD, MIB) == bytes(MIB)


def test_the_lines_of_the_self_test(kernel: Kernel) -> None:
    nvdimm.setup(ADDRESSES, kernel.file)
    line = "ab" * 64
    ask(kernel, "pmem.mark", line=line)
    assert ask(kernel, "pmem.look")["lines"] == [line, line]
    assert kernel.at("media", SIZE - 4096, 128).hex() == line + "00" * 64


def test_a_blade_without_says_so() -> None:
    ops = nvdimm.handlers(None, lambda: "files")
    assert ops["pmem.stat"]({}) == {}
    for op in ops.keys() - {"pmem.stat"}:
        with pytest.raises(ControlError, match="no persistent memory"):
            ops[op]({"mode": "devdax", "line": ""})


def test_what_ndctl_says_is_told(kernel: Kernel) -> None:
    nvdimm.setup(ADDRESSES, kernel.file)
    kernel.program("ndctl", "#!/bin/sh\necho failed: Device or resource busy >&2; exit 1\n")
    with pytest.raises(ControlError, match="cannot make it fsdax: failed: Device or resource busy"):
        ask(kernel, "pmem.mode", mode="fsdax")
