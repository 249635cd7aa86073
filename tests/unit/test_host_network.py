"""A rack whose bridges are among the host's interfaces: "the host" is a namespace here, this machine is not touched."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any, TypeVar

import pytest
from pyroute2 import netns

from orchestrator import leftovers
from orchestrator.errors import RacklessError
from orchestrator.hypervisor import daemon, remains
from orchestrator.leftovers import Leftover
from orchestrator.network import namespace, place, shaping, sides
from orchestrator.network.place import FABRIC, MANAGEMENT, HostNetwork
from orchestrator.settings import RackPaths
from orchestrator.ssh.config import ssh_config_text
from tests.unit.netns_racks import ensure_network, needs_root, scratch_rack

pytestmark = [pytest.mark.netns, needs_root]

T = TypeVar("T")
ADDRESS = "10.78.0.254"


class Host:
    """A scratch network that stands for the host's."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, action: Callable[..., T], *words: Any) -> T:
        """Do something there."""
        return namespace.inside(self.name, lambda: action(*words))

    def ip(self, *words: str) -> Any:
        command = ["ip", "-json", "-details", "-n", namespace.name_of(self.name), *words]
        return json.loads(subprocess.run(command, capture_output=True, check=True).stdout or "[]")

    def links(self) -> dict[str, dict[str, Any]]:
        return {link["ifname"]: link for link in self.ip("link")}


@pytest.fixture
def paths() -> Iterator[RackPaths]:
    """A rack in a libvirt that is not ours; of what it says of that libvirt only the place of the network is used."""
    with scratch_rack() as made:
        yield RackPaths(replace(made.settings, libvirt_uri="qemu:///system?socket=/nowhere"), made.name)


@pytest.fixture
def host(paths: RackPaths) -> Iterator[Host]:
    made = Host(f"h{paths.name}")
    netns.create(namespace.name_of(made.name))
    try:
        made.ip("link", "set", "lo", "up")
        yield made
    finally:
        netns.remove(namespace.name_of(made.name))


@pytest.fixture
def rack(paths: RackPaths) -> HostNetwork:
    found = place.of(paths)
    assert isinstance(found, HostNetwork)
    return found


def test_bridges_are_marked_and_named_by_their_rack(host: Host, rack: HostNetwork) -> None:
    assert not host(rack.exists)
    for _ in range(2):
        host(ensure_network, rack)
    found = host.links()
    assert set(found) == {"lo", rack.bridge(MANAGEMENT), rack.bridge(FABRIC)}
    for network, mtu, prefix in ((MANAGEMENT, 1500, "rlm-"), (FABRIC, 9000, "rlf-")):
        link = found[rack.bridge(network)]
        assert link["ifname"].startswith(prefix)
        assert (link["mtu"], link["ifalias"], link["linkinfo"]["info_kind"]) == (mtu, rack.mark, "bridge")
        assert len(rack.tap(network, 9999)) == 15
    (shown,) = host.ip("-4", "addr", "show", "dev", rack.bridge(MANAGEMENT))
    assert [(a["local"], a["prefixlen"]) for a in shown["addr_info"]] == [(ADDRESS, 24)]
    assert host.ip("-4", "addr", "show", "dev", rack.bridge(FABRIC)) == []
    assert host(rack.exists)
    assert not namespace.exists(rack.rack)


def test_the_real_host_does_not_see_it(host: Host, rack: HostNetwork) -> None:
    before = socket.if_nameindex()
    host(ensure_network, rack)
    assert socket.if_nameindex() == before


def test_racks_side_by_side_need_addresses_of_their_own(host: Host, rack: HostNetwork) -> None:
    other = HostNetwork("other", rack.run)
    host(ensure_network, rack)
    with pytest.raises(RacklessError, match=r"the management subnet 10\.78\.0\.0/24 of rack other clashes") as caught:
        host(ensure_network, other)
    assert rack.bridge(MANAGEMENT) in caught.value.message
    host(ensure_network, other, IPv4Network("10.79.0.0/24"))
    host(rack.remove)
    assert set(host.links()) == {"lo", other.bridge(MANAGEMENT), other.bridge(FABRIC)}


