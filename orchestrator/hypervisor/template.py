"""Templates: a blade booted once, saved while its agent waits for an identity, and restored as many clones.

Under TCG a restore takes half a second where a boot takes ten. A template belongs to (image, QEMU,
accelerator, memory, CPUs); it has no network card and no disk of its own, which clones get by hot-plug.

A clone is the saved blade's stream behind a header whose XML has the clone's name, UUID, metadata and paths.
"""

from __future__ import annotations

import json
import subprocess
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache as once
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import libvirt

from orchestrator.errors import RacklessError
from orchestrator.hypervisor import domain, save_image
from orchestrator.hypervisor.domain import Guest
from orchestrator.image import cache
from orchestrator.image.recipe import hash_of
from orchestrator.templates import template_folder

if TYPE_CHECKING:
    from orchestrator.hypervisor.hosts import Hosts

_STATE = "state.save"
_KIND = "kind.json"


@dataclass(frozen=True)
class Kind:
    """What a template is of; kept beside it, so that one can be told that no image here leads to any more."""

    image: str  # key
    accelerator: str
    memory: int  # bytes
    cpus: int


def template_key(kind: Kind, emulator: str) -> str:
    """Content hash over all that a saved blade depends on."""
    return hash_of(kind.image, kind.accelerator, emulator_version(emulator), kind.memory, kind.cpus,
                   template_folder() / "domain.xml.j2")  # fmt: skip


def kind_of(entry: Path) -> Kind | None:
    """What the template in a cache entry is of; None when it does not say."""
    try:
        return Kind(**json.loads((entry / _KIND).read_text()))
    except (OSError, ValueError, TypeError):
        return None


@once
def emulator_version(emulator: str) -> str:
    """First line of ``qemu-system-x86_64 --version``."""
    done = subprocess.run([emulator, "--version"], capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout:
        raise RacklessError(f"{emulator} does not tell its version: {done.stderr.strip() or 'no output'}",
                            hint="run `rackless doctor`")  # fmt: skip
    return done.stdout.splitlines()[0]


def obtain(templates: Path, kind: Kind, key: str, boot_and_save: Callable[[Path], None]) -> Path:
    """The save image of a template in the cache; ``boot_and_save(file)`` makes it when missing or corrupt."""

    def build(work: Path) -> None:
        boot_and_save(work / _STATE)
        (work / _KIND).write_text(json.dumps(asdict(kind)) + "\n")

    try:
        return cache.obtain(templates, f"template-{key}", build) / _STATE
    except OSError as error:
        raise RacklessError(
            f"cannot keep a template in {templates}: {error.strerror or error}",
            hint="free some disk, or set RACKLESS_CACHE to a folder with room",
        ) from error


def restore(hosts: Hosts, host: str | None, state: Path, guest: Guest, scratch: Path) -> libvirt.virDomain:
    """Make a clone of the saved blade ``state`` as ``guest`` on a host, paused; ``scratch`` names a file to use."""
    conn = hosts.conn(host)
    try:
        hosts.do(host, "clone", state=str(state), target=str(scratch), guest=guest.to_json())
        domain.restore_paused(conn, scratch)
        return conn.lookupByName(guest.name)
    except libvirt.libvirtError as error:
        raise RacklessError(f"cannot restore {guest.name} from its template: {error}",
                            hint="`rackless image clean --templates` makes it anew") from error  # fmt: skip
    finally:
        hosts.do(host, "discard", file=str(scratch))


def clone(state: Path, target: Path, guest: Guest) -> None:
    """Write to ``target`` the save image ``state`` with the identity of ``guest`` in its domain XML."""
    save_image.rewrite(state, target, lambda xml: own_xml(xml, guest))


def own_xml(xml: str, guest: Guest, files: Path | None = None) -> str:
    """The XML of a saved blade with the identity of ``guest``; of ``files``, if given, its disk and pmem.

    A guest of the same name keeps its UUID: to libvirt it is the same domain.
    """
    root = ElementTree.fromstring(xml)
    name = _find(root, "name")
    if name.text != guest.name or files is None:
        _find(root, "uuid").text = str(uuid.uuid4())
    name.text = guest.name
    _find(root, f"metadata/{{{domain.NAMESPACE}}}blade").text = json.dumps(guest.metadata)
    for kind in ("serial", "console"):
        for device in root.findall(f"devices/{kind}"):
            _find(device, "source").set("path", str(guest.console_socket))
            _find(device, "log").set("file", str(guest.console_log))
    _find(root, "devices/channel/source").set("path", str(guest.agent_socket))
    if files is not None:
        _move_files(root, files)
    return ElementTree.tostring(root, encoding="unicode")


def _move_files(root: ElementTree.Element, folder: Path) -> None:
    """Disks that are written to, and persistent memory, are files of the same names in ``folder``."""
    for disk in root.findall("devices/disk"):
        if disk.find("readonly") is None:
            source = _find(disk, "source")
            source.set("file", str(folder / Path(source.get("file", "")).name))
    for memory in root.findall("devices/memory"):
        path = _find(memory, "source/path")
        path.text = str(folder / Path(path.text or "").name)


def _find(root: ElementTree.Element, path: str) -> ElementTree.Element:
    found = root.find(path)
    if found is None:
        raise RacklessError(f"the template's domain XML has no {path}", hint="`rackless image clean --templates`")
    return found
