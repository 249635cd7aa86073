"""Carry out plans: `up` makes libvirt agree with the rack file, `down` removes what a rack owns.

Two truths only: the rack file says what should be, libvirt says what is. So every function starts by looking.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import agents, blade, lock
from orchestrator.errors import RacklessError
from orchestrator.events import Emit, Note, step
from orchestrator.hypervisor import daemon, probe
from orchestrator.image import build as image_build
from orchestrator.model import Rack, warnings
from orchestrator.network import bridge, namespace
from orchestrator.plan import Observed, Plan, check_capacity, make_plan
from orchestrator.settings import RackPaths, Settings
from orchestrator.spec import BladeSpec
from orchestrator.ssh import config, keys

if TYPE_CHECKING:
    import libvirt


@dataclass(frozen=True)
class UpResult:
    """What `up` did: blades changed, seconds in all and per blade, how many were restored and booted."""

    rack: str
    accelerator: str
    changed: tuple[str, ...]
    seconds: float
    blade_seconds: dict[str, float]
    restored: int
    booted: int

    def to_json(self) -> dict[str, Any]:
        """As `rackless up --json` prints it."""
        return {
            "rack": self.rack,
            "accelerator": self.accelerator,
            "changed": list(self.changed),
            "seconds": {"total": round(self.seconds, 2),
                        "blades": {name: round(s, 2) for name, s in self.blade_seconds.items()}},
            "restored": self.restored,
            "booted": self.booted,
        }  # fmt: skip


def observe(settings: Settings, rack: str) -> dict[str, Observed]:
    """The blades of a rack that libvirt has, by name. Empty when the rack is not up. Starts nothing."""
    paths = RackPaths(settings, rack)
    with daemon.connection(paths) as conn:
        return {} if conn is None else _observe(conn, rack)


def plan(settings: Settings, rack: Rack) -> Plan:
    """What `up` would do now."""
    key = image_build.image_key(rack.image)
    return make_plan(rack, key, observe(settings, rack.name))


def up(settings: Settings, rack: Rack, emit: Emit, cold: bool = False) -> UpResult:
    """Make the rack as the file says; ``cold`` boots every blade instead of restoring clones.

    Raises RacklessError when a blade does not become ready; what was made stays, and the next `up` goes on.
    """
    started = time.monotonic()
    paths = RackPaths(settings, rack.name)
    check_capacity(rack, _host_memory(), os.cpu_count() or 1)
    for warning in warnings(rack):
        emit(Note(warning))
    with lock.hold(paths):
        image = image_build.build(rack.image, settings.cache_dir / "images", emit)
        chosen = probe.accelerator(settings, image.kernel)
        settings = settings.scaled(chosen.name)
        paths = RackPaths(settings, rack.name)
        _prepare(paths, rack, emit)
        with daemon.connection(paths, start=True) as conn:
            assert conn is not None
            todo = make_plan(rack, image.key, _observe(conn, rack.name))
            specs = [action.spec for action in todo.actions if action.spec]
            shop = blade.Workshop(
                paths=paths,
                conn=conn,
                image=image,
                accelerator=chosen.name,
                emulator=_emulator(),
                manager=next(spec.fabric_address for spec in specs if spec.kind == "manager"),
                hosts={spec.name: spec.mgmt_address for spec in specs},
                emit=emit,
            )
            _write_ssh_files(paths, specs)
            if todo.pending:
                emit(Note(f"accelerator: {chosen.name} ({chosen.why})"))
            seconds, made = _carry_out(shop, todo, cold)
        return UpResult(
            rack=rack.name,
            accelerator=chosen.name,
            changed=tuple(action.blade for action in todo.actions if action.kind != "keep"),
            seconds=time.monotonic() - started,
            blade_seconds=seconds,
            restored=0 if cold else made,
            booted=made if cold else 0,
        )


def down(settings: Settings, rack: str, emit: Emit, keep_data: bool = False) -> list[str]:
    """Remove a rack: domains, daemons, network, files. Returns the names of the blades that were there.

    ``keep_data`` leaves disks, persistent memory and keys for the next `up`.
    """
    paths = RackPaths(settings, rack)
    with lock.hold(paths), step(emit, rack, "down"):
        with daemon.connection(paths, start=_has_domains(paths)) as conn:
            domains = _domains(conn, rack) if conn else {}
            _together([(name, lambda d=found[0]: _destroy(d)) for name, found in domains.items()])
        config.close_shared_connections(paths, [_spec_address(found[2]) for found in domains.values()])
        daemon.stop(paths)
        bridge.remove(rack)
        shutil.rmtree(settings.run_dir / rack, ignore_errors=True)
        if not keep_data:
            shutil.rmtree(paths.root, ignore_errors=True)
        return sorted(domains)


def status(settings: Settings, rack: str) -> dict[str, Any]:
    """The rack as `rackless status --json` prints it. ``ready``: the agent has joined and RDMA is active."""
    paths = RackPaths(settings, rack)
    with daemon.connection(paths) as conn:
        found = _domains(conn, rack) if conn else {}
    accelerators = {metadata.get("accelerator") for _, _, metadata in found.values()}
    described: dict[str, dict[str, Any]] = {}

    def describe(name: str) -> None:
        _, state, metadata = found[name]
        spec = BladeSpec.from_json(metadata["spec"])
        entry = {"name": name, "kind": spec.kind, "state": state, "cpus": spec.cpus, "memory_bytes": spec.memory,
                 "mgmt_address": spec.mgmt_address, "fabric_address": spec.fabric_address, "agents": {}}  # fmt: skip
        described[name] = entry
        if state != "running":
            return
        try:
            health = agents.call(paths, name, spec.mgmt_address, "agent.status", settings.status_seconds)
        except RacklessError as error:
            entry["state"] = "starting" if not metadata.get("ready") else "silent"
            entry["agents"] = {"error": error.message}
            return
        entry["agents"] = health
        ready = health["joined"] and health["rdma"] == "ACTIVE" and metadata.get("ready")
        entry["state"] = "ready" if ready else "starting"

    names = [name for name, (_, _, metadata) in found.items() if "spec" in metadata]
    _together([(name, lambda n=name: describe(n)) for name in names])
    order = sorted(described.values(), key=lambda entry: _address_key(entry["mgmt_address"]))
    return {"rack": rack, "accelerator": next(iter(accelerators - {None}), None), "blades": order}


def _prepare(paths: RackPaths, rack: Rack, emit: Emit) -> None:
    with step(emit, rack.name, "network"):
        for folder in (paths.blades, paths.logs, paths.settings.run_dir / rack.name):
            folder.mkdir(parents=True, exist_ok=True)
        paths.root.chmod(0o700)
        bridge.ensure(rack.name, rack.management.subnet, rack.fabric.mtu)
        keys.ensure_secret(paths)
        keys.ensure_rack_keys(paths)


def _carry_out(shop: blade.Workshop, todo: Plan, cold: bool) -> tuple[dict[str, float], int]:
    """Do what the plan says; seconds per blade and how many were made."""
    rack = shop.paths.name
    domains = _domains(shop.conn, rack)
    leaving = todo.of("remove", "recreate")
    _together([(a.blade, lambda n=a.blade: _destroy(domains[n][0])) for a in leaving if a.blade in domains])
    for action in todo.of("remove"):
        blade.remove_files(shop.paths, action.blade)
    making = [action.spec for action in todo.of("create", "recreate") if action.spec]
    states: dict[tuple[int, int], Path] = {}
    if not cold:
        sizes = sorted({(spec.memory, spec.cpus) for spec in making})

        def template(size: tuple[int, int]) -> None:
            states[size] = blade.ensure_template(shop, *size)

        _together([(f"template of {size[0] >> 20} MiB", lambda s=size: template(s)) for size in sizes],
                  workers=max(1, os.cpu_count() or 1))  # fmt: skip
    seconds: dict[str, float] = {}

    def make(spec: BladeSpec) -> None:
        started = time.monotonic()
        blade.create(shop, spec, None if cold else states[spec.memory, spec.cpus])
        seconds[spec.name] = time.monotonic() - started

    jobs: list[tuple[str, Callable[[], None]]] = [(spec.name, lambda s=spec: make(s)) for spec in making]
    for action in todo.of("update"):
        assert action.spec and action.old
        found, old, new = domains[action.blade][0], action.old, action.spec
        jobs.append((action.blade, lambda o=old, n=new, d=found: blade.update(shop, o, n, d)))
    _together(
        jobs,
        workers=shop.paths.settings.max_workers,
        console=lambda name: blade.console_tail(shop.paths, name),
    )
    if making:
        _ping_all(shop, [a.spec for a in todo.actions if a.spec], {spec.name for spec in making})
    return seconds, len(making)


def _ping_all(shop: blade.Workshop, specs: Sequence[BladeSpec], fresh: set[str]) -> None:
    """Write and read over RDMA between every pair of blades of which one is new."""
    paths = shop.paths

    def ping(position: int, spec: BladeSpec) -> None:
        peers = [p for p in specs[position + 1 :] if p.name in fresh or spec.name in fresh]
        for peer in peers:
            agents.call(paths, spec.name, spec.mgmt_address, "verbs.ping", paths.settings.control_seconds,
                        peer=peer.fabric_address)  # fmt: skip

    with step(shop.emit, paths.name, "verbs ping"):
        _together([(spec.name, lambda i=i, s=spec: ping(i, s)) for i, spec in enumerate(specs)])


def _together(
    jobs: Sequence[tuple[str, Callable[[], None]]],
    workers: int = 16,
    console: Callable[[str], str] | None = None,
) -> None:
    """Run named jobs in threads; afterwards raise the first failure, with the tail of that blade's console."""
    if not jobs:
        return
    failures: list[tuple[str, RacklessError]] = []
    with ThreadPoolExecutor(max_workers=min(workers, len(jobs))) as pool:
        running = {pool.submit(job): name for name, job in jobs}
        for future in as_completed(running):
            try:
                future.result()
            except RacklessError as error:
                failures.append((running[future], error))
    if failures:
        name, error = failures[0]
        tail = console(name) if console else ""
        more = f" ({len(failures) - 1} more blades failed)" if len(failures) > 1 else ""
        raise RacklessError(f"{error.message}{more}", hint=error.hint, log=error.log, detail=tail) from error