@pytest.mark.parametrize(
    ("words", "clash"),
    [
        ("addr add 10.78.0.9/24 dev eth0", "management subnet 10.78.0.0/24 .* clashes with 10.78.0.0/24 .*eth0"),
        ("addr add 10.77.0.200/32 dev eth0", "fabric subnet 10.77.0.0/24 .* clashes with 10.77.0.200/32 .*eth0"),
        ("route add 10.78.0.0/16 via 192.168.9.1", "management subnet .* clashes with 10.78.0.0/16 .*eth0"),
        ("route add unreachable 10.77.0.0/25", "fabric subnet .* clashes with 10.77.0.0/25 of this host$"),
    ],
)
def test_addresses_that_the_host_has_are_refused(host: Host, rack: HostNetwork, words: str, clash: str) -> None:
    host.ip("link", "add", "eth0", "type", "veth", "peer", "name", "far")
    host.ip("link", "set", "far", "up")
    host.ip("addr", "add", "192.168.9.2/24", "dev", "eth0")
    host.ip("link", "set", "eth0", "up")
    host.ip("route", "add", "default", "via", "192.168.9.1")
    host(ensure_network, rack)  # neither those addresses nor the default route are in the way
    host(rack.remove)
    host.ip(*words.split())
    before = host.links()
    with pytest.raises(RacklessError, match=clash) as caught:
        host(ensure_network, rack)
    assert "{subnet: 10.99.0.0/24}" in (caught.value.hint or "")
    assert host.links() == before


def test_only_what_is_marked_is_removed(host: Host, rack: HostNetwork) -> None:
    """Somebody's bridge that happens to have our name."""
    host(ensure_network, rack)
    name = rack.bridge(FABRIC)
    host.ip("link", "set", name, "alias", "mine")
    host(rack.remove)
    assert set(host.links()) == {"lo", name}
    with pytest.raises(RacklessError, match=f"the interface {name} of this host is not of rack {rack.rack}"):
        host(ensure_network, rack)
    assert host.links()[name]["ifalias"] == "mine"
    host.ip("link", "del", name)
    host.ip("link", "add", name, "type", "bridge")  # without an alias: not ours either
    host(rack.remove)
    assert name in host.links()


def test_an_up_killed_before_it_marked_its_bridge(host: Host, rack: HostNetwork) -> None:
    for finish in (ensure_network, HostNetwork.remove):
        host(ensure_network, rack)
        host.ip("link", "set", rack.bridge(MANAGEMENT), "alias", "")
        assert "ifalias" not in host.links()[rack.bridge(MANAGEMENT)]
        host(finish, rack)
    assert set(host.links()) == {"lo"}


def test_a_rack_of_the_same_name_elsewhere_is_another_one(host: Host, rack: HostNetwork) -> None:
    assert rack.mark.startswith(f"rackless:{rack.rack}:")
    other = HostNetwork(rack.rack, rack.run / "other")
    host(ensure_network, rack)
    assert not host(other.exists)
    host(other.remove)
    assert host(rack.exists)
    with pytest.raises(RacklessError, match=f"is not of rack {rack.rack}"):
        host(ensure_network, other, IPv4Network("10.79.0.0/24"))


def test_removing_can_be_repeated(host: Host, rack: HostNetwork) -> None:
    host(rack.remove)
    host(ensure_network, rack)
    host(rack.remove)
    host(rack.remove)
    assert not host(rack.exists)


def test_blades_are_reached_directly(host: Host, rack: HostNetwork, paths: RackPaths) -> None:
    with pytest.raises(RacklessError, match="has no network"):
        host(rack.connect, ADDRESS, 7070, 1)
    host(ensure_network, rack)
    with host(socket.create_server, (ADDRESS, 7070)):
        host(rack.connect, ADDRESS, 7070, 2).close()
    assert "ProxyCommand" not in ssh_config_text(paths, {"mb0": "10.78.0.10"})
    assert rack.entry() == []


def test_a_limit_is_on_the_racks_own_tap(host: Host, rack: HostNetwork) -> None:
    host(ensure_network, rack)
    for name in ("fabric3", rack.tap(FABRIC, 3)):
        host.ip("link", "add", name, "type", "veth")
    host(shaping.limit, rack, 3, 1_000_000)
    kinds = {}
    for name in ("fabric3", rack.tap(FABRIC, 3)):
        command = ["tc", "-json", "-n", namespace.name_of(host.name), "qdisc", "show", "dev", name]
        kinds[name] = [q["kind"] for q in json.loads(subprocess.run(command, capture_output=True, check=True).stdout)]
    assert "tbf" in kinds[rack.tap(FABRIC, 3)]
    assert "tbf" not in kinds["fabric3"]


