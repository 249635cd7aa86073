"""Bring one blade up or down: files, domain (restored or booted), cards and disks, identity, limits."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import libvirt

from orchestrator import pmem
from orchestrator.channel import open_channel
from orchestrator.errors import RacklessError
from orchestrator.events import Emit, step
from orchestrator.faults import settle
from orchestrator.faults.model import Faults, link_fields
from orchestrator.hypervisor import balloon, domain, template
from orchestrator.hypervisor.domain import Guest
from orchestrator.image.build import Image
from orchestrator.network import bridge, place, shaping
from orchestrator.settings import RackPaths
from orchestrator.spec import BladeSpec
from orchestrator.ssh import keys

CONSOLE_TAIL_LINES = 12


@dataclass(frozen=True)
class Workshop:
    """What all blades of one `up` are made with."""

    paths: RackPaths
    conn: libvirt.virConnect
    image: Image
    accelerator: str
    emulator: str
    manager: str  # fabric address of the manager's agent
    hosts: dict[str, str]  # name -> management address of every blade
    emit: Emit
    recipe: str = "debian13"  # name of the image's recipe
    flavour: str = "blade"  # of that recipe
    fabric: Mapping[str, str] = field(default_factory=dict)  # name -> fabric address of every blade
    faults: Mapping[str, Faults] = field(default_factory=dict)  # of blades that are there already

    def metadata(self, spec: BladeSpec, faults: Faults, ready: bool) -> dict[str, Any]:
        """What a blade's libvirt metadata say."""
        return {"rack": self.paths.name, "blade": spec.name, "ready": ready, "accelerator": self.accelerator,
                "recipe": self.recipe, "flavour": self.flavour, "spec": spec.to_json(),
                "faults": faults.to_json()}  # fmt: skip


def ensure_template(shop: Workshop, memory: int, cpus: int) -> Path:
    """The save image that blades of this size are restored from; booted and saved when there is none yet."""
    kind = template.Kind(shop.image.key, shop.accelerator, memory, cpus)
    key = template.template_key(kind, shop.emulator)
    name = f"{domain.TEMPLATE}{key[:8]}"

    def boot_and_save(target: Path) -> None:
        guest = _guest(shop, name, memory, cpus, {"rack": shop.paths.name, "blade": name, "ready": False})
        with step(shop.emit, shop.paths.name, "boot", name):
            booted = _boot(shop, guest)
        with step(shop.emit, shop.paths.name, "save", name):
            domain.explain(f"save {name}", lambda: booted.save(str(target)))
        remove_files(shop.paths, name)

    return template.obtain(shop.paths.settings.cache_dir / "templates", kind, key, boot_and_save)


def create(shop: Workshop, spec: BladeSpec, state: Path | None) -> None:
    """Make the blade: a clone of the template ``state``, or booted when None. On return its agent has joined.

    Made anew, it is neither killed nor paused; other faults of the old one are its own, too, until they are healed.
    The metadata says ``ready`` only at the end, so that a blade left half made by a killed `up` is seen as such.
    """
    paths = shop.paths
    faults = shop.faults.get(spec.name, Faults()).without("killed", "paused")
    guest = _guest(shop, spec.name, spec.memory, spec.cpus, shop.metadata(spec, faults, ready=False))
    try:
        _make_files(paths, spec)
        if state is None:
            with step(shop.emit, paths.name, "boot", spec.name):
                made = _boot(shop, guest)
                domain.explain(f"pause {spec.name}", made.suspend)
        else:
            with step(shop.emit, paths.name, "restore", spec.name):
                made = template.restore(shop.conn, state, guest, paths.blade(spec.name).root / "clone.save")
        with step(shop.emit, paths.name, "plug", spec.name):
            places = domain.explain(f"plug devices into {spec.name}", lambda: _plug(made, paths, spec))
            domain.explain(f"resume {spec.name}", made.resume)
        with step(shop.emit, paths.name, "join", spec.name):
            _identify(shop, spec, guest, places)
        shaping.limit(place.of(paths), spec.index, spec.link.bandwidth)
        settle.whole(paths, made, spec, faults, shop.fabric)
        ready = shop.metadata(spec, faults, ready=True)
        domain.explain(f"mark {spec.name} ready", lambda: domain.write_metadata(made, ready))
    except RacklessError as error:
        raise RacklessError(f"{spec.name} did not become ready: {error.message}", hint=error.hint,
                            log=paths.blade(spec.name).console) from error  # fmt: skip


