"""Blades as libvirt domains. What must survive a crash of the orchestrator is in their ``<metadata>``."""

from __future__ import annotations

import errno
import json
import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from html import escape  # xml.sax.saxutils would import the half of the library
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import libvirt

from orchestrator.errors import RacklessError
from orchestrator.spec import BladeSpec
from orchestrator.templates import render

if TYPE_CHECKING:
    from orchestrator.image.build import Image

NAMESPACE = "urn:rackless:blade:1"
PMEM_ROOM = 64 << 30  # address space kept free for persistent memory that is plugged in later
TEMPLATE = "template-"  # begins the name of a blade that is booted to be saved
_PERIOD_US = 100_000

STATES = {
    libvirt.VIR_DOMAIN_RUNNING: "running",
    libvirt.VIR_DOMAIN_BLOCKED: "running",
    libvirt.VIR_DOMAIN_PAUSED: "paused",
    libvirt.VIR_DOMAIN_PMSUSPENDED: "paused",
    libvirt.VIR_DOMAIN_CRASHED: "crashed",
}


@dataclass(frozen=True)
class Guest:
    """What a domain is made from: the parts that a template fixes (image, memory, cpus) and a clone's own."""

    name: str
    memory: int  # bytes
    cpus: int
    console_socket: Path
    console_log: Path
    agent_socket: Path
    metadata: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """As plain data, for another host."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in vars(self).items()}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Guest:
        """What `to_json` wrote."""
        paths = {key: Path(data[key]) for key in ("console_socket", "console_log", "agent_socket")}
        return Guest(**{**data, **paths})


def domain_name(rack: str, blade: str) -> str:
    """Unique on a host also when several racks share one cgroup tree."""
    return f"{rack}.{blade}"


def domain_xml(guest: Guest, image: Image, accelerator: str, emulator: str) -> str:
    """The domain XML of a blade that boots (a restored one takes it from its template; see template.py)."""
    return render(
        "domain.xml.j2",
        name=guest.name,
        uuid=uuid.uuid4(),
        namespace=NAMESPACE,
        metadata=json.dumps(guest.metadata),
        memory=guest.memory,
        pmem_room=PMEM_ROOM,
        cpus=guest.cpus,
        image=image,
        emulator=emulator,
        domain_type="kvm" if accelerator == "kvm" else "qemu",
        cpu_mode="host-passthrough" if accelerator == "kvm" else "maximum",
        console_socket=guest.console_socket,
        console_log=guest.console_log,
        agent_socket=guest.agent_socket,
    )


@dataclass(frozen=True)
class Owned:
    """A domain that is a blade of a rack; ``state`` is running, paused, crashed or off."""

    domain: libvirt.virDomain
    state: str
    metadata: dict[str, Any]
    host: str | None = None
    """The host that it is on, by its name in the rack file; None on this machine."""

    def spec(self) -> BladeSpec:
        """What it is made of, on the host where it is. Raises ValueError when another version of Rackless made it."""
        return replace(BladeSpec.from_json(self.metadata.get("spec")), host=self.host)


def owned(conn: libvirt.virConnect, rack: str) -> dict[str, Owned]:
    """The domains of a rack by name of blade. Domains without our mark are not ours."""
    found = {}
    for candidate in explain(f"list the blades of rack {rack}", conn.listAllDomains):
        try:
            text = candidate.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, NAMESPACE)
            state = STATES.get(candidate.state()[0], "off")
        except libvirt.libvirtError:
            continue  # not ours, or gone since the listing
        metadata = _metadata(text, candidate.name())
        if metadata.get("rack") == rack:
            found[str(metadata.get("blade"))] = Owned(candidate, state, metadata)
    return found


def is_template(owned: Owned) -> bool:
    """Is it no blade of the rack, but one that is booted to be saved?"""
    return "spec" not in owned.metadata and str(owned.metadata["blade"]).startswith(TEMPLATE)


def _metadata(text: str, name: str) -> dict[str, Any]:
    """What a blade's metadata say; those of another version of Rackless tell nothing but its name."""
    with suppress(ValueError, ElementTree.ParseError):
        metadata = json.loads(ElementTree.fromstring(text).text or "{}")
        if isinstance(metadata, dict) and "rack" in metadata and "blade" in metadata:
            return metadata
    rack, _, blade = name.partition(".")
    return {"rack": rack, "blade": blade}


def write_metadata(domain: libvirt.virDomain, metadata: dict[str, Any]) -> None:
    """Replace the metadata of a domain, whether it runs or its power is off."""
    text = f"<blade>{escape(json.dumps(metadata), quote=False)}</blade>"
    where = libvirt.VIR_DOMAIN_AFFECT_LIVE if domain.isActive() else libvirt.VIR_DOMAIN_AFFECT_CONFIG
    domain.setMetadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, text, "rackless", NAMESPACE, where)


def save_memory(domain: libvirt.virDomain, path: Path) -> None:
    """Save what a paused domain has in memory, and what its devices are like; it is paused afterwards.

    With the contents of its persistent memory, for QEMU that is memory too.
    """
    disks = ElementTree.fromstring(domain.XMLDesc()).iterfind("devices/disk/target")
    xml = render("memory.xml.j2", path=path, disks=[disk.get("dev") for disk in disks])
    domain.snapshotCreateXML(xml, libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA)


