"""Carry out plans: `up` makes libvirt agree with the rack file, `down` removes what a rack owns.

Two truths only: the rack file says what should be, libvirt says what is. So every function starts by looking.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from ipaddress import IPv4Interface
from pathlib import Path
from typing import Any

from orchestrator import agents, blade, guests, journal, lock, placement
from orchestrator.errors import RacklessError
from orchestrator.events import Changed, Emit, Note, step
from orchestrator.faults import settle
from orchestrator.faults.model import Faults, cut_off
from orchestrator.faults.model import of as faults_of
from orchestrator.fields import did_you_mean
from orchestrator.hypervisor import balloon, daemon, domain, hosts, probe
from orchestrator.hypervisor.far import Far
from orchestrator.hypervisor.hosts import Hosts
from orchestrator.image import build as image_build
from orchestrator.model import Host, Link, Rack, warnings
from orchestrator.network import bridge, place
from orchestrator.parallel import together
from orchestrator.plan import Action, Observed, Plan, State, check_capacity, make_plan
from orchestrator.privilege import require_root
from orchestrator.settings import RackPaths, Settings
from orchestrator.spec import BladeSpec
from orchestrator.ssh import config, keys, shared


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
    """The blades of a rack that libvirt has, by name. Empty when the rack is not up."""
    with hosts.opened(RackPaths(settings, rack)) as machines:
        return as_seen(machines.owned())


def plan(settings: Settings, rack: Rack) -> Plan:
    """What `up` would do now. RacklessError when a host cannot be reached, or the blades do not fit on the hosts."""
    key = image_build.image_key(rack.image, rack.flavour)
    paths = RackPaths(settings, rack.name)
    with hosts.reach(paths, hosts.union(paths, rack)) as far, daemon.connection(paths) as conn:
        observed = as_seen(Hosts(paths, conn, far).owned())
        return make_plan(rack, key, observed, _placed(paths, rack, far, observed))


def up(settings: Settings, rack: Rack, emit: Emit, cold: bool = False, only: Collection[str] | None = None) -> UpResult:
    """Make the rack as the file says; ``cold`` boots every blade instead of restoring clones.

    With ``only``, blades that are not named there are left as they are. Blades that are killed or paused come back;
    other faults stay until they are healed.

    Raises RacklessError when a blade does not become ready; what was made stays, and the next `up` goes on.
    """
    started = time.monotonic()
    paths = RackPaths(settings, rack.name)
    emit = journal.recording(paths, emit)
    guests.refuse(paths)
    check_room(rack)
    for warning in warnings(rack):
        emit(Note(warning))
    require_root("make network interfaces and start virtual machines")
    with ExitStack() as stack:
        machines = Hosts(paths, None, stack.enter_context(hosts.reach(paths, hosts.union(paths, rack))))
        _check_hosts(machines, rack, cold)
        stack.enter_context(lock.hold(paths))
        stack.enter_context(step(journal.begun(paths), rack.name, "up"))
        image = image_build.build(rack.image, settings.cache_dir / "images", emit, rack.flavour)
        chosen = probe.accelerator(settings, image.kernel)
        hosts.check_accelerator(paths, machines.far, chosen.name, emulator(), cold)
        settings = settings.scaled(chosen.name)
        paths = RackPaths(settings, rack.name)
        prepare(paths, rack, machines, emit)
        with daemon.connection(paths, start=True) as conn:
            machines = replace(machines, paths=paths, here=conn)
            domains = machines.owned()
            observed = as_seen(domains)
            todo = make_plan(rack, image.key, observed, _placed(paths, rack, machines.far, observed))
            if only is not None:
                todo = todo.only(only)
            specs = [action.spec for action in todo.actions if action.spec]
            manager = _manager(todo, observed, specs)
            shop = blade.Workshop(
                paths=paths,
                machines=machines,
                image=image,
                accelerator=chosen.name,
                emulator=emulator(),
                manager=manager.fabric_address,
                hosts={spec.name: spec.mgmt_address for spec in specs},
                emit=emit,
                recipe=rack.image,
                flavour=rack.flavour,
                fabric={spec.name: spec.fabric_address for spec in specs},
                faults={name: faults_of(found.state, found.metadata) for name, found in domains.items()},
            )
            write_ssh_files(paths, specs)
            if todo.pending:
                emit(Note(f"accelerator: {chosen.name} ({chosen.why})"))
            seconds, made = _carry_out(shop, todo, cold, domains)
            if only is None:
                _let_go(machines, rack)
        return UpResult(
            rack=rack.name,
            accelerator=chosen.name,
            changed=tuple(action.blade for action in todo.actions if action.kind != "keep"),
            seconds=time.monotonic() - started,
            blade_seconds=seconds,
            restored=0 if cold else made,
            booted=made if cold else 0,
        )


def down(settings: Settings, rack: str, emit: Emit, keep_data: bool = False,
         without: Collection[str] = ()) -> list[str]:  # fmt: skip
    """Remove a rack: domains, daemons, network, files. Returns the names of the blades that were there.

    ``keep_data`` leaves disks, persistent memory and keys for the next `up`. Nothing is done on hosts ``without`` which
    it must go: those that are gone for good.
    """
    with lock.hold(RackPaths(settings, rack)):
        return take_down(settings, rack, emit, keep_data, without)


def take_down(settings: Settings, rack: str, emit: Emit, keep_data: bool = False,
              without: Collection[str] = ()) -> list[str]:  # fmt: skip
    """The same as `down`, by who holds the rack's lock."""
    paths = RackPaths(settings, rack)
    guests.refuse(paths)
    known = hosts.noted(paths)
    others = [name for name, host in known.items() if host.uri is not None]
    for name in without:
        if name not in others:
            hint = did_you_mean(name, others) if others else "all of it is on this machine"
            raise RacklessError(f"rack {rack} has no other host {name}", hint=hint)
    left = {name: host for name, host in known.items() if name not in without}
    with hosts.reach(paths, left) as far:
        with step(journal.recording(paths, emit), rack, "down"):
            with daemon.connection(paths) as conn:
                machines = Hosts(paths, conn, far)
                domains = machines.owned()
                _end(machines, domains)
            addresses = [seen.spec.mgmt_address for seen in as_seen(domains).values() if seen.spec]
            shared.close_shared_connections(paths, addresses)
            daemon.stop(paths)
            machines.everywhere("leave", end=True)
        if not keep_data:  # after the last event: who follows them reads it before the file goes
            machines.everywhere("forget")
        elif without:
            hosts.note(paths, left)
        return sorted(domains)