def update(shop: Workshop, old: BladeSpec, spec: BladeSpec, running: libvirt.virDomain) -> None:
    """Change a running blade to ``spec`` where only what can change live differs."""
    paths = shop.paths
    faults = shop.faults.get(spec.name, Faults()).without("paused")
    with step(shop.emit, paths.name, "update", spec.name):
        if domain.explain(f"look at {spec.name}", running.state)[0] == libvirt.VIR_DOMAIN_PAUSED:
            domain.explain(f"resume {spec.name}", running.resume)
        if spec.memory != old.memory:
            balloon.resize(paths, running, spec, old.memory)
        if spec.cpu_quota != old.cpu_quota:
            settle.cpus(running, spec, faults)
        if spec.disk and spec.disk != old.disk:
            disk = spec.disk
            domain.explain(f"limit the disk of {spec.name}",
                           lambda: domain.limit_disk(running, disk.iops, disk.bandwidth))  # fmt: skip
        if (spec.link, spec.excache, spec.membership) != (old.link, old.excache, old.membership):
            settle.inside(paths, spec, faults, shop.fabric)
        metadata = shop.metadata(spec, faults, ready=True)
        domain.explain(f"mark {spec.name}", lambda: domain.write_metadata(running, metadata))


def remove_files(paths: RackPaths, name: str) -> None:
    """Remove all files of a blade: console log, disk, persistent memory, sockets, host key."""
    shutil.rmtree(paths.blade(name).root, ignore_errors=True)
    for socket in (console_socket(paths, name), agent_socket(paths, name)):
        socket.unlink(missing_ok=True)
    keys.forget_host_key(paths, name)


def console_socket(paths: RackPaths, name: str) -> Path:
    """Where the blade's serial console is."""
    return paths.settings.run_dir / paths.name / f"{name}.console"


def agent_socket(paths: RackPaths, name: str) -> Path:
    """Where the blade's provisioning channel is."""
    return paths.settings.run_dir / paths.name / f"{name}.agent"


def console_tail(paths: RackPaths, name: str) -> str:
    """The last lines of the blade's console log."""
    try:
        text = paths.blade(name).console.read_text(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-CONSOLE_TAIL_LINES:])


def _guest(shop: Workshop, name: str, memory: int, cpus: int, metadata: dict[str, Any]) -> Guest:
    paths = shop.paths
    paths.blade(name).root.mkdir(parents=True, exist_ok=True)
    return Guest(
        name=domain.domain_name(paths.name, name),
        memory=memory,
        cpus=cpus,
        console_socket=console_socket(paths, name),
        console_log=paths.blade(name).console,
        agent_socket=agent_socket(paths, name),
        metadata=metadata,
    )


def _boot(shop: Workshop, guest: Guest) -> libvirt.virDomain:
    xml = domain.domain_xml(guest, shop.image, shop.accelerator, shop.emulator)
    made = domain.explain(f"start {guest.name}", lambda: shop.conn.createXML(xml))
    deadline = time.monotonic() + shop.paths.settings.boot_seconds
    with open_channel(guest.agent_socket, guest.name, deadline) as channel:
        channel.request({"op": "hello"}, deadline)
    return made


