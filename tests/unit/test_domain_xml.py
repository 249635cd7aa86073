"""The XML that libvirt gets, compared with golden files and checked against libvirt's own schema.

After a wanted change: `RACKLESS_GOLDEN=write pytest tests/unit/test_domain_xml.py`, and read the diff.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any
from uuid import UUID
from xml.etree import ElementTree

import pytest

from orchestrator.errors import RacklessError
from orchestrator.hypervisor import domain
from orchestrator.hypervisor.domain import Guest
from orchestrator.image.build import Image
from orchestrator.templates import render

GOLDEN = Path(__file__).parent / "golden"
SCHEMAS = Path("/usr/share/libvirt/schemas")

CAN_VALIDATE = shutil.which("xmllint") is not None and (SCHEMAS / "domain.rng").exists()

INTERFACE = {"mac": "52:54:00:12:34:56", "bridge": "fabric", "tap": "fabric0", "mtu": 9000}
FREE_DISK = {"path": Path("/state/disk.raw"), "iops": None, "bandwidth": None, "cache": "none"}
DEVICES: dict[str, tuple[str, dict[str, Any]]] = {
    "interface": ("interface.xml.j2", INTERFACE),
    "disk": ("disk.xml.j2", FREE_DISK),
    "disk-limited": ("disk.xml.j2", FREE_DISK | {"iops": 2000, "bandwidth": 100 << 20}),
    "disk-cached": ("disk.xml.j2", FREE_DISK | {"cache": "writeback"}),
    "disk-iops": ("disk.xml.j2", FREE_DISK | {"iops": 2000}),
    "pmem": ("pmem.xml.j2", {"path": Path("/state/pmem.raw"), "size": 128 << 20}),
}


def image(folder: str = "/cache/images") -> Image:
    """A built image that exists only as paths."""
    root = Path(folder)
    return Image(
        name="debian13", flavour="blade", key="0123456789abcdef", system=root / "system.sqfs",
        agents=root / "agents.sqfs", kernel=root / "vmlinux", initramfs=root / "initramfs",
        cmdline="console=ttyS0 quiet",
    )  # fmt: skip


def guest(name: str = "mb0", run: str = "/run/rackless/t1", cpus: int = 2) -> Guest:
    """A blade of rack t1."""
    folder = Path(run)
    return Guest(
        name=domain.domain_name("t1", name),
        memory=512 << 20,
        cpus=cpus,
        console_socket=folder / f"{name}.console",
        console_log=Path(f"/state/{name}/console.log"),
        agent_socket=folder / f"{name}.agent",
        metadata={"rack": "t1", "blade": name, "ready": False, "spec": {"text": "a < b & \"c\" 'd' é"}},
    )


@pytest.fixture(autouse=True)
def same_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uuid.uuid4", lambda: UUID(int=0x42))


def domain_xml(accelerator: str) -> str:
    return domain.domain_xml(guest(), image(), accelerator, "/usr/bin/qemu-system-x86_64")


def _compare(name: str, text: str) -> None:
    file = GOLDEN / f"{name}.xml"
    if os.environ.get("RACKLESS_GOLDEN") == "write":
        file.write_text(text)
    assert text == file.read_text()


def _validate(text: str, folder: Path) -> None:
    ElementTree.fromstring(text)
    if not CAN_VALIDATE:
        return
    file = folder / "domain.xml"
    file.write_text(text)
    done = subprocess.run(
        ["xmllint", "--noout", "--relaxng", SCHEMAS / "domain.rng", file],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def _with_devices(xml: str, *devices: str) -> str:
    return xml.replace("</devices>", "".join(devices) + "</devices>")


@pytest.mark.parametrize("accelerator", ["kvm", "tcg"])
def test_a_domain(accelerator: str, tmp_path: Path) -> None:
    text = domain_xml(accelerator)
    _compare(f"domain-{accelerator}", text)
    _validate(text, tmp_path)


@pytest.mark.parametrize("name", DEVICES)
def test_a_device(name: str, tmp_path: Path) -> None:
    template, values = DEVICES[name]
    text = render(template, **values)
    _compare(name, text)
    _validate(_with_devices(domain_xml("tcg"), text), tmp_path)


@pytest.mark.skipif(not CAN_VALIDATE, reason="needs xmllint (libxml2-utils) and libvirt's schemas (libvirt0)")
def test_the_schema_check_can_fail(tmp_path: Path) -> None:
    broken = _with_devices(domain_xml("tcg"), render("interface.xml.j2", **INTERFACE | {"mtu": "large"}))
    with pytest.raises(AssertionError, match="fails to validate"):
        _validate(broken, tmp_path)


def test_a_disk_is_opened_past_the_hosts_cache_where_that_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(b"x" * 4096)

    def no_direct(path: Path, flags: int) -> int:
        assert flags & os.O_DIRECT
        raise OSError(errno.EINVAL, "Invalid argument", str(path))

    assert domain.cache_mode(disk) in ("none", "writeback")  # as this file system is
    with monkeypatch.context() as context:
        context.setattr(os, "open", no_direct)
        assert domain.cache_mode(disk) == "writeback"
    with pytest.raises(RacklessError, match=r"cannot open the disk .*: No such file"):
        domain.cache_mode(tmp_path / "none")


def test_metadata_of_another_version_still_tell_whose_blade_it_is() -> None:
    for text in ("<blade>{}</blade>", "<blade>[1]</blade>", "<blade>{not json</blade>", "<blade/>", "oops"):
        assert domain._metadata(text, "t1.mb0") == {"rack": "t1", "blade": "mb0"}
    assert domain._metadata('<blade>{"rack": "a", "blade": "b", "new": 1}</blade>', "t1.mb0")["new"] == 1


def test_metadata_survives_xml() -> None:
    root = ElementTree.fromstring(domain_xml("tcg"))
    text = root.findtext(f"metadata/{{{domain.NAMESPACE}}}blade")
    assert json.loads(text or "") == guest().metadata


def test_odd_paths_survive_xml(tmp_path: Path) -> None:
    odd = "/tmp/R&D's <cache>"
    text = domain.domain_xml(guest(run=odd), image(odd), "tcg", f"{odd}/qemu")
    root = ElementTree.fromstring(_with_devices(text, render("disk.xml.j2", **FREE_DISK | {"path": f"{odd}/disk"})))
    assert root.findtext("os/kernel") == f"{odd}/vmlinux"
    assert root.findtext("devices/emulator") == f"{odd}/qemu"
    sources = [source.attrib for source in root.iterfind("devices/disk/source")]
    assert sources == [{"file": f"{odd}/{name}"} for name in ("system.sqfs", "agents.sqfs", "disk")]
    channel = root.find("devices/channel/source")
    assert channel is not None
    assert channel.get("path") == f"{odd}/mb0.agent"


@pytest.mark.parametrize("cpus", [1, 2, 8])
def test_all_memory_and_cpus_are_in_the_one_numa_cell(cpus: int) -> None:
    text = domain.domain_xml(guest(cpus=cpus), image(), "tcg", "qemu")
    root = ElementTree.fromstring(text)
    cell = root.find("cpu/numa/cell")
    assert cell is not None
    assert cell.get("cpus") == f"0-{cpus - 1}"
    assert cell.get("memory") == root.findtext("memory") == str(512 << 10)
    assert int(root.findtext("maxMemory") or 0) == (512 << 10) + (domain.PMEM_ROOM >> 10)
