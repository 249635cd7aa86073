"""Make a rack of a snapshot: the same one as it was then, or a second one beside it.

All blades are restored paused and resumed together, so none sees that others are missing: heartbeats, leases and
connections, RDMA's too, go on from where they were. What is outside of blades is made again from their metadata: taps,
limits of bandwidth, sides of a partition.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import blade, engine, freeze, guests, journal, lock, snapshot, sparse
from orchestrator.blade_files import agent_socket, console_socket
from orchestrator.errors import RacklessError
from orchestrator.events import Emit, Note, ignore, step
from orchestrator.faults import model, settle
from orchestrator.hypervisor import daemon, domain, save_image, template
from orchestrator.hypervisor.domain import Guest
from orchestrator.hypervisor.hosts import Hosts
from orchestrator.network import place, shaping
from orchestrator.parallel import together
from orchestrator.privilege import require_root
from orchestrator.settings import PRIVATE_LIBVIRT, RackPaths, Settings
from orchestrator.snapshot import Snapshot
from orchestrator.spec import BladeSpec
from orchestrator.ssh import shared

if TYPE_CHECKING:
    import libvirt

_SCRATCH, _DISK = "clone.save", "disk.thawed"
"""What a blade's folder has only meanwhile, as gc knows it."""


@dataclass(frozen=True)
class Thawed:
    """A rack that was made of a snapshot."""

    rack: str
    snapshot: Snapshot
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As `rackless snapshot restore` and `clone` print it with --json."""
        return {"rack": self.rack, "snapshot": self.snapshot.name, "of": self.snapshot.rack,
                "blades": sorted(self.snapshot.blades), "seconds": round(self.seconds, 2)}  # fmt: skip


def restore(settings: Settings, rack: str, name: str, emit: Emit = ignore) -> Thawed:
    """Make a rack what it was when the snapshot was made, whether it is up now or not.

    What it is now, with its disks and persistent memory, is lost. RacklessError, before anything is touched, when there
    is no such snapshot, or it cannot be restored here. If this is killed, `restore` again.
    """
    started = time.monotonic()
    require_root("restore virtual machines")
    with lock.hold(RackPaths(settings, rack)):
        found = snapshot.find(settings, rack, name)
        guests.refuse(RackPaths(settings, rack))
        freeze.must_be_here(RackPaths(settings, rack))
        _check(settings, found, found.specs)
        try:
            _thaw(settings, found, rack, emit)
        except RacklessError as error:
            hint = error.hint or "restore it again; `rackless up` makes its blades anew"
            raise RacklessError(f"rack {rack} is not restored: {error.message}", hint=hint, log=error.log,
                                detail=error.detail) from error  # fmt: skip
    return Thawed(rack, found, time.monotonic() - started)


def clone(settings: Settings, rack: str, name: str, other: str, emit: Emit = ignore) -> Thawed:
    """Make a second rack of a snapshot, with the same addresses, in a network namespace of its own.

    RacklessError, before anything is touched, as by `restore`, and when there is a rack of the new name. Nothing stays
    of a clone that did not become a rack.
    """
    started = time.monotonic()
    require_root("restore virtual machines")
    paths = RackPaths(settings, other)
    if settings.libvirt_uri != PRIVATE_LIBVIRT:
        raise RacklessError(f"{other} would have the addresses of {rack} on this host",
                            hint="unset RACKLESS_LIBVIRT_URI: racks then have networks of their own")  # fmt: skip
    with lock.hold(RackPaths(settings, rack)):
        found = snapshot.find(settings, rack, name)
        _check(settings, found, found.specs)
        taken = RacklessError(f"there is a rack {other} already", hint=f"`rackless down {other}`, or another name")
        if other == rack:
            raise taken
        with lock.hold(paths):  # first: who had it may have made that rack
            if paths.root.exists() or place.of(paths).exists():
                raise taken
            try:
                _thaw(settings, found, other, emit)
            except BaseException:
                with suppress(RacklessError):
                    engine.take_down(settings, other, ignore)
                raise
    return Thawed(other, found, time.monotonic() - started)


def _check(settings: Settings, found: Snapshot, specs: Mapping[str, BladeSpec]) -> None:
    """Raise RacklessError when a snapshot cannot be restored here."""
    label = f"the snapshot {found.name} of rack {found.rack}"
    emulator = template.emulator_version(engine.emulator())
    if emulator != found.emulator:
        raise RacklessError(f"{label} was made with {found.emulator}, and here is {emulator}",
                            hint="a QEMU reads what the same version saved")  # fmt: skip
    if found.accelerator == "kvm" and not Path("/dev/kvm").exists():
        raise RacklessError(f"{label} was made with KVM, which this host has not", hint="see `rackless doctor`")
    if missing := found.missing():
        raise RacklessError(f"{label} needs an image that is not there any more, or another one now: {missing[0]}",
                            hint="its blades cannot go on with other images or agents")  # fmt: skip
    for name, spec in specs.items():
        if not found.memory(name).exists() or (spec.disk and not found.disk(name).exists()):
            raise RacklessError(f"{label} is damaged: files of {name} are missing",
                                hint=f"`rackless snapshot delete {found.name}`")  # fmt: skip
    engine.check_room(engine.rack_of(found.blades, found.rack))
    need = sum(sparse.used(found.disk(name)) + sparse.used(found.memory(name)) for name in specs)
    freeze.check_room(settings, need, label)


def _thaw(settings: Settings, found: Snapshot, rack: str, emit: Emit) -> None:
    settings = settings.scaled(found.accelerator)
    paths = RackPaths(settings, rack)
    specs = {name: replace(spec, rack=rack) for name, spec in found.specs.items()}
    emit, record = journal.recording(paths, emit), journal.begun(paths)
    journal.record(paths, Note(f"this becomes what {found.rack} was in its snapshot {found.name}").to_json())
    with step(record, rack, "restore"):
        _copy_disks(paths, found, specs, emit)
        with daemon.connection(paths) as conn:  # before it is started anew, by other settings perhaps
            leaving = domain.owned(conn, rack) if conn else {}
            together({name: owned.domain for name, owned in leaving.items()}, domain.destroy)
        shared.close_shared_connections(paths, [spec.mgmt_address for spec in specs.values()])
        for name in leaving.keys() - specs.keys():
            blade.remove_files(Hosts(paths), None, name)
        _put_files(paths, found, specs)
        here = Hosts(paths)
        engine.prepare(paths, engine.rack_of(found.blades, found.rack).model_copy(update={"name": rack}), here, emit)
        settle.side(here, {})
        with daemon.connection(paths, start=True) as conn:
            assert conn is not None
            made = _restore(paths, conn, found, specs, emit)
            _go_on(paths, found, specs, made, emit)


def _copy_disks(paths: RackPaths, found: Snapshot, specs: Mapping[str, BladeSpec], emit: Emit) -> None:
    """While what is there still runs: the copies take their places when it has ended."""

    def copy(spec: BladeSpec) -> None:
        target = _copied(paths, spec.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.parent.chmod(0o700)
        try:
            sparse.copy(found.disk(spec.name), target)
        except OSError as error:
            raise RacklessError(f"cannot copy the disk of {spec.name}: {error.strerror}",
                                hint="is the disk full?") from error  # fmt: skip

    with step(emit, paths.name, "disks"):
        together({name: spec for name, spec in specs.items() if spec.disk}, copy)


def _copied(paths: RackPaths, name: str) -> Path:
    return paths.blade(name).root / _DISK


def _put_files(paths: RackPaths, found: Snapshot, specs: Mapping[str, BladeSpec]) -> None:
    """Disks, keys, and persistent memory that QEMU will fill. No blade runs."""
    for name, spec in specs.items():
        files = paths.blade(name)
        files.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if spec.disk:
            _copied(paths, name).replace(files.disk)
        for file in (files.pmem, files.pmem_vol):
            file.unlink(missing_ok=True)
            if spec.pmem:
                sparse.make(file, spec.pmem)
    shutil.copy2(found.folder / "secret", paths.secret)
    shutil.copytree(found.folder / "ssh", paths.ssh, dirs_exist_ok=True)
    paths.ssh.chmod(0o700)


def _restore(paths: RackPaths, conn: libvirt.virConnect, found: Snapshot, specs: Mapping[str, BladeSpec],
             emit: Emit) -> dict[str, libvirt.virDomain]:  # fmt: skip
    """Start all blades, paused. Not ready by their metadata: if this ends here, `up` makes them anew."""

    def start(name: str) -> None:
        guest = Guest(domain.domain_name(paths.name, name), specs[name].memory, specs[name].cpus,
                      console_socket(paths, name), paths.blade(name).console, agent_socket(paths, name),
                      _metadata(found, specs[name], ready=False))  # fmt: skip
        state, folder = found.memory(name), paths.blade(name).root
        with step(emit, paths.name, "restore", name):
            if paths.name == found.rack:  # libvirt takes another XML, but no other name
                domain.restore_paused(conn, state, template.own_xml(save_image.read_xml(state), guest, folder))
                return
            scratch = folder / _SCRATCH
            try:
                save_image.rewrite(state, scratch, lambda xml: template.own_xml(xml, guest, folder))
                domain.restore_paused(conn, scratch)
            finally:
                scratch.unlink(missing_ok=True)

    together({name: name for name in specs}, lambda name: domain.explain(f"restore {name}", lambda: start(name)),
             evidence=lambda name: blade.console_tail(Hosts(paths), None, name))  # fmt: skip
    return {name: conn.lookupByName(domain.domain_name(paths.name, name)) for name in specs}


def _metadata(found: Snapshot, spec: BladeSpec, ready: bool) -> dict[str, Any]:
    return {**found.blades[spec.name], "rack": spec.rack, "spec": spec.to_json(), "ready": ready}


def _go_on(paths: RackPaths, found: Snapshot, specs: Mapping[str, BladeSpec], made: Mapping[str, libvirt.virDomain],
           emit: Emit) -> None:  # fmt: skip
    """What is outside of the restored blades is made as it was, and they go on."""
    faults = {name: model.of("running", found.blades[name]) for name in specs}
    for name, spec in specs.items():
        shaping.limit(place.of(paths), spec.index, model.bandwidth(spec, faults[name]))
    settle.side(Hosts(paths), {spec.index: faults[name].side or 0 for name, spec in specs.items()})
    engine.write_ssh_files(paths, list(specs.values()))
    with step(emit, paths.name, "resume"):
        together(made, lambda one: domain.explain(f"resume {one.name()}", one.resume), workers=len(made))
    freeze.wake(paths, specs, emit)
    together(specs, lambda spec: domain.explain(f"mark {spec.name} ready", lambda: domain.write_metadata(
        made[spec.name], _metadata(found, spec, ready=True))))  # fmt: skip
