"""The hosts of a rack: this machine, and others that its rack file names. Who needs one asks for it by name here.

A blade's spec says which host it is on (None: this machine). The hosts of a rack that is up are noted in its folder
before anything is made on them, so that `status` and `down` need no rack file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from orchestrator.deeds import DEEDS
from orchestrator.errors import RacklessError
from orchestrator.hypervisor import daemon
from orchestrator.hypervisor.far import Far, Worker, by_ssh, reached
from orchestrator.hypervisor.far import command as far_command
from orchestrator.model import Host, Rack
from orchestrator.network import vxlan
from orchestrator.placement import Room
from orchestrator.settings import RackPaths

if TYPE_CHECKING:
    import libvirt

    from orchestrator.hypervisor.domain import Owned


@dataclass(frozen=True)
class Hosts:
    """The hosts of a rack while they are reached."""

    paths: RackPaths
    here: libvirt.virConnect | None = None
    """This machine's libvirt; None when it runs none for the rack."""
    far: Mapping[str, Far] = field(default_factory=dict)

    def conn(self, host: str | None) -> libvirt.virConnect:
        """The libvirt of a host."""
        if host is not None:
            return self._far(host).conn
        assert self.here is not None
        return self.here

    def do(self, host: str | None, deed: str, **fields: Any) -> Any:
        """Do on a host what deeds.py says. RacklessError as there."""
        return DEEDS[deed](self.paths, **fields) if host is None else self._far(host).do(deed, **fields)

    def everywhere(self, deed: str, **fields: Any) -> None:
        """Do the same on all hosts, this one last: it knows the others, also for who tries again."""
        for host in (*self.far, None):
            self.do(host, deed, **fields)

    def owned(self) -> dict[str, Owned]:
        """The blades of the rack on all hosts, by name; see domain.owned."""
        from orchestrator.hypervisor import domain

        found = domain.owned(self.here, self.paths.name) if self.here else {}
        for name, far in self.far.items():
            there = domain.owned(far.conn, self.paths.name)
            found |= {blade: replace(owned, host=name) for blade, owned in there.items()}
        return found

    def _far(self, host: str) -> Far:
        if host not in self.far:
            raise _unknown(host)
        return self.far[host]


@contextmanager
def opened(paths: RackPaths, revive: bool = True) -> Iterator[Hosts]:
    """The hosts that the rack was last brought up on; for `revive` see daemon.connection.

    RacklessError when one cannot be reached.
    """
    with reach(paths, noted(paths)) as far, daemon.connection(paths, revive=revive) as conn:
        yield Hosts(paths, conn, far)


@contextmanager
def reach(paths: RackPaths, hosts: Mapping[str, Host]) -> Iterator[dict[str, Far]]:
    """The hosts that are not this machine. RacklessError when one cannot be reached."""
    with ExitStack() as stack:
        far = {name: host for name, host in hosts.items() if host.uri}
        # All are called before the first one's answer is waited for.
        workers = {name: stack.enter_context(closing(Worker(paths, name, host))) for name, host in far.items()}
        yield {name: stack.enter_context(reached(name, host, workers[name])) for name, host in far.items()}


def noted(paths: RackPaths) -> dict[str, Host]:
    """The hosts of a rack as `note` kept them; none when all of it is on this machine."""
    try:
        text = _note(paths).read_text()
    except FileNotFoundError:
        return {}
    return TypeAdapter(dict[str, Host]).validate_python(json.loads(text))


def note(paths: RackPaths, hosts: Mapping[str, Host]) -> None:
    """Keep which hosts a rack is on. The file is there whole, or not at all."""
    if not hosts:
        _note(paths).unlink(missing_ok=True)
        return
    fresh = _note(paths).with_suffix(".new")
    fresh.write_text(json.dumps({name: host.model_dump(mode="json") for name, host in hosts.items()}) + "\n")
    fresh.replace(_note(paths))


def _note(paths: RackPaths) -> Path:
    return paths.root / "hosts.json"


def words(paths: RackPaths, host: str | None, command: Sequence[str]) -> list[str]:
    """The words that run a command on a host of a rack that is up. RacklessError when there is no such host."""
    if host is None:
        return [*command]
    known = noted(paths)
    if host not in known:
        raise _unknown(host)
    return far_command(host, known[host], [*command])


def _unknown(host: str) -> RacklessError:
    return RacklessError(f"host {host} is not known here", hint="`rackless up` with the rack file notes it")


def union(paths: RackPaths, rack: Rack) -> dict[str, Host]:
    """The hosts that the rack is on, or shall be. RacklessError when one is meant to be another machine now."""
    old = noted(paths)
    for name, host in rack.hosts.items():
        if name in old and old[name].uri != host.uri:
            raise RacklessError(f"host {name} of the rack that is up is at {old[name].uri or 'this machine'}",
                                hint="give the new one another name")  # fmt: skip
    known = {host.uri for host in rack.hosts.values()}
    return {**{name: host for name, host in old.items() if host.uri not in known}, **rack.hosts}


