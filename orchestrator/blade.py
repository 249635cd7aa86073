"""Bring one blade up or down: files, domain (restored or booted), cards and disks, identity, limits."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import libvirt

from orchestrator.blade_files import agent_socket, console_socket
from orchestrator.deeds import DEEDS
from orchestrator.errors import RacklessError
from orchestrator.events import Emit, step
from orchestrator.faults import settle
from orchestrator.faults.model import Faults, link_fields
from orchestrator.hypervisor import balloon, domain, template
from orchestrator.hypervisor.domain import Guest
from orchestrator.hypervisor.hosts import Hosts
from orchestrator.image.build import Image
from orchestrator.network import bridge, place
from orchestrator.settings import RackPaths
from orchestrator.spec import BladeSpec
from orchestrator.ssh import keys

CONSOLE_TAIL_LINES = 12


@dataclass(frozen=True)
class Workshop:
    """What all blades of one `up` are made with."""

    paths: RackPaths
    machines: Hosts
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
        DEEDS["make_folder"](shop.paths, name)
        with step(shop.emit, shop.paths.name, "boot", name):
            booted = _boot(shop, None, guest)
        with step(shop.emit, shop.paths.name, "save", name):
            domain.explain(f"save {name}", lambda: booted.save(str(target)))
        remove_files(shop.machines, None, name)

    return template.obtain(shop.paths.settings.cache_dir / "templates", kind, key, boot_and_save)


def create(shop: Workshop, spec: BladeSpec, state: Path | None) -> None:
    """Make the blade: a clone of the template ``state``, or booted when None. On return its agent has joined.

    Made anew, it is neither killed nor paused; other faults of the old one are its own, too, until they are healed.
    The metadata says ``ready`` only at the end, so that a blade left half made by a killed `up` is seen as such.
    """
    paths, machines = shop.paths, shop.machines
    faults = shop.faults.get(spec.name, Faults()).without("killed", "paused")
    guest = _guest(shop, spec.name, spec.memory, spec.cpus, shop.metadata(spec, faults, ready=False))
    try:
        machines.do(spec.host, "make_folder", name=spec.name)
        machines.do(spec.host, "make_files", spec=spec.to_json())
        if state is None:
            with step(shop.emit, paths.name, "boot", spec.name):
                made = _boot(shop, spec.host, guest)
                domain.explain(f"pause {spec.name}", made.suspend)
        else:
            with step(shop.emit, paths.name, "restore", spec.name):
                scratch = paths.blade(spec.name).root / "clone.save"
                made = template.restore(machines, spec.host, state, guest, scratch)
        with step(shop.emit, paths.name, "plug", spec.name):
            places = domain.explain(f"plug devices into {spec.name}", lambda: _plug(made, machines, spec))
            domain.explain(f"resume {spec.name}", made.resume)
        with step(shop.emit, paths.name, "join", spec.name):
            _identify(shop, spec, guest, places)
        machines.do(spec.host, "limit", index=spec.index, bandwidth=spec.link.bandwidth)
        settle.whole(machines, made, spec, faults, shop.fabric)
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
            settle.inside(shop.machines, spec, faults, shop.fabric)
        metadata = shop.metadata(spec, faults, ready=True)
        domain.explain(f"mark {spec.name}", lambda: domain.write_metadata(running, metadata))


def remove_files(hosts: Hosts, host: str | None, name: str) -> None:
    """Remove all files of a blade from its host, and its host key: console log, disk, persistent memory, sockets."""
    hosts.do(host, "remove_files", name=name)
    keys.forget_host_key(hosts.paths, name)


def console_tail(hosts: Hosts, host: str | None, name: str) -> str:
    """The last lines of the blade's console log."""
    return "\n".join(str(hosts.do(host, "console", name=name)).splitlines()[-CONSOLE_TAIL_LINES:])


def _guest(shop: Workshop, name: str, memory: int, cpus: int, metadata: dict[str, Any]) -> Guest:
    paths = shop.paths
    return Guest(
        name=domain.domain_name(paths.name, name),
        memory=memory,
        cpus=cpus,
        console_socket=console_socket(paths, name),
        console_log=paths.blade(name).console,
        agent_socket=agent_socket(paths, name),
        metadata=metadata,
    )


def _boot(shop: Workshop, host: str | None, guest: Guest) -> libvirt.virDomain:
    xml = domain.domain_xml(guest, shop.image, shop.accelerator, shop.emulator)
    made = domain.explain(f"start {guest.name}", lambda: shop.machines.conn(host).createXML(xml))
    _request(shop, host, guest, {"op": "hello"}, shop.paths.settings.boot_seconds)
    return made


def _request(shop: Workshop, host: str | None, guest: Guest, message: dict[str, Any], seconds: float) -> None:
    shop.machines.do(host, "request", socket=str(guest.agent_socket), blade=guest.metadata["blade"], message=message,
                     seconds=seconds)  # fmt: skip


def _plug(made: libvirt.virDomain, hosts: Hosts, spec: BladeSpec) -> dict[str, int] | None:
    """Plug in what the spec says; what the blade has to know of its persistent memory, if it has any.

    The blade stands still meanwhile: QEMU before 8.2 (seen: 7.2) changes the map of the memory under a virtual
    CPU that it emulates and that still uses the old one; a busy host gives that time to go wrong (a guest panicked).
    """
    paths = hosts.paths
    where = place.on(paths, spec.host)
    mgmt_mtu = bridge.mtu_of_management(bool(hosts.far))
    cards = ((place.MANAGEMENT, spec.mgmt_mac, mgmt_mtu), (place.FABRIC, spec.fabric_mac, spec.fabric_mtu))
    for network, mac, mtu in cards:
        domain.attach_nic(made, mac, where.bridge(network), where.tap(network, spec.index), mtu)
    if spec.disk:
        disk = paths.blade(spec.name).disk
        cache = hosts.do(spec.host, "cache_mode", file=str(disk))
        domain.attach_disk(made, disk, spec.disk.iops, spec.disk.bandwidth, cache)
    if not spec.pmem:
        return None
    files = paths.blade(spec.name)
    # Two devices of the same size, and nothing says in which order the blade finds them: it gets their addresses.
    return {"size": spec.pmem, "vol": domain.attach_pmem(made, files.pmem_vol, spec.pmem),
            "media": domain.attach_pmem(made, files.pmem, spec.pmem)}  # fmt: skip


def _identify(shop: Workshop, spec: BladeSpec, guest: Guest, places: dict[str, int] | None) -> None:
    paths = shop.paths
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
                       "mtu": bridge.mtu_of_management(bool(shop.machines.far))},
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
    _request(shop, spec.host, guest, message, paths.settings.ready_seconds)
