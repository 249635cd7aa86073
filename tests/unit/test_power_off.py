"""A blade whose power was cut is one that libvirt knows and that is off: with the real driver, but no blade."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import libvirt
import pytest

from orchestrator.hypervisor import daemon, domain
from orchestrator.hypervisor.domain import Guest
from orchestrator.image.build import Image
from orchestrator.settings import RackPaths
from orchestrator.templates import render
from tests.unit.netns_racks import ensure_network, needs_root, scratch_rack
from tests.unit.test_domain_xml import DEVICES

EMULATOR = shutil.which("qemu-system-x86_64") or "qemu-system-x86_64"

pytestmark = [
    pytest.mark.long,
    pytest.mark.netns,
    needs_root,
    pytest.mark.skipif(shutil.which("libvirtd", path="/usr/sbin:/sbin") is None, reason="needs libvirtd"),
]


@pytest.fixture(scope="module")
def libvirtd() -> Iterator[tuple[RackPaths, Any]]:
    with scratch_rack() as paths:
        ensure_network(paths.name)
        with daemon.connection(paths, start=True) as conn:
            yield paths, conn


def test_what_is_known_of_a_blade_that_is_off(libvirtd: tuple[RackPaths, Any], tmp_path: Path) -> None:
    """With all that is plugged into blades its description can be kept, read, changed, and forgotten."""
    paths, conn = libvirtd
    file = tmp_path / "file"
    image = Image("debian13", "blade", "0" * 64, system=file, agents=file, kernel=file, initramfs=file, cmdline="quiet")
    metadata = {"rack": paths.name, "blade": "mb0", "ready": True, "faults": {}}
    guest = Guest(domain.domain_name(paths.name, "mb0"), 256 << 20, 1, tmp_path / "c", tmp_path / "l", tmp_path / "a",
                  metadata)  # fmt: skip
    plugged = "".join(render(DEVICES[name][0], **DEVICES[name][1]) for name in ("interface", "disk", "pmem"))
    xml = domain.domain_xml(guest, image, "tcg", EMULATOR).replace("</devices>", f"{plugged}</devices>")
    made = conn.defineXML(xml)
    # As cut_power does with one that runs.
    again = conn.defineXML(made.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE))
    found = domain.owned(conn, paths.name)
    assert {name: (blade.state, blade.metadata) for name, blade in found.items()} == {"mb0": ("off", metadata)}
    domain.write_metadata(again, {**metadata, "faults": {"killed": True}})
    assert domain.owned(conn, paths.name)["mb0"].metadata["faults"] == {"killed": True}
    for _ in range(2):
        domain.destroy(again)
    assert domain.owned(conn, paths.name) == {}
