"""Make a snapshot: all blades of a running rack stand still, are saved as they are, and go on.

They are paused at the same time, as nearly as the host can, and saved only then: what one had sent and another had not
got is sent again, by RDMA and TCP, after the pause as after a restore. To themselves the blades never stood still: of
all their clocks only the wall clock is late, and it is set.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import __version__, agents, engine, journal, lock, snapshot, sparse
from orchestrator.errors import RacklessError
from orchestrator.events import Emit, Note, ignore, step
from orchestrator.hypervisor import daemon, domain, hosts, template
from orchestrator.hypervisor.domain import Owned
from orchestrator.parallel import together
from orchestrator.privilege import require_root
from orchestrator.settings import RackPaths, Settings
from orchestrator.snapshot import Snapshot
from orchestrator.spec import BladeSpec
from orchestrator.ssh import keys
from orchestrator.units import format_size

if TYPE_CHECKING:
    import libvirt

_ROOM = 16 << 20
"""Bytes for what is small: headers, keys, states of devices."""


@dataclass(frozen=True)
class Frozen:
    """A snapshot that was made, and how long it took."""

    snapshot: Snapshot
    seconds: float
    paused: float
    """Seconds for which the blades stood still."""
    apart: float
    """Seconds from when the first was told to stand still to when the last did."""

    def to_json(self) -> dict[str, Any]:
        """As `rackless snapshot create --json` prints it."""
        return {**self.snapshot.to_json(), "seconds": {"total": round(self.seconds, 2),
                "paused": round(self.paused, 2), "apart": round(self.apart, 3)}}  # fmt: skip


def create(settings: Settings, rack: str, name: str, emit: Emit = ignore) -> Frozen:
    """Make a snapshot of a rack that runs, while its programs run.

    RacklessError, and the rack goes on as before, when the name is taken, a blade is killed, paused or half made, there
    is no room, or a blade cannot be saved. A command that is killed leaves the blades paused: `heal` and `up` resume
    them, and `gc` removes what it had saved.
    """
    started = time.monotonic()
    require_root("save virtual machines")
    paths = RackPaths(settings, rack)
    with lock.hold(paths), daemon.connection(paths) as conn:
        snapshot.must_be_free(settings, rack, name)
        must_be_here(paths)
        blades = running(domain.owned(conn, rack) if conn else {}, rack)
        specs = {blade: BladeSpec.from_json(found.metadata["spec"]) for blade, found in blades.items()}
        paths = RackPaths(settings.scaled(str(next(iter(blades.values())).metadata.get("accelerator"))), rack)
        check_room(settings, _most(paths, specs), f"a snapshot of rack {rack}")
        emit = journal.recording(paths, emit)
        pause = _Pause()
        try:
            with step(emit, rack, "snapshot"), snapshot.making(settings, rack, name) as folder:
                _keep_keys(paths, specs, folder)
                for blade in blades:
                    (folder / "blades" / blade).mkdir(mode=0o700, parents=True)
                with _standing_still({blade: found.domain for blade, found in blades.items()}, pause):
                    created = round(time.time(), 3)
                    _save(paths, blades, specs, folder, emit)
                _describe(rack, name, created, blades, folder).write()
        except BaseException:
            if pause.seconds:
                with suppress(RacklessError):  # why there is no snapshot is what the user has to hear
                    wake(paths, specs, emit)
            raise
        try:
            wake(paths, specs, emit)
        except RacklessError as error:
            emit(Note(f"snapshot {name} is whole, but wall clocks of blades may be late: {error.message}"))
    journal.record(paths, Note(f"snapshot {name} was made").to_json())
    return Frozen(snapshot.find(settings, rack, name), time.monotonic() - started, pause.seconds, pause.apart)


def must_be_here(paths: RackPaths) -> None:
    """Raise RacklessError when a rack is on other hosts, too."""
    if far := [name for name, host in hosts.noted(paths).items() if host.uri]:
        raise RacklessError(f"rack {paths.name} is on host {far[0]}, too: snapshots are of racks on one host",
                            hint="`rackless down`, and `up` without `hosts:`")  # fmt: skip


def running(found: Mapping[str, Owned], rack: str) -> dict[str, Owned]:
    """The blades of a rack. RacklessError unless they all run and are whole."""
    blades = {name: owned for name, owned in found.items() if not domain.is_template(owned)}
    if not blades:
        raise RacklessError(f"rack {rack} is not up", hint="bring it up with `rackless up`")
    for name, owned in blades.items():
        try:
            BladeSpec.from_json(owned.metadata.get("spec"))
        except ValueError as error:
            raise RacklessError(f"another version of Rackless made {name}: {error}",
                                hint="`rackless up` makes it anew") from None  # fmt: skip
        if not owned.metadata.get("ready"):
            raise RacklessError(f"blade {name} is not whole", hint="`rackless up` makes it anew")
        if owned.state != "running":
            state = {"off": "killed"}.get(owned.state, owned.state)
            raise RacklessError(f"blade {name} is {state}: only of a rack that runs there are snapshots",
                                hint=f"`rackless heal {name}` first; other faults may stay")  # fmt: skip
    return blades


def check_room(settings: Settings, need: int, what: str) -> None:
    """Raise RacklessError when the disk of racks has not so many bytes for something."""
    place = next(path for path in (settings.snapshots, *settings.snapshots.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < need:
        raise RacklessError(
            f"no room for {what}: it may take {format_size(_mib(need))}, and {place} has {format_size(_mib(free))}",
            hint="free some disk, or `rackless snapshot delete` one",
        )


def wake(paths: RackPaths, specs: Mapping[str, BladeSpec], emit: Emit) -> None:
    """Set the wall clocks of blades that have stood still, and make their random numbers other ones than before."""

    def call(spec: BladeSpec) -> None:
        agents.call(paths, spec.name, spec.mgmt_address, "agent.wake", paths.settings.control_seconds,
                    entropy=os.urandom(64).hex(), epoch_ns=time.time_ns())  # fmt: skip

    with step(emit, paths.name, "wake"):
        together(specs, call)


class _Pause:
    """How long blades stood still, and how far apart they stopped; seconds."""

    seconds = 0.0
    apart = 0.0


@contextmanager
def _standing_still(blades: Mapping[str, libvirt.virDomain], pause: _Pause) -> Iterator[None]:
    """All blades are paused during the block, and go on after it whatever happens; `pause` is told how long."""
    began = time.monotonic()
    try:
        together(blades, lambda found: domain.explain(f"pause {found.name()}", found.suspend), workers=len(blades))
        pause.apart = time.monotonic() - began
        yield
    except BaseException:
        for found in blades.values():
            with suppress(Exception):  # it is not being saved, or has gone
                found.abortJob()
        raise
    finally:
        try:
            together(blades, _resume, workers=len(blades))
        finally:
            pause.seconds = time.monotonic() - began


def _resume(found: libvirt.virDomain) -> None:
    """Unless it runs: of several that were to be paused, one may have failed."""
    if domain.STATES.get(domain.explain(f"look at {found.name()}", found.state)[0]) == "paused":
        domain.explain(f"resume {found.name()}", found.resume)


def _save(paths: RackPaths, blades: Mapping[str, Owned], specs: Mapping[str, BladeSpec], folder: Path,
          emit: Emit) -> None:  # fmt: skip
    """Save paused blades into a folder."""

    def save(blade: str) -> None:
        place = folder / "blades" / blade
        with step(emit, paths.name, "save", blade):
            if specs[blade].disk:
                _copy_disk(paths, blade, place / snapshot.DISK)
            domain.explain(f"save {blade}",
                           lambda: domain.save_memory(blades[blade].domain, place / snapshot.MEMORY))  # fmt: skip

    together({blade: blade for blade in blades}, save)


def _describe(rack: str, name: str, created: float, blades: Mapping[str, Owned], folder: Path) -> Snapshot:
    """What has been saved to a folder."""
    images: dict[str, str] = {}
    for blade in blades:
        images |= snapshot.images_of(folder / "blades" / blade / snapshot.MEMORY)
    accelerator = next(iter(blades.values())).metadata.get("accelerator")
    return Snapshot(rack, name, created, __version__, template.emulator_version(engine.emulator()), str(accelerator),
                    {blade: found.metadata for blade, found in blades.items()}, images, folder)  # fmt: skip


def _copy_disk(paths: RackPaths, blade: str, target: Path) -> None:
    try:
        sparse.copy(paths.blade(blade).disk, target)
    except OSError as error:
        raise RacklessError(f"cannot copy the disk of {blade}: {error.strerror}", hint="is the disk full?") from error


def _keep_keys(paths: RackPaths, specs: Mapping[str, BladeSpec], folder: Path) -> None:
    """What blades know the host by, and it them: it is in their memory, and new after a `down`."""
    shutil.copy2(paths.secret, folder / "secret")
    (folder / "ssh" / "hostkeys").mkdir(mode=0o700, parents=True)
    shutil.copy2(keys.user_key(paths), folder / "ssh" / keys.user_key(paths).name)
    for blade in specs:
        shutil.copy2(keys.host_key(paths, blade), folder / "ssh" / "hostkeys" / blade)


def _most(paths: RackPaths, specs: Mapping[str, BladeSpec]) -> int:
    """Bytes that a snapshot takes at most."""
    return sum(spec.memory + 2 * (spec.pmem or 0) + sparse.used(paths.blade(blade).disk) + _ROOM
               for blade, spec in specs.items())  # fmt: skip


def _mib(size: int) -> int:
    return size >> 20 << 20
