"""Templates: a blade booted once, saved while its agent waits for an identity, and restored as many clones.

Under TCG a restore takes half a second where a boot takes ten. A template belongs to (image, QEMU,
accelerator, memory, CPUs); it has no network card and no disk of its own, which clones get by hot-plug.

A libvirt save image is a header, the domain XML and a cookie padded with NULs, and QEMU's migration stream. A
clone is the same stream behind a header whose XML has the clone's name, UUID, metadata and paths.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache as once
from pathlib import Path
from xml.etree import ElementTree

import libvirt

from orchestrator.errors import RacklessError
from orchestrator.hypervisor import domain
from orchestrator.hypervisor.domain import Guest
from orchestrator.image import cache
from orchestrator.image.recipe import hash_of
from orchestrator.templates import template_folder

_MAGIC = b"LibvirtQemudSave"
_FIELDS = struct.Struct("<16s5I14I")  # magic; version, length of data, was running, compression, cookie; unused
_SUPPORTED_VERSION = 2
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


def restore(conn: libvirt.virConnect, state: Path, guest: Guest, scratch: Path) -> libvirt.virDomain:
    """Make a clone of the saved blade ``state`` as ``guest``, paused; ``scratch`` names a file to use meanwhile."""
    try:
        clone(state, scratch, guest)
        conn.restoreFlags(str(scratch), None, libvirt.VIR_DOMAIN_SAVE_PAUSED)
        return conn.lookupByName(guest.name)
    except libvirt.libvirtError as error:
        raise RacklessError(f"cannot restore {guest.name} from its template: {error}",
                            hint="`rackless image clean --templates` makes it anew") from error  # fmt: skip
    finally:
        scratch.unlink(missing_ok=True)


def clone(state: Path, target: Path, guest: Guest) -> None:
    """Write to ``target`` the save image ``state`` with the identity of ``guest`` in its domain XML."""
    with state.open("rb") as source:
        fields = list(_FIELDS.unpack(source.read(_FIELDS.size).ljust(_FIELDS.size, b"\0")))
        magic, version, length, cookie_offset = fields[0], fields[1], fields[2], fields[5]
        if magic != _MAGIC or version != _SUPPORTED_VERSION:
            raise RacklessError(f"{state} is not a libvirt save image of version {_SUPPORTED_VERSION}")
        data = source.read(length)
        cookie = data[cookie_offset:].rstrip(b"\0") if cookie_offset else b""
        xml = _own_xml(data.partition(b"\0")[0].decode(), guest).encode() + b"\0"
        if cookie:
            fields[5] = len(xml)
        head = xml + (cookie + b"\0" if cookie else b"")
        fields[2] = max(length, len(head))
        with target.open("wb") as out:
            out.write(_FIELDS.pack(*fields))
            out.write(head.ljust(fields[2], b"\0"))
            out.flush()
            _copy_rest(source.fileno(), out.fileno(), _FIELDS.size + length)


def _own_xml(xml: str, guest: Guest) -> str:
    root = ElementTree.fromstring(xml)
    _find(root, "name").text = guest.name
    _find(root, "uuid").text = str(uuid.uuid4())
    _find(root, f"metadata/{{{domain.NAMESPACE}}}blade").text = json.dumps(guest.metadata)
    for kind in ("serial", "console"):
        for device in root.findall(f"devices/{kind}"):
            _find(device, "source").set("path", str(guest.console_socket))
            _find(device, "log").set("file", str(guest.console_log))
    _find(root, "devices/channel/source").set("path", str(guest.agent_socket))
    return ElementTree.tostring(root, encoding="unicode")


def _find(root: ElementTree.Element, path: str) -> ElementTree.Element:
    found = root.find(path)
    if found is None:
        raise RacklessError(f"the template's domain XML has no {path}", hint="`rackless image clean --templates`")
    return found


def _copy_rest(source: int, target: int, offset: int) -> None:
    left = os.fstat(source).st_size - offset
    while left > 0:
        sent = os.sendfile(target, source, offset, left)
        if sent == 0:
            break
        offset, left = offset + sent, left - sent