def _observe(conn: libvirt.virConnect, rack: str) -> dict[str, Observed]:
    observed = {}
    for name, (_, state, metadata) in _domains(conn, rack).items():
        try:
            spec = BladeSpec.from_json(metadata.get("spec"))
        except ValueError:
            spec = None
        if state == "running" and not metadata.get("ready"):
            state = "broken"
        observed[name] = Observed(name, state if state in ("running", "paused") else "broken", spec)
    return observed


def _domains(conn: libvirt.virConnect, rack: str) -> dict[str, tuple[libvirt.virDomain, str, dict[str, Any]]]:
    from orchestrator.hypervisor import domain

    return domain.owned(conn, rack)


def _destroy(found: libvirt.virDomain) -> None:
    from orchestrator.hypervisor import domain

    domain.destroy(found)


def _has_domains(paths: RackPaths) -> bool:
    """May blades still run although the private libvirtd does not? Then it must be started to stop them."""
    if paths.settings.libvirt_uri != daemon.PRIVATE:
        return True
    return namespace.exists(paths.name) and any(daemon.Daemon.of(paths).run.glob("qemu/*.xml"))


def _write_ssh_files(paths: RackPaths, specs: Sequence[BladeSpec]) -> None:
    addresses = {spec.name: spec.mgmt_address for spec in specs}
    keys.write_known_hosts(paths, addresses)
    config.write_ssh_config(paths, addresses)


def _spec_address(metadata: dict[str, Any]) -> str:
    return str(metadata.get("spec", {}).get("mgmt_address", ""))


def _address_key(address: str) -> tuple[int, ...]:
    return tuple(int(part) for part in address.split("."))


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _emulator() -> str:
    found = shutil.which("qemu-system-x86_64")
    if found is None:
        raise RacklessError("qemu-system-x86_64 is missing", hint="run `make testbed`")
    return found