def restore_paused(conn: libvirt.virConnect, state: Path, xml: str | None = None) -> None:
    """Start a domain as it was saved, paused; with ``xml``, a description that differs in paths and metadata only.

    QEMU writes what persistent memory had to the files that it has now.
    """
    conn.restoreFlags(str(state), xml, libvirt.VIR_DOMAIN_SAVE_PAUSED)


def destroy(domain: libvirt.virDomain) -> None:
    """Cut the power, and have libvirt forget the domain. Nothing when both are so already."""
    gone = (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID)
    for end in (domain.destroy, domain.undefine):  # one that runs and is not defined is gone after the first
        try:
            end()
        except libvirt.libvirtError as error:
            if error.get_error_code() not in gone:
                raise RacklessError(f"cannot stop {domain.name()}: {error}") from error


def cut_power(domain: libvirt.virDomain) -> None:
    """Cut the power of a running domain; libvirt still knows it afterwards, as one that is off, with its metadata."""
    flags = libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE
    domain.connect().defineXML(domain.XMLDesc(flags))
    domain.destroy()


def set_carrier(domain: libvirt.virDomain, mac: str, up: bool) -> None:
    """Pull the cable of a running domain's network card, or put it back in."""
    for card in ElementTree.fromstring(domain.XMLDesc()).iterfind("devices/interface"):
        address = card.find("mac")
        if address is not None and address.get("address") == mac:
            state = card.find("link")
            if state is None:
                state = ElementTree.SubElement(card, "link")
            state.set("state", "up" if up else "down")
            domain.updateDeviceFlags(ElementTree.tostring(card, encoding="unicode"), libvirt.VIR_DOMAIN_AFFECT_LIVE)


def attach_nic(domain: libvirt.virDomain, mac: str, bridge: str, tap: str, mtu: int) -> None:
    """Plug in a network card whose tap is a port of ``bridge``."""
    _attach(domain, render("interface.xml.j2", mac=mac, bridge=bridge, tap=tap, mtu=mtu))


def attach_disk(domain: libvirt.virDomain, path: Path, iops: int | None, bandwidth: int | None, cache: str) -> None:
    """Plug in the data disk, limited to ``iops`` and ``bandwidth`` (bytes/s); ``cache`` is as cache_mode says."""
    _attach(domain, render("disk.xml.j2", path=path, iops=iops, bandwidth=bandwidth, cache=cache))


def cache_mode(path: Path) -> str:
    """How QEMU may cache a disk: "none", so that its speed is the disk's and not that of the host's memory.

    Where the file system refuses O_DIRECT (tmpfs of older kernels, some FUSE and network ones), "writeback": what
    the blade flushes is still flushed on the host, which "unsafe" would not do, and "writethrough" would do for
    every write.
    """
    try:
        os.close(os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EINVAL:  # open(2): what a file system without O_DIRECT says
            return "writeback"
        raise RacklessError(f"cannot open the disk {path}: {error.strerror}", hint="`rackless down` removes it, with "
                            "what is on it, and `up` makes it anew") from error  # fmt: skip
    return "none"


def attach_pmem(domain: libvirt.virDomain, path: Path, size: int) -> int:
    """Plug in persistent memory that lives in the file ``path``; its physical address in the blade."""
    _attach(domain, render("pmem.xml.j2", path=path, size=size))
    for device in ElementTree.fromstring(domain.XMLDesc()).iterfind("devices/memory"):
        place = device.find("address")
        if device.findtext("source/path") == str(path) and place is not None:
            return int(place.get("base", ""), 16)
    raise RacklessError(f"libvirt does not tell where {path.name} of {domain.name()} is", hint="is it older than 9.0?")


def limit_disk(domain: libvirt.virDomain, iops: int | None, bandwidth: int | None) -> None:
    """Change the limits of the data disk; None lifts one."""
    domain.setBlockIoTune("vdc", {"total_bytes_sec": bandwidth or 0, "total_iops_sec": iops or 0},
                          libvirt.VIR_DOMAIN_AFFECT_LIVE)  # fmt: skip


def limit_cpu(domain: libvirt.virDomain, quota: float | None) -> None:
    """Limit each virtual CPU to the share ``quota`` (0..1) of a host CPU, by cgroup; None lifts the limit.

    Called when the blade is ready: a limit in force during the boot nearly doubles it.
    """
    microseconds = -1 if quota is None else max(1000, round(quota * _PERIOD_US))
    domain.setSchedulerParametersFlags({"vcpu_period": _PERIOD_US, "vcpu_quota": microseconds},
                                       libvirt.VIR_DOMAIN_AFFECT_LIVE)  # fmt: skip


def set_memory(domain: libvirt.virDomain, size: int) -> None:
    """Ask a running domain's balloon for `size` bytes; it takes its time."""
    domain.setMemoryFlags(size // 1024, libvirt.VIR_DOMAIN_AFFECT_LIVE)


def memory_of(domain: libvirt.virDomain) -> int:
    """Bytes that a running domain has now, as its balloon says."""
    return int(domain.memoryStats()["actual"]) * 1024


def explain(action: str, call: Callable[[], Any]) -> Any:
    """Run a libvirt call; its error becomes one line that says what was tried."""
    try:
        return call()
    except libvirt.libvirtError as error:
        raise RacklessError(f"cannot {action}: {error}") from error


def _attach(domain: libvirt.virDomain, xml: str) -> None:
    domain.attachDeviceFlags(xml, libvirt.VIR_DOMAIN_AFFECT_LIVE)