def _manager(todo: Plan, observed: dict[str, Observed], specs: Sequence[BladeSpec]) -> BladeSpec:
    """The manager that keeps the books. RacklessError when new blades could not join it."""
    manager = next((spec for spec in specs if spec.kind == "manager"), None)
    if manager is None:
        raise RacklessError(f"rack {todo.rack} has no manager that is up", hint="`rackless up` makes it")
    stays = all(action.kind == "keep" for action in todo.actions if action.blade == manager.name)
    if stays and observed[manager.name].state != "running" and todo.of("create", "recreate"):
        raise RacklessError(f"the manager {manager.name} is {observed[manager.name].state}: no blade could join it",
                            hint=f"`rackless heal {manager.name}` first")  # fmt: skip
    return manager


def _check_hosts(machines: Hosts, rack: Rack, cold: bool) -> None:
    """Refuse hosts that will not do, and blades that do not fit on them, before anything is touched."""
    if not rack.hosts:
        return
    paths = machines.paths
    hosts.check(paths, rack, machines.far, cold)
    with daemon.connection(paths) as conn:
        _placed(paths, rack, machines.far, as_seen(replace(machines, here=conn).owned()))


def _placed(paths: RackPaths, rack: Rack, far: Mapping[str, Far],
            observed: Mapping[str, Observed]) -> dict[str, str | None]:  # fmt: skip
    """The host of each blade as its spec has it: None on this machine."""
    if rack.home is None:
        return {}
    there = {name: placement.Seat(seen.spec.host or rack.home, seen.spec.memory, seen.spec.cpus)
             for name, seen in observed.items() if seen.spec}  # fmt: skip
    placed = placement.place(rack, hosts.rooms(rack, far), there, hosts.kept(paths, rack, far))
    return {name: None if host == rack.home else host for name, host in placed.items()}


def _let_go(machines: Hosts, rack: Rack) -> None:
    """Leave hosts that are not the rack's any more; it has no blades there now."""
    if set(hosts.noted(machines.paths)) != set(rack.hosts):
        for name in machines.far.keys() - rack.hosts.keys():
            machines.do(name, "leave", end=False)
        hosts.note(machines.paths, rack.hosts)


