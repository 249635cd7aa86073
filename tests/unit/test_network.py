"""A rack's namespace, bridges and link shaping, in real namespaces."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from ipaddress import IPv4Network
from typing import Any

import pytest

from orchestrator.errors import RacklessError
from orchestrator.network import namespace, place, shaping
from orchestrator.network.place import OwnNamespace
from tests.unit.netns_racks import ensure_network, needs_root, scratch_rack

pytestmark = [pytest.mark.netns, needs_root]

HOST = "10.78.0.254"


@pytest.fixture
def rack() -> Iterator[str]:
    """The name of a rack that has no namespace yet."""
    with scratch_rack() as paths:
        yield paths.name


def ip(rack: str, *arguments: str) -> Any:
    command = ["ip", "-json", "-details", "-n", namespace.name_of(rack), *arguments]
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout or "[]")


def tc(rack: str, tap: str) -> list[dict[str, Any]]:
    command = ["tc", "-json", "-n", namespace.name_of(rack), "qdisc", "show", "dev", tap]
    found: list[dict[str, Any]] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return found


def links(rack: str) -> dict[str, dict[str, Any]]:
    return {link["ifname"]: link for link in ip(rack, "link")}


def addresses(rack: str) -> list[tuple[str, int]]:
    (found,) = ip(rack, "-4", "addr", "show", "dev", place.MANAGEMENT)
    return [(a["local"], a["prefixlen"]) for a in found["addr_info"]]


def test_two_bridges_in_a_namespace_of_their_own(rack: str) -> None:
    assert not namespace.exists(rack)
    ensure_network(rack)
    assert namespace.exists(rack)
    assert links(rack).keys() == {"lo", "mgmt", "fabric"}
    found = links(rack)
    assert {name: found[name]["mtu"] for name in ("mgmt", "fabric")} == {"mgmt": 1500, "fabric": 9000}
    for name in ("mgmt", "fabric"):
        assert "UP" in found[name]["flags"]
        assert found[name]["linkinfo"]["info_data"]["stp_state"] == 0
    assert "UP" in found["lo"]["flags"]
    assert addresses(rack) == [(HOST, 24)]
    assert ip(rack, "-4", "addr", "show", "dev", place.FABRIC) == []  # the host has no business on the fabric


def test_the_host_does_not_see_it(rack: str) -> None:
    before = set(os.listdir("/sys/class/net"))
    ensure_network(rack)
    assert set(os.listdir("/sys/class/net")) == before


def test_a_second_time_changes_nothing(rack: str) -> None:
    ensure_network(rack)
    before = links(rack)
    ensure_network(rack)
    after = links(rack)
    assert {name: link["ifindex"] for name, link in after.items()} == {n: link["ifindex"] for n, link in before.items()}
    assert addresses(rack) == [(HOST, 24)]


def test_half_a_network_is_completed(rack: str) -> None:
    ensure_network(rack)
    ip(rack, "link", "del", "fabric")
    ip(rack, "link", "set", "mgmt", "down")
    ensure_network(rack)
    assert links(rack)["fabric"]["mtu"] == 9000
    assert "UP" in links(rack)["mgmt"]["flags"]


def test_a_name_whose_namespace_was_never_mounted_is_repaired(rack: str) -> None:
    """What an `up` leaves that is killed between the two."""
    namespace.NAMED.mkdir(exist_ok=True)
    (namespace.NAMED / namespace.name_of(rack)).touch()
    assert not namespace.exists(rack)
    ensure_network(rack)
    assert addresses(rack) == [(HOST, 24)]
    OwnNamespace(rack).remove()
    (namespace.NAMED / namespace.name_of(rack)).touch()
    OwnNamespace(rack).remove()
    assert not (namespace.NAMED / namespace.name_of(rack)).exists()


def test_the_mtu_of_the_fabric_can_change_and_stays(rack: str) -> None:
    ensure_network(rack)
    ensure_network(rack, mtu=4000)
    assert links(rack)["fabric"]["mtu"] == 4000
    ip(rack, "link", "add", "fabric0", "type", "veth", "peer", "name", "blade")
    ip(rack, "link", "set", "fabric0", "mtu", "1400", "master", "fabric")
    assert links(rack)["fabric"]["mtu"] == 4000


@pytest.mark.parametrize("subnet", ["10.79.0.0/24", "10.78.0.0/16", "10.78.0.128/25", "10.78.0.0/25", "192.168.7.0/28"])
def test_the_address_can_change(rack: str, subnet: str) -> None:
    ensure_network(rack)
    wanted = IPv4Network(subnet)
    for _ in range(2):
        ensure_network(rack, wanted)
        assert addresses(rack) == [(str(wanted[-2]), wanted.prefixlen)]


def test_removing_removes_all_and_can_be_repeated(rack: str) -> None:
    ensure_network(rack)
    OwnNamespace(rack).remove()
    assert not namespace.exists(rack)
    assert not (namespace.NAMED / namespace.name_of(rack)).exists()
    OwnNamespace(rack).remove()


def test_racks_with_the_same_subnet_do_not_meet(rack: str) -> None:
    with scratch_rack() as other:
        for name in (rack, other.name):
            ensure_network(name)
        with namespace.inside(rack, lambda: socket.create_server((HOST, 7070))):
            namespace.connect(rack, HOST, 7070, 2).close()
            with pytest.raises(ConnectionRefusedError):
                namespace.connect(other.name, HOST, 7070, 2)


def test_a_connection_into_the_rack_works_from_outside(rack: str) -> None:
    before = os.readlink("/proc/thread-self/ns/net")
    ensure_network(rack)
    server = namespace.inside(rack, lambda: socket.create_server((HOST, 7070)))
    with server, namespace.connect(rack, HOST, 7070, 2) as client, server.accept()[0] as accepted:
        client.sendall(b"hello")
        assert accepted.recv(10) == b"hello"
    assert os.readlink("/proc/thread-self/ns/net") == before  # this thread itself is where it was


def test_a_refused_connection_is_an_os_error_at_once(rack: str) -> None:
    ensure_network(rack)
    started = time.monotonic()
    with pytest.raises(ConnectionRefusedError):
        namespace.connect(rack, HOST, 7071, 5)
    assert time.monotonic() - started < 2


def test_nobody_there_is_a_timeout(rack: str) -> None:
    ensure_network(rack)
    with pytest.raises(OSError):
        namespace.connect(rack, "10.78.0.77", 7070, 0.2)


def test_a_rack_without_a_network_says_so(rack: str) -> None:
    with pytest.raises(RacklessError, match=f"rack {rack} has no network") as caught:
        namespace.connect(rack, HOST, 7070, 1)
    assert caught.value.hint == "run `rackless up`"
    assert not namespace.exists(rack)


def test_what_an_action_raises_comes_back(rack: str) -> None:
    ensure_network(rack)

    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        namespace.inside(rack, fail)


@pytest.fixture
def tap(rack: str) -> str:
    """A rack with one tap: a device of a pair, whose other end is called blade."""
    ensure_network(rack)
    ip(rack, "link", "add", "fabric0", "mtu", "9000", "type", "veth", "peer", "name", "blade", "mtu", "9000")
    ip(rack, "link", "set", "fabric0", "master", "fabric", "up")
    ip(rack, "link", "set", "blade", "up")
    return "fabric0"


@pytest.mark.parametrize("bandwidth", [64_000, 1_000_000, 1_000_000_000, 40_000_000_000, 400_000_000_000])
def test_a_limit_is_what_the_kernel_has(rack: str, tap: str, bandwidth: int) -> None:
    shaping.limit(OwnNamespace(rack), 0, bandwidth)
    (qdisc,) = tc(rack, tap)
    assert qdisc["kind"] == "tbf"
    assert qdisc["root"] is True
    assert qdisc["options"]["rate"] == min(bandwidth // 8, 2**32 - 1)  # no software link gets near 34 Gbit/s
    assert qdisc["options"]["burst"] >= 2 * 9000
    assert qdisc["options"]["burst"] == pytest.approx(max(qdisc["options"]["rate"] / 100, 18036), rel=0.01)


def test_a_limit_can_be_changed_and_lifted(rack: str, tap: str) -> None:
    for _ in range(2):
        shaping.limit(OwnNamespace(rack), 0, 1_000_000)
        shaping.limit(OwnNamespace(rack), 0, 2_000_000)
        assert [q["options"]["rate"] for q in tc(rack, tap)] == [250_000]
        shaping.limit(OwnNamespace(rack), 0, None)
        shaping.limit(OwnNamespace(rack), 0, None)
        assert "tbf" not in [q["kind"] for q in tc(rack, tap)]


def test_a_blade_that_died_is_no_error(rack: str, tap: str) -> None:
    shaping.limit(OwnNamespace(rack), 9, 1_000_000)
    OwnNamespace(rack).remove()
    shaping.limit(OwnNamespace(rack), 0, 1_000_000)
    assert not namespace.exists(rack)  # and no namespace was made for it


@pytest.mark.skipif(shutil.which("ip") is None, reason="needs iproute2")
def test_a_limit_limits(rack: str, tap: str) -> None:
    """8 Mbit/s: what does not fit the bucket, two frames large, takes 0.6 s, and nothing is lost."""
    with scratch_rack() as other:
        ensure_network(other.name)
        ip(rack, "link", "set", "blade", "netns", namespace.name_of(other.name))
        ip(other.name, "addr", "add", "10.90.0.2/24", "dev", "blade")
        ip(other.name, "link", "set", "blade", "up")
        ip(rack, "addr", "add", "10.90.0.1/24", "dev", "fabric")
        shaping.limit(OwnNamespace(rack), 0, 8_000_000)
        server = namespace.inside(other.name, lambda: socket.create_server(("10.90.0.2", 5000)))
        with server, namespace.connect(rack, "10.90.0.2", 5000, 5) as client, server.accept()[0] as blade:
            size = 640 << 10
            sender = threading.Thread(target=client.sendall, args=(b"x" * size,))
            started = time.monotonic()
            sender.start()
            received = 0
            while received < size:
                received += len(blade.recv(1 << 16))
            took = time.monotonic() - started
            sender.join()
        assert 0.5 < took < 3