def _plug(made: libvirt.virDomain, paths: RackPaths, spec: BladeSpec) -> dict[str, int] | None:
    """Plug in what the spec says; what the blade has to know of its persistent memory, if it has any.

    The blade stands still meanwhile: QEMU before 8.2 (seen: 7.2) changes the map of the memory under a virtual
    CPU that it emulates and that still uses the old one; a busy host gives that time to go wrong (a guest panicked).
    """
    where = place.of(paths)
    cards = ((place.MANAGEMENT, spec.mgmt_mac, bridge.MANAGEMENT_MTU), (place.FABRIC, spec.fabric_mac, spec.fabric_mtu))
    for network, mac, mtu in cards:
        domain.attach_nic(made, mac, where.bridge(network), where.tap(network, spec.index), mtu)
    if spec.disk:
        domain.attach_disk(made, paths.blade(spec.name).disk, spec.disk.iops, spec.disk.bandwidth)
    if not spec.pmem:
        return None
    files = paths.blade(spec.name)
    # Two devices of the same size, and nothing says in which order the blade finds them: it gets their addresses.
    return {"size": spec.pmem, "vol": domain.attach_pmem(made, files.pmem_vol, spec.pmem),
            "media": domain.attach_pmem(made, files.pmem, spec.pmem)}  # fmt: skip


def _identify(shop: Workshop, spec: BladeSpec, guest: Guest, places: dict[str, int] | None) -> None:
    paths = shop.paths
    deadline = time.monotonic() + paths.settings.ready_seconds
    private_key, _ = keys.ensure_host_key(paths, spec.name)
    message = {
        "op": "identify",
        "rack": paths.name,
        "name": spec.name,
        "kind": spec.kind,
        "machine_id": uuid.uuid4().hex,
        "secret": keys.ensure_secret(paths).hex(),
        "manager": shop.manager,
        "management": {"mac": spec.mgmt_mac, "address": spec.mgmt_address, "prefix": spec.mgmt_prefix,
                       "mtu": bridge.MANAGEMENT_MTU},
        "fabric": {"mac": spec.fabric_mac, "address": spec.fabric_address, "prefix": spec.fabric_prefix,
                   "mtu": spec.fabric_mtu},
        "link": link_fields(spec, Faults(), {}),
        "authorized_key": keys.ensure_rack_keys(paths).public_key_line,
        "host_key": private_key,
        "hosts": shop.hosts,
        "excache": spec.excache,
        "index": spec.index,
        "heartbeat": spec.membership.heartbeat,
        "dead_after": spec.membership.dead_after,
        "disk": spec.disk is not None,
        "pmem": places,
        "entropy": os.urandom(64).hex(),
        "epoch_ns": time.time_ns(),
    }  # fmt: skip
    with open_channel(guest.agent_socket, spec.name, deadline) as channel:
        channel.request(message, deadline)


def _make_files(paths: RackPaths, spec: BladeSpec) -> None:
    """The blade's disk and persistent memory; what is there in the right size is kept with its contents."""
    files = paths.blade(spec.name)
    files.root.mkdir(parents=True, exist_ok=True)
    files.root.chmod(0o700)
    if spec.pmem:
        pmem.prepare(files, spec.pmem)
    if spec.disk and not _has_size(files.disk, spec.disk.size):
        fresh = files.disk.with_suffix(".new")  # gets its name when it is whole: `up` may be killed here
        _make_sparse(fresh, spec.disk.size)
        # Made here and not in the blade: a tenth of a second instead of seconds.
        done = subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=1,nodiscard", fresh],
                              capture_output=True, text=True, check=False)  # fmt: skip
        if done.returncode:
            raise RacklessError(f"cannot make the disk of {spec.name}: {done.stderr.strip()}", hint="is the disk full?")
        fresh.rename(files.disk)


def _has_size(path: Path, size: int) -> bool:
    return path.exists() and path.stat().st_size == size


def _make_sparse(path: Path, size: int) -> None:
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(size)
