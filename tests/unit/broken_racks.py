"""Racks to break without VMs: domains in libvirt's own test driver, agents that answer, a fabric of real bridges.

Each blade is a network namespace whose veth is plugged into the rack's fabric as a tap would be, so that packets
tell what is cut. Only limits of CPUs and cables are beyond the test driver: those calls are kept.
"""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import libvirt
import pytest
from pyroute2 import netns

from guest_agents import control
from orchestrator import engine
from orchestrator.hypervisor import daemon, domain
from orchestrator.network import namespace, place
from orchestrator.settings import RackPaths
from orchestrator.spec import BladeSpec
from orchestrator.ssh.keys import ensure_secret
from tests.unit.netns_racks import ensure_network, scratch_rack
from tests.unit.stand_in import blade_specs

DOMAIN = """<domain type='test'><name>{name}</name><metadata><rackless:blade xmlns:rackless='{namespace}'
>{metadata}</rackless:blade></metadata><memory unit='KiB'>262144</memory><os><type>hvm</type></os>
<on_reboot>destroy</on_reboot><on_crash>destroy</on_crash></domain>"""


@dataclass
class BrokenRack:
    """A rack of gm0, pb0, mb0 and mb1 that can be broken."""

    paths: RackPaths
    specs: dict[str, BladeSpec]
    conn: Any
    updates: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """What each agent was told by agent.update."""
    woken: list[str] = field(default_factory=list)
    """Who was told by agent.wake that it had stood still."""
    drains: list[dict[str, Any]] = field(default_factory=list)
    """What LITE's directory and processor blades were asked to move."""
    drained: Callable[[], None] = lambda: None
    """Called when it has moved all; its answer is from before."""
    departing: Callable[[dict[str, Any]], None] = lambda _request: None
    """Called with what a blade is asked about Hotpot's chunks; its answer is from after."""
    replies: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By "BLADE OPERATION", what an agent answers; an exception is raised there."""
    limits: dict[str, float | None] = field(default_factory=dict)
    cables: dict[str, bool] = field(default_factory=dict)
    ups: list[tuple[Any, set[str]]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.paths.name

    def state(self, blade: str) -> str:
        return domain.owned(self.conn, self.name)[blade].state

    def metadata(self, blade: str) -> dict[str, Any]:
        return domain.owned(self.conn, self.name)[blade].metadata

    def hears(self, one: str, other: str) -> bool:
        """Does a packet of one blade reach another over the fabric?"""

        def open_port() -> socket.socket:
            port = socket.socket(type=socket.SOCK_DGRAM)
            port.bind((self.specs[other].fabric_address, 9))
            port.settimeout(1)
            return port

        def send() -> None:
            with socket.socket(type=socket.SOCK_DGRAM) as port:
                port.sendto(b"hello", (self.specs[other].fabric_address, 9))

        with namespace.inside(self._netns(other), open_port) as port:
            namespace.inside(self._netns(one), send)
            try:
                return port.recv(16) == b"hello"
            except TimeoutError:
                return False

    def parts(self) -> list[set[str]]:
        """Groups of blades that hear each other."""
        groups: list[set[str]] = []
        for name in self.specs:
            home = next((group for group in groups if self.hears(name, min(group))), None)
            groups.append({name}) if home is None else home.add(name)
        return groups

    def bridges(self) -> set[str]:
        done = subprocess.run(["ip", "-json", "-n", namespace.name_of(self.name), "link", "show", "type", "bridge"],
                              capture_output=True, check=True)  # fmt: skip
        return {link["ifname"] for link in json.loads(done.stdout)}

    def master(self, blade: str) -> str:
        """The bridge that a blade's cable is plugged into."""
        tap = place.of(self.paths).tap(place.FABRIC, self.specs[blade].index)
        done = subprocess.run(["ip", "-json", "-n", namespace.name_of(self.name), "link", "show", "dev", tap],
                              capture_output=True, check=True)  # fmt: skip
        return str(json.loads(done.stdout)[0]["master"])

    def _netns(self, blade: str) -> str:
        return f"{self.name}-{blade}"

    def plug(self, stack: ExitStack, spec: BladeSpec) -> None:
        """Give a blade a namespace, with a cable to the fabric."""
        own = namespace.name_of(self._netns(spec.name))
        netns.create(own)
        stack.callback(netns.remove, own)
        tap = place.of(self.paths).tap(place.FABRIC, spec.index)
        for words in (
            f"-n {namespace.name_of(self.name)} link add {tap} type veth peer name fabric netns {own}",
            f"-n {namespace.name_of(self.name)} link set {tap} master fabric up",
            f"-n {own} addr add {spec.fabric_address}/24 dev fabric",
            f"-n {own} link set fabric up",
        ):
            subprocess.run(["ip", *words.split()], check=True)

    def serve(self, stack: ExitStack, spec: BladeSpec) -> None:
        """Start the blade's agent."""
        self.updates[spec.name] = []

        def answer(request: dict[str, Any]) -> dict[str, Any]:
            op = request["op"]
            if op == "hotpot.depart":
                self.departing(request)
            reply = self.replies.get(f"{spec.name} {op}", {})
            if isinstance(reply, Exception):
                raise reply
            reply = dict(reply)
            if op == "lite.directory.drain":
                self.drains.append({k: v for k, v in request.items() if k != "op"})
                if not {"dry", "cancel"} & request.keys():
                    self.drained()
            if op == "process.drain":
                self.drains.append({k: v for k, v in request.items() if k != "op"})
                self.drained()
            if op == "agent.wake":
                self.woken.append(spec.name)
            if op == "agent.update":
                self.updates[spec.name].append({k: v for k, v in request.items() if k != "op"})
            return reply

        ops = ("agent.update", "agent.status", "memory.stats", "process.stats", "vnode.list", "program.list",
               "member.list", "lite.directory.drain", "hotpot.stat", "agent.resize",
               "process.drain", "agent.wake", "hotpot.depart")
        words = f"-n {namespace.name_of(self.name)} addr add {spec.mgmt_address}/32 dev lo"
        subprocess.run(["ip", *words.split()], check=True)
        server = namespace.inside(self.name, lambda: control.Server(
            (spec.mgmt_address, control.PORT), ensure_secret(self.paths), dict.fromkeys(ops, answer)))  # fmt: skip
        stack.enter_context(server.start())