def test_sides_of_a_partition_are_marked_and_go(host: Host, rack: HostNetwork) -> None:
    host(ensure_network, rack)
    for index in range(3):
        host.ip("link", "add", rack.tap(FABRIC, index), "type", "veth")
        host.ip("link", "set", rack.tap(FABRIC, index), "master", rack.bridge(FABRIC))
    host.ip("link", "add", "other", "type", "bridge")

    def masters() -> list[str]:
        return [host.links()[rack.tap(FABRIC, index)]["master"] for index in range(3)]

    for _ in range(2):
        host(sides.part, rack, {0: 0, 1: 2, 2: 1, 7: 2})  # blade 7 has no tap: its power is off
        assert masters() == [rack.side(0), rack.side(2), rack.side(1)]
    assert (host.links()[rack.side(2)]["ifalias"], host.links()[rack.side(2)]["mtu"]) == (rack.mark, 9000)
    host(sides.part, rack, {1: 0})
    assert masters() == [rack.side(0), rack.side(0), rack.side(1)]
    assert rack.side(2) not in host.links()
    host(rack.remove)
    left = {name for name, link in host.links().items() if link.get("linkinfo", {}).get("info_kind") == "bridge"}
    assert left == {"other"}


def test_bridges_left_over_are_found_and_removed(
    host: Host, rack: HostNetwork, paths: RackPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    blades: dict[str, int] = {f"{rack.rack}.mb0": 0}
    monkeypatch.setattr(remains, "known_blades", lambda _paths: blades)
    daemon.claim(paths)
    host(ensure_network, rack)
    assert host(leftovers.find, paths.settings) == []  # a blade runs
    blades.clear()
    found = host(leftovers.find, paths.settings)
    assert found == [Leftover("bridges", f"{rack.bridge(MANAGEMENT)} {rack.bridge(FABRIC)}", rack.rack),
                     Leftover("folder", str(paths.settings.run_dir / rack.rack), rack.rack)]  # fmt: skip
    host(leftovers.remove, paths.settings, found)
    assert set(host.links()) == {"lo"}
    assert host(leftovers.find, paths.settings) == []


UNPRIVILEGED = """
import sys
from pathlib import Path
from ipaddress import IPv4Network
from orchestrator.errors import RacklessError
from orchestrator.network import bridge, shaping
from orchestrator.network.place import HostNetwork, OwnNamespace
name, run = sys.argv[2], Path(sys.argv[4])
place = HostNetwork(name, run) if sys.argv[1] == "host" else OwnNamespace(name)
step = {"ensure": lambda: bridge.ensure(place, IPv4Network("10.78.0.0/24"), IPv4Network("10.77.0.0/24"), 9000),
        "limit": lambda: shaping.limit(place, 0, 1_000_000), "remove": place.remove}[sys.argv[3]]
try:
    step()
except RacklessError as error:
    print(error.message, error.hint, sep="|")
"""


@pytest.mark.parametrize("what", ["host", "own"])
@pytest.mark.parametrize("step", ["ensure", "limit", "remove"])
def test_what_root_alone_may_do_is_one_line(host: Host, rack: HostNetwork, what: str, step: str) -> None:
    """As a user would get it: root without the rights to change networks."""
    name = rack.rack
    where: place.Place = rack
    enter = ["nsenter", f"--net={namespace.NAMED / namespace.name_of(host.name)}"]
    if what == "own":
        where = place.OwnNamespace(name)
        enter = []
    if step != "ensure":
        host(ensure_network, where)
        network = host.name if what == "host" else name
        Host(network).ip("link", "add", where.tap(FABRIC, 0), "type", "veth")
    drop = ["setpriv", "--bounding-set", "-net_admin,-sys_admin", "--"]
    done = subprocess.run([*enter, *drop, sys.executable, "-c", UNPRIVILEGED, what, name, step, rack.run],
                          cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)  # fmt: skip
    message, hint = done.stdout.strip().split("|")
    assert message.startswith("cannot ")
    assert message.endswith("Operation not permitted")
    assert "root" in hint