def prepare(paths: RackPaths, rack: Rack, machines: Hosts, emit: Emit) -> None:
    """Make the rack's folders, its network and its keys, or complete what is there."""
    with step(emit, rack.name, "network"):
        for folder in (paths.blades, paths.logs, paths.settings.run_dir / rack.name):
            folder.mkdir(parents=True, exist_ok=True)
        paths.root.chmod(0o700)
        daemon.check(paths)
        bridge.require_taps()
        hosts.note(paths, hosts.union(paths, rack))  # before anything is there
        ends = hosts.tunnels(rack)
        bridge.ensure(place.of(paths), rack.management.subnet, rack.fabric.subnet, rack.fabric.mtu,
                      ends.get(rack.home or ""))  # fmt: skip
        for name in rack.far:
            machines.do(name, "extend", mtu=rack.fabric.mtu, tunnel=asdict(ends[name]))
        keys.ensure_secret(paths)
        keys.ensure_rack_keys(paths)


def _carry_out(
    shop: blade.Workshop, todo: Plan, cold: bool, domains: dict[str, domain.Owned]
) -> tuple[dict[str, float], int]:
    """Do what the plan says; seconds per blade and how many were made."""
    for action in todo.actions:
        if action.kind != "keep":
            shop.emit(Changed(todo.rack, action.blade, action.kind, tuple(action.reasons)))
    leaving = {action.blade for action in todo.of("remove", "recreate")}
    _end(shop.machines, {name: domains[name] for name in leaving & domains.keys()})
    for action in todo.of("remove", "recreate"):
        was = domains[action.blade].host if action.blade in domains else None
        if action.spec is None:
            blade.remove_files(shop.machines, was, action.blade)
        elif action.spec.host != was:  # files do not move to another host; its key is known by now, and is here
            shop.machines.do(was, "remove_files", name=action.blade)
    settle.side(shop.machines, {})  # a side of a partition that nobody is left on
    making = {action.blade: action.spec for action in todo.of("create", "recreate") if action.spec}
    states = {} if cold else _templates(shop, making.values())
    _supply(shop, making.values(), states)
    seconds: dict[str, float] = {}

    def make(spec: BladeSpec) -> None:
        started = time.monotonic()
        blade.create(shop, spec, states.get((spec.memory, spec.cpus)))
        seconds[spec.name] = time.monotonic() - started

    def change(action: Action) -> None:
        assert action.spec is not None
        assert action.old is not None
        blade.update(shop, action.old, action.spec, domains[action.blade].domain)

    together({action.blade: action for action in todo.of("update")}, change)
    together(making, make, shop.paths.settings.max_workers,
             lambda name: blade.console_tail(shop.machines, making[name].host, name))  # fmt: skip
    # One that `only` left alone may be killed or paused.
    staying = {action.blade: action.spec for action in todo.of("keep", "update") if action.spec
               and (action.kind == "update" or domains[action.blade].state == "running")}  # fmt: skip
    if making or todo.of("remove"):
        together(staying, lambda spec: _tell_hosts(shop, spec))
    if making:
        _ping_all(shop, [*staying.values(), *making.values()], set(making))
    return seconds, len(making)


def _end(machines: Hosts, domains: dict[str, domain.Owned]) -> None:
    """End blades. Those not killed end in order: their persistent memory is as they leave it, persisted or not."""

    def end(name: str) -> None:
        domain.destroy(domains[name].domain)
        if domains[name].state in ("running", "paused"):  # a pause is no power failure: stores are all there
            machines.do(domains[name].host, "shut_down", name=name)

    together({name: name for name in domains}, end)


def _tell_hosts(shop: blade.Workshop, spec: BladeSpec) -> None:
    seconds = shop.paths.settings.control_seconds
    agents.call(shop.paths, spec.name, spec.mgmt_address, "agent.hosts", seconds, hosts=shop.hosts)


def _templates(shop: blade.Workshop, specs: Collection[BladeSpec]) -> dict[tuple[int, int], Path]:
    """The saved blade for each size (memory, cpus); as many are booted at once as the host has cores.

    All are booted here, and copied to the hosts that need them.
    """
    states: dict[tuple[int, int], Path] = {}

    def obtain(size: tuple[int, int]) -> None:
        states[size] = blade.ensure_template(shop, *size)

    sizes = {f"{spec.memory >> 20} MiB, {spec.cpus} CPUs": (spec.memory, spec.cpus) for spec in specs}
    together(sizes, obtain, workers=os.cpu_count() or 1)
    return states


def _supply(shop: blade.Workshop, specs: Collection[BladeSpec], states: Mapping[tuple[int, int], Path]) -> None:
    """Copy the image, and the saved blades, to the hosts that they will run on."""
    needed: dict[str, set[Path]] = {}
    for spec in specs:
        if spec.host is not None:
            entries = needed.setdefault(spec.host, {shop.image.system.parent, shop.image.agents.parent})
            if (spec.memory, spec.cpus) in states:
                entries.add(states[spec.memory, spec.cpus].parent)

    def supply(host: str) -> None:
        with step(shop.emit, shop.paths.name, f"image to {host}"):
            shop.machines.far[host].supply(needed[host])

    together({host: host for host in needed}, supply)