def make_domain(conn: Any, spec: BladeSpec, **more: Any) -> None:
    """A running domain of a blade."""
    metadata = {"rack": spec.rack, "blade": spec.name, "ready": True, "accelerator": "kvm", "spec": spec.to_json()}
    conn.createXML(DOMAIN.format(name=f"{spec.rack}.{spec.name}", namespace=domain.NAMESPACE,
                                 metadata=json.dumps({**metadata, **more})))  # fmt: skip


@contextmanager
def broken_rack(patch: pytest.MonkeyPatch) -> Iterator[BrokenRack]:
    """A rack that is up. Nothing of it is left afterwards."""
    with ExitStack() as stack:
        paths = stack.enter_context(scratch_rack())
        specs = blade_specs(paths.name, ("gm0", "pb0", "mb0", "mb1"))
        conn = libvirt.open("test:///default")
        stack.callback(conn.close)
        rack = BrokenRack(paths, specs, conn)
        members = [{"name": name, "node_id": spec.index + 1, "incarnation": 1, "state": "alive"}
                   for name, spec in specs.items()]  # fmt: skip
        rack.replies["gm0 member.list"] = {"members": members}
        rack.replies["gm0 lite.directory.drain"] = {"moved": 0, "own": 0, "locks": []}
        rack.replies |= {f"{name} hotpot.depart": {"datasets": {}, "moved": 0} for name in specs}
        ensure_network(paths.name)
        for spec in specs.values():
            make_domain(conn, spec)
            rack.plug(stack, spec)
            rack.serve(stack, spec)

        @contextmanager
        def connection(_paths: RackPaths, start: bool = False, **_how: bool) -> Iterator[Any]:
            yield conn

        def up(_settings: object, wanted: Any, _emit: object, only: Mapping[str, object]) -> None:
            rack.ups.append((wanted, set(only)))

        patch.setattr(daemon, "connection", connection)
        patch.setattr(engine, "up", up)
        patch.setattr(domain, "limit_cpu", lambda found, quota: rack.limits.update({found.name(): quota}))
        patch.setattr(domain, "set_carrier", lambda found, _mac, up: rack.cables.update({found.name(): up}))
        yield rack