def check(paths: RackPaths, rack: Rack, far: Mapping[str, Far], cold: bool) -> None:
    """Refuse, before anything is touched, hosts that the rack cannot be spread over. RacklessError says why."""
    from orchestrator.hypervisor import domain

    if rack.home is None:
        return
    mine = DEEDS["hello"](paths)
    ours = {host.uri for host in noted(paths).values()}  # a host's name may be another one now
    for name, other in far.items():
        if other.host.uri not in ours and domain.owned(other.conn, paths.name):
            raise RacklessError(f"host {name} has a rack called {paths.name} already, of somebody else",
                                hint="give this one another name; or end its blades there with virsh, if nobody uses "
                                "them")  # fmt: skip
        other.do("vacant")
        if not cold and other.hello["emulator"] != mine["emulator"]:
            raise RacklessError(f"host {name} has another QEMU: {other.hello['emulator'] or 'none'} and not "
                                f"{mine['emulator']}, so that blades saved here cannot be restored there",
                                hint="install the same, or `rackless up --cold`")  # fmt: skip
    _check_ways(paths, rack, far)


def check_accelerator(paths: RackPaths, far: Mapping[str, Far], accelerator: str, emulator: str, cold: bool) -> None:
    """Refuse hosts that do not run what this machine does; see `check`."""
    import libvirt

    if accelerator != "kvm":
        return
    mine = DEEDS["hello"](paths)
    for name, other in far.items():
        try:
            other.conn.getDomainCapabilities(emulator, "x86_64", "pc", "kvm")
        except libvirt.libvirtError as error:
            raise RacklessError(f"host {name} has no KVM, and this machine has: {error}",
                                hint="set RACKLESS_ACCEL=tcg") from error  # fmt: skip
        if not cold and other.hello["processor"] != mine["processor"]:
            raise RacklessError(f"host {name} has another processor ({other.hello['processor']}), so that blades saved "
                                "here may not run there", hint="`rackless up --cold`")  # fmt: skip


def tunnels(rack: Rack) -> dict[str, vxlan.Tunnel]:
    """The ends of what joins the hosts of a rack, by host."""
    if rack.home is None:
        return {}
    number = vxlan.number(rack.name, str(rack.hosts[rack.home].address))
    addresses = {name: str(host.address) for name, host in rack.hosts.items()}
    return {name: vxlan.Tunnel(number, own, tuple(sorted(set(addresses.values()) - {own})))
            for name, own in addresses.items()}  # fmt: skip


def rooms(rack: Rack, far: Mapping[str, Far]) -> dict[str, Room]:
    """What each host of the rack has for its blades: all its memory but what blades of others have, and its CPUs."""
    from orchestrator.hypervisor import domain

    found: dict[str, Room] = {}
    for name in rack.hosts:
        if name not in far:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            found[name] = Room(memory, os.cpu_count() or 1)
            continue
        found[name] = domain.explain(f"look at host {name}", partial(_room, far[name].conn, rack.name))
    return found


def kept(paths: RackPaths, rack: Rack, far: Mapping[str, Far]) -> dict[str, str]:
    """The host that has a blade's disk or persistent memory, as far as files can tell.

    A host that is a namespace of this machine shares its folders: what is there may be of a blade on either.
    """
    found = {blade: name for name, other in far.items() if name in rack.hosts and by_ssh(other.host)
             for blade in other.do("kept")}  # fmt: skip
    if rack.home and all(by_ssh(other.host) for other in far.values()):
        found |= dict.fromkeys(DEEDS["kept"](paths), rack.home)
    return found


def _room(conn: libvirt.virConnect, rack: str) -> Room:
    from orchestrator.hypervisor import domain

    own = {owned.domain.UUIDString() for owned in domain.owned(conn, rack).values()}
    _, mebibytes, cpus, *_ = conn.getInfo()
    others = sum(one.maxMemory() for one in conn.listAllDomains() if one.isActive() and one.UUIDString() not in own)
    return Room((mebibytes << 20) - others * 1024, cpus)


def _check_ways(paths: RackPaths, rack: Rack, far: Mapping[str, Far]) -> None:
    """Have hosts their addresses, ways to each other, and room for the fabric's packets in those?"""
    for name, tunnel in tunnels(rack).items():
        fields = {"address": tunnel.address, "peers": list(tunnel.peers)}
        try:
            ways = far[name].do("routes", **fields) if name in far else DEEDS["routes"](paths, **fields)
        except RacklessError as error:  # another host's name is in it
            message = error.message if name in far else f"{error.message} (on host {name}, this machine)"
            raise RacklessError(message, hint=error.hint) from error
        for peer, way in ways.items():
            most = way["mtu"] - vxlan.OVERHEAD
            if most < vxlan.MANAGEMENT_MTU:
                raise RacklessError(
                    f"host {name} reaches {peer} by {way['interface']}, whose MTU of {way['mtu']} is too small",
                    hint=f"a rack needs {vxlan.MANAGEMENT_MTU + vxlan.OVERHEAD} or more between its hosts")  # fmt: skip
            if rack.fabric.mtu > most:
                raise RacklessError(
                    f"fabric.mtu {rack.fabric.mtu} does not fit between hosts: {name} reaches {peer} by "
                    f"{way['interface']}, whose MTU is {way['mtu']}, and VXLAN takes {vxlan.OVERHEAD} of it",
                    hint=f"write fabric: {{mtu: {most}}}, or give {way['interface']} an MTU of "
                    f"{rack.fabric.mtu + vxlan.OVERHEAD} on all hosts")  # fmt: skip