def _ping_all(shop: blade.Workshop, specs: Sequence[BladeSpec], fresh: set[str]) -> None:
    """Write and read over RDMA between every pair of blades of which one is new."""
    paths = shop.paths
    faults = {spec.name: shop.faults.get(spec.name, Faults()).without("killed", "paused") for spec in specs}

    def ping(spec: BladeSpec) -> None:
        for peer in specs[specs.index(spec) + 1 :]:
            apart = cut_off(spec.name, faults[spec.name], peer.name, faults[peer.name])
            if (peer.name in fresh or spec.name in fresh) and not apart:
                agents.call(paths, spec.name, spec.mgmt_address, "verbs.ping", paths.settings.control_seconds,
                            peer=peer.fabric_address)  # fmt: skip

    with step(shop.emit, paths.name, "verbs ping"):
        together({spec.name: spec for spec in specs}, ping)


def as_it_is(domains: dict[str, domain.Owned], name: str, known: Mapping[str, Host] | None = None) -> Rack:
    """The rack that a file would say so as to change nothing of these blades. RacklessError when none can be read.

    known -- its hosts, as hosts.noted tells
    """
    return rack_of({blade: found.metadata for blade, found in domains.items()}, name, known)


def rack_of(
    metadata: Mapping[str, Mapping[str, Any]], name: str, known: Mapping[str, Host] | None = None
) -> Rack:
    """The same, of what the metadata of blades say."""
    read: list[BladeSpec] = []
    for said_of in metadata.values():
        with suppress(ValueError):  # another version of Rackless made it
            read.append(BladeSpec.from_json(said_of.get("spec")))
    specs = sorted(read, key=lambda spec: spec.index)
    if not specs:
        raise RacklessError(f"rack {name} is not up", hint="bring it up with `rackless up`")
    first = specs[0]
    fields = ("kind", "host", "cpus", "memory", "cpu_quota", "excache", "pmem", "disk")
    said = {spec.name: spec.to_json() for spec in specs}
    subnets = {
        part: str(IPv4Interface(f"{address}/{prefix}").network)
        for part, address, prefix in (
            ("fabric", first.fabric_address, first.fabric_prefix),
            ("management", first.mgmt_address, first.mgmt_prefix),
        )
    }
    return Rack.model_validate({
        "name": name,
        "image": str(metadata[first.name].get("recipe", "debian13")),
        "flavour": str(metadata[first.name].get("flavour", "blade")),
        "fabric": {"subnet": subnets["fabric"], "mtu": first.fabric_mtu},
        "management": {"subnet": subnets["management"]},
        "membership": said[first.name]["membership"],
        "hosts": {host: about.model_dump(mode="json") for host, about in (known or {}).items()},
        "blades": {n: {key: spec[key] for key in fields if spec.get(key) is not None} for n, spec in said.items()},
        "links": {spec.name: said[spec.name]["link"] for spec in specs if spec.link != Link()},
    })  # fmt: skip


def as_seen(domains: dict[str, domain.Owned]) -> dict[str, Observed]:
    """Blades by name, of domains as domain.owned gives them."""
    seen = {}
    for name, found in domains.items():
        try:
            spec = found.spec()
        except ValueError:
            spec = None
        state: State = "broken"
        if found.metadata.get("ready"):  # a blade killed in the middle of its restore is paused, and half made
            states: dict[str, State] = {"paused": "paused", "running": "running", "off": "stopped"}
            state = states.get(found.state, "broken")
        most = balloon.most(found.domain) if spec and state in ("running", "paused") else None
        seen[name] = Observed(name, state, spec, most)
    return seen


def write_ssh_files(paths: RackPaths, specs: Sequence[BladeSpec]) -> None:
    """Write what ssh needs to know of the blades."""
    addresses = {spec.name: spec.mgmt_address for spec in specs}
    keys.write_known_hosts(paths, addresses)
    config.write_ssh_config(paths, addresses)


def check_room(rack: Rack) -> None:
    """Raise RacklessError when this host cannot hold the rack."""
    if not rack.hosts:  # placement.py does it for many
        check_capacity(rack, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), os.cpu_count() or 1)


def emulator() -> str:
    found = shutil.which("qemu-system-x86_64")
    if found is None:
        raise RacklessError("qemu-system-x86_64 is missing", hint="run `make testbed`")
    return found
