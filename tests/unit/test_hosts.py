"""Several hosts without VMs: each host is a namespace, a cable joins them, and `rackless on-host` runs on the other.

A process that listens at a Unix socket stands for the other host's libvirtd: it says where that host's network and
files are. What takes libvirt and blades is in tests/rack/test_hosts.py.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any, TypeVar

import libvirt
import pytest
from pyroute2 import netns

from orchestrator import __version__, engine, leftovers
from orchestrator.deeds import DEEDS
from orchestrator.errors import RacklessError
from orchestrator.events import ignore
from orchestrator.hypervisor import domain, far, hosts
from orchestrator.hypervisor.domain import Owned
from orchestrator.hypervisor.far import Far, Worker
from orchestrator.model import Host, Rack
from orchestrator.network import bridge, namespace, place, sides, vxlan
from orchestrator.network.place import FABRIC, HostNetwork
from orchestrator.plan import make_plan
from orchestrator.settings import RackPaths, Settings
from tests.unit.broken_racks import DOMAIN
from tests.unit.netns_racks import like_qemu, needs_root, scratch_rack
from tests.unit.stand_in import blade_specs

pytestmark = [pytest.mark.netns, needs_root]

T = TypeVar("T")
PROJECT = Path(__file__).parent.parent.parent
ADDRESSES = {"here": "192.168.70.1", "far": "192.168.70.2"}
NOTHING: Any = None
_LISTEN = """
import os, socket, sys
one = socket.socket(socket.AF_UNIX)
one.bind(sys.argv[1])
one.listen()
print("ready", flush=True)
sys.stdin.read()
"""


@dataclass
class Pair:
    """Two hosts. What is done `here` or `there` is done among that host's interfaces."""

    paths: RackPaths
    stack: ExitStack
    folder: Path
    """That both have; the far one has its own files in `folder/own`."""

    def here(self, action: Callable[..., T], *words: Any) -> T:
        return namespace.inside(self.name("here"), lambda: action(*words))

    def there(self, action: Callable[..., T], *words: Any) -> T:
        return namespace.inside(self.name("far"), lambda: action(*words))

    def name(self, host: str) -> str:
        return f"{self.paths.name}-{host}"

    def ip(self, host: str, *words: str) -> Any:
        command = ["ip", "-json", "-n", namespace.name_of(self.name(host)), *words]
        return json.loads(subprocess.run(command, capture_output=True, check=True).stdout or "[]")

    def rack(self, mtu: int = 9000, **other: str) -> Rack:
        about = {"address": ADDRESSES["far"], "uri": f"qemu:///system?socket={self.folder}/socket",
                 "rackless": str(self.folder / "rackless"), **other}  # fmt: skip
        return Rack.model_validate({
            "name": self.paths.name,
            "fabric": {"mtu": mtu},
            "hosts": {"here": {"address": ADDRESSES["here"]}, "far": about},
            "blades": {"gm0": {"kind": "manager", "memory": "256 MiB"}},
        })  # fmt: skip

    def worker(self, rack: Rack | None = None) -> Worker:
        found = Worker(self.paths, "far", (rack or self.rack()).hosts["far"])
        self.stack.enter_context(closing(found))
        return found


@pytest.fixture
def pair() -> Iterator[Pair]:
    with scratch_rack() as paths, ExitStack() as stack:
        folder = paths.settings.run_dir.parent
        made = Pair(paths, stack, folder)
        for host in ADDRESSES:
            netns.create(namespace.name_of(made.name(host)))
            stack.callback(netns.remove, namespace.name_of(made.name(host)))
            made.ip(host, "link", "set", "lo", "up")
        there = namespace.name_of(made.name("far"))
        made.ip("here", *f"link add cable mtu 9050 type veth peer name cable mtu 9050 netns {there}".split())
        for host, address in ADDRESSES.items():
            made.ip(host, "addr", "add", f"{address}/24", "dev", "cable")
            made.ip(host, "link", "set", "cable", "up")
        command = folder / "rackless"
        command.write_text(f"#!/bin/sh\nPYTHONPATH={PROJECT} exec {sys.executable} -m orchestrator.cli.main \"$@\"\n")
        command.chmod(0o755)
        (folder / "own").mkdir()
        script = f'mount -t tmpfs none {folder}/own && exec {sys.executable} -c "$0" {folder}/socket'
        listener = stack.enter_context(subprocess.Popen(
            ["nsenter", f"--net={namespace.NAMED / there}", "unshare", "--mount", "sh", "-c", script, _LISTEN],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE))  # fmt: skip
        stack.callback(listener.terminate)
        assert listener.stdout
        assert listener.stdout.readline() == b"ready\n"
        yield made


def plug(pair: Pair, host: str, name: str, where: str, address: str) -> None:
    """A blade: a namespace with a cable that is plugged into a bridge."""
    own, outer = namespace.name_of(pair.name(name)), namespace.name_of(host)
    netns.create(own)
    pair.stack.callback(netns.remove, own)
    for words in (f"-n {outer} link add {where} mtu 9000 type veth peer name eth0 mtu 9000 netns {own}",
                  f"-n {own} addr add {address}/24 dev eth0", f"-n {own} link set eth0 up"):  # fmt: skip
        subprocess.run(["ip", *words.split()], check=True)


def hears(pair: Pair, one: str, other: str, address: str, size: int = 8000, seconds: float = 10) -> bool:
    """Does a packet of one blade reach another, whole? A port that was just made may be dead for the first second."""

    def open_port() -> socket.socket:
        port = socket.socket(type=socket.SOCK_DGRAM)
        port.bind((address, 9))
        port.settimeout(seconds)
        return port

    def send() -> None:
        with socket.socket(type=socket.SOCK_DGRAM) as port:
            port.setsockopt(socket.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER, IP_PMTUDISC_DO: never in pieces
            port.sendto(bytes(size), (address, 9))

    with namespace.inside(pair.name(other), open_port) as port:
        namespace.inside(pair.name(one), send)
        try:
            return len(port.recv(1 << 16)) == size
        except TimeoutError:
            return False


@pytest.mark.long
def test_a_fabric_on_two_hosts_is_one_and_can_be_parted(pair: Pair) -> None:
    ends = hosts.tunnels(pair.rack())
    home = place.OwnNamespace(pair.paths.name)
    away = HostNetwork(pair.paths.name, pair.paths.settings.run_dir)
    management, fabric = IPv4Network("10.78.0.0/24"), IPv4Network("10.77.0.0/24")
    for _ in range(2):  # and again changes nothing
        pair.here(bridge.ensure, home, management, fabric, 9000, ends["here"])
        pair.there(bridge.extend, away, 9000, ends["far"])
    assert pair.here(vxlan.of, home) == ends["here"]
    assert pair.there(vxlan.of, away) == ends["far"]
    assert [link["ifname"] for link in pair.ip("here", "link", "show", "type", "vxlan")] == []
    for place_, name, index in ((home, "b0", 0), (away, "b1", 1), (away, "b2", 2)):
        host = pair.paths.name if place_ is home else pair.name("far")
        tap = place_.tap(FABRIC, index)
        plug(pair, host, name, tap, f"10.77.0.{10 + index}")
        words = ["ip", "-n", namespace.name_of(host), "link", "set", tap, "master", place_.bridge(FABRIC), "up"]
        subprocess.run(words, check=True)
    assert hears(pair, "b0", "b1", "10.77.0.11")
    assert hears(pair, "b2", "b0", "10.77.0.10")

    def part(wanted: dict[int, int]) -> None:
        pair.here(sides.part, home, wanted)
        pair.there(sides.part, away, wanted)

    part({0: 1, 1: 1, 2: 0})
    assert hears(pair, "b0", "b1", "10.77.0.11"), "one side has blades on both hosts"
    assert not hears(pair, "b0", "b2", "10.77.0.12", seconds=1)
    assert not hears(pair, "b1", "b2", "10.77.0.12", seconds=1)
    part({0: 0, 1: 2})
    assert hears(pair, "b0", "b2", "10.77.0.12")
    assert not hears(pair, "b0", "b1", "10.77.0.11", seconds=1)
    part({1: 0})
    assert hears(pair, "b1", "b0", "10.77.0.10")
    assert not any("~" in link["ifname"] for link in pair.ip("far", "link")), "no side is left, nor its port"
    pair.here(bridge.ensure, home, management, fabric, 9000)
    assert pair.here(vxlan.of, home) is None, "one host is enough again"
    assert not hears(pair, "b0", "b1", "10.77.0.11", seconds=1)
    pair.there(away.remove)
    assert {link["ifname"] for link in pair.ip("far", "link")} == {"lo", "cable", away.tap(FABRIC, 1),
                                                                    away.tap(FABRIC, 2)}  # fmt: skip


@pytest.mark.long
def test_hosts_are_refused_whose_way_is_too_narrow(pair: Pair) -> None:
    def check(rack: Rack) -> None:
        other = Far("far", rack.hosts["far"], None, pair.worker(rack))
        pair.here(hosts._check_ways, pair.paths, rack, {"far": other})

    check(pair.rack())
    pair.ip("far", "link", "set", "cable", "mtu", "4300")
    with pytest.raises(RacklessError, match=r"fabric\.mtu 9000 does not fit between hosts: far reaches") as caught:
        check(pair.rack())
    assert caught.value.hint == "write fabric: {mtu: 4250}, or give cable an MTU of 9050 on all hosts"
    check(pair.rack(mtu=4250))
    pair.ip("far", "link", "set", "cable", "mtu", "1400")
    with pytest.raises(RacklessError, match="whose MTU of 1400 is too small"):
        check(pair.rack(mtu=1500))


def test_hosts_are_refused_that_have_not_their_address_or_no_way(pair: Pair) -> None:
    with pytest.raises(RacklessError, match=r"192\.168\.70\.9 is not its own; it has 192\.168\.70\.2 \(on host far"):
        pair.worker().ask("routes", {"address": "192.168.70.9", "peers": []})
    with pytest.raises(RacklessError, match=r"no way to 10\.1\.1\.1: Network is unreachable"):
        pair.worker().ask("routes", {"address": ADDRESSES["far"], "peers": ["10.1.1.1"]})


def test_deeds_are_done_on_the_other_host_many_at_once(pair: Pair) -> None:
    worker = pair.worker()
    assert worker.ask("hello", {})["rackless"] == __version__
    worker.ask("extend", {"mtu": 9000, "tunnel": asdict(hosts.tunnels(pair.rack())["far"])})
    assert {link["ifname"][:3] for link in pair.ip("far", "link", "show", "type", "bridge")} == {"rlf", "rlm"}
    files = {f"{pair.folder}/socket": 0, str(pair.folder / "rackless"): (pair.folder / "rackless").stat().st_size}
    with ThreadPoolExecutor(8) as pool:
        told = list(pool.map(lambda size: worker.ask("missing", {"files": {**files, "/nowhere": size}}), range(40)))
    assert told == [[f"{pair.folder}/socket", "/nowhere"]] * 40
    with pytest.raises(RacklessError, match=r"KeyError: 'dance' \(on host far\)"):
        worker.ask("dance", {})
    run = pair.paths.settings.run_dir / pair.paths.name
    run.mkdir(parents=True)
    (run / "socket").touch()
    worker.ask("leave", {"end": False})
    assert pair.ip("far", "link", "show", "type", "bridge") == []
    assert (run / "socket").exists(), "this machine has the same folder, and goes on"
    worker.ask("leave", {"end": True})
    assert not run.exists()


def test_what_the_other_host_has_not_is_copied_there_whole(pair: Pair) -> None:
    entry = pair.folder / "own" / "system-1"
    entry.mkdir()
    contents = {"system.sqfs": bytes(range(256)) * 5000, "it's": b"quoted", "empty": b""}
    for name, data in contents.items():
        (entry / name).write_bytes(data)
    other = Far("far", pair.rack().hosts["far"], None, pair.worker())
    files = {str(entry / name): len(data) for name, data in contents.items()}
    assert sorted(other.do("missing", files=files)) == sorted(files)
    other.supply([entry])
    assert other.do("missing", files=files) == []
    words = far.command("far", other.host, ["sha256sum", *files])
    there = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert there == subprocess.run(["sha256sum", *files], capture_output=True, text=True, check=True).stdout
    ls = subprocess.run(far.command("far", other.host, ["ls", str(entry)]), capture_output=True, text=True, check=True)
    assert sorted(ls.stdout.split("\n")[:-1]) == sorted(contents), "no half of a file is left"


def test_blades_files_are_made_and_kept_on_their_host(pair: Pair) -> None:
    rack = Rack.model_validate({**pair.rack().model_dump(mode="json"), "blades": {
        "gm0": {"kind": "manager", "memory": "256 MiB"},
        "mb0": {"kind": "memory", "memory": "256 MiB", "pmem": "16 MiB"}}})  # fmt: skip
    own_folder = pair.folder / "own"
    own = RackPaths(Settings(own_folder / "cache", own_folder / "state", own_folder / "run"), pair.paths.name)
    worker = Worker(own, "far", rack.hosts["far"])
    pair.stack.enter_context(closing(worker))
    spec = make_plan(rack, "image", {}, {"mb0": "far"}).actions[1].spec
    assert spec
    worker.ask("make_files", {"spec": spec.to_json()})
    files = {str(own.blade("mb0").pmem): 16 << 20, str(own.blade("mb0").pmem_vol): 16 << 20}
    assert worker.ask("missing", {"files": files}) == []
    assert DEEDS["missing"](own, files=files) == list(files), "here there is none of them"
    assert worker.ask("pull_power", {"name": "mb0", "survive": 1.0, "seed": 1}) == {"unpersisted": 0, "survived": 0}
    worker.ask("remove_files", {"name": "mb0"})
    assert sorted(worker.ask("missing", {"files": files})) == sorted(files)


def test_a_host_that_is_gone_is_told_with_the_reason(pair: Pair) -> None:
    worker = pair.worker()
    worker.ask("hello", {})
    worker._process.kill()
    worker._process.wait()
    with pytest.raises(RacklessError, match="host far cannot be reached"):
        worker.ask("hello", {})
    silent = pair.rack(rackless="true")
    with pytest.raises(RacklessError, match="host far cannot be reached: it says nothing"):
        pair.worker(silent).ask("hello", {})
    missing = pair.rack(rackless="/no/rackless")
    with pytest.raises(RacklessError, match="cannot be reached: nsenter: failed to execute /no/rackless"):
        pair.worker(missing).ask("hello", {})


def test_another_version_is_refused(pair: Pair) -> None:
    other = pair.folder / "other"
    reply = json.dumps({"id": 0, "result": {"rackless": "0.0.1"}})
    greeting = "echo Welcome; echo 5; echo '[]'; echo '{}'"
    other.write_text(f"#!/bin/sh\n{greeting}\nread rack\nread asked\necho '{reply}'\nread on\n")
    other.chmod(0o755)
    rack = pair.rack(rackless=str(other))
    with (pytest.raises(RacklessError, match=rf"host far has Rackless 0\.0\.1, and this machine {__version__}"),
          far.reached("far", rack.hosts["far"], pair.worker(rack))):  # fmt: skip
        pass


class Answers:
    """A worker on a host that says hello as it is told; ways are as wide as they need to be."""

    def __init__(self, **hello: str) -> None:
        self._hello = {**DEEDS["hello"](NOTHING), **hello}

    def ask(self, deed: str, fields: dict[str, Any]) -> Any:
        if deed == "vacant":
            return None
        return self._hello if deed == "hello" else {peer: {"interface": "x", "mtu": 9050} for peer in fields["peers"]}


def test_a_host_with_another_qemu_is_refused_unless_blades_are_booted(pair: Pair) -> None:
    rack = pair.rack()
    with closing(libvirt.open("test:///default")) as conn:
        same, other = (Far("far", rack.hosts["far"], conn, Answers(**hello))  # type: ignore[arg-type]
                       for hello in ({}, {"emulator": "/usr/bin/qemu-system-x86_64 (QEMU emulator version 1.0)"}))
        pair.here(hosts.check, pair.paths, rack, {"far": same}, False)
        pair.here(hosts.check, pair.paths, rack, {"far": other}, True)
        with pytest.raises(RacklessError, match=r"far has another QEMU: .*version 1\.0\) and not .*saved here cannot"):
            pair.here(hosts.check, pair.paths, rack, {"far": other}, False)


def test_a_rack_of_somebody_else_is_not_taken_over(pair: Pair) -> None:
    rack = pair.rack()
    metadata = json.dumps({"rack": rack.name, "blade": "mb0"})
    with closing(libvirt.open("test:///default")) as conn:
        conn.createXML(DOMAIN.format(name=f"{rack.name}.mb0", namespace=domain.NAMESPACE, metadata=metadata))
        other = Far("far", rack.hosts["far"], conn, Answers())  # type: ignore[arg-type]
        with pytest.raises(RacklessError, match=f"host far has a rack called {rack.name} already, of somebody else"):
            pair.here(hosts.check, pair.paths, rack, {"far": other}, False)
        pair.paths.root.mkdir(parents=True)
        hosts.note(pair.paths, rack.hosts)  # now it is ours
        pair.here(hosts.check, pair.paths, rack, {"far": other}, False)
        room = hosts.rooms(rack, {"far": other})["far"]
        _, mebibytes, cpus, *_ = conn.getInfo()
        assert room.cpus == cpus
        assert (mebibytes << 20) - room.memory > 0, "the test driver has a domain of its own, and ours does not count"
        assert hosts.Hosts(pair.paths, None, {"far": other}).owned()["mb0"].host == "far"


def test_a_renamed_host_is_not_somebody_elses(pair: Pair) -> None:
    rack = pair.rack()
    pair.paths.root.mkdir(parents=True)
    hosts.note(pair.paths, rack.hosts)
    about = rack.hosts["far"]
    renamed = rack.model_copy(update={"hosts": {"here": rack.hosts["here"], "away": about}})
    metadata = json.dumps({"rack": rack.name, "blade": "mb0"})
    with closing(libvirt.open("test:///default")) as conn:
        conn.createXML(DOMAIN.format(name=f"{rack.name}.mb0", namespace=domain.NAMESPACE, metadata=metadata))
        pair.here(hosts.check, pair.paths, renamed, {"away": Far("away", about, conn, Answers())}, False)  # type: ignore[arg-type]


def test_files_here_go_last_when_a_rack_goes(pair: Pair) -> None:
    class Gone:
        def ask(self, _deed: str, _fields: dict[str, Any]) -> Any:
            raise RacklessError("host far cannot be reached")

    rack = pair.rack()
    pair.paths.root.mkdir(parents=True)
    hosts.note(pair.paths, rack.hosts)
    gone = Far("far", rack.hosts["far"], NOTHING, Gone())  # type: ignore[arg-type]
    with pytest.raises(RacklessError, match="cannot be reached"):
        hosts.Hosts(pair.paths, None, {"far": gone}).everywhere("forget")
    assert hosts.noted(pair.paths) == rack.hosts, "or nobody would know where to try again"


def test_a_blades_host_is_called_as_it_is_called_now() -> None:
    spec = blade_specs("t", ("gm0", "mb0"))["mb0"]
    for host in ("away", None):
        assert Owned(NOTHING, "running", {"spec": replace(spec, host="far").to_json()}, host).spec().host == host


def test_hosts_have_what_this_machine_runs_blades_on(pair: Pair) -> None:
    rack = pair.rack()
    with closing(libvirt.open("test:///default")) as conn:
        other = {"far": Far("far", rack.hosts["far"], conn, Answers())}  # type: ignore[arg-type]
        hosts.check_accelerator(pair.paths, other, "tcg", "qemu", False)
        with pytest.raises(RacklessError, match="host far has no KVM, and this machine has"):
            hosts.check_accelerator(pair.paths, other, "kvm", "qemu", False)


@pytest.mark.parametrize(("uri", "reason"), [
    ("qemu:///system?socket=/nowhere/socket", "nobody answers at /nowhere/socket: No such file or directory"),
    (f"qemu+ssh://root@{ADDRESSES['far']}/system", "Connection refused"),
    (f"qemu+ssh://root@{ADDRESSES['far']}/system?command=/no/ssh", "/no/ssh: No such file or directory"),
])  # fmt: skip
def test_a_host_that_cannot_be_reached_is_refused_before_anything_is_touched(
    pair: Pair, uri: str, reason: str
) -> None:
    rack = pair.rack(uri=uri)
    for act in (lambda: engine.up(pair.paths.settings, rack, ignore), lambda: engine.plan(pair.paths.settings, rack)):
        with pytest.raises(RacklessError, match=f"host far cannot be reached: .*{reason}"):
            pair.here(act)
    settings = pair.paths.settings
    assert not any(folder.exists() for folder in (settings.cache_dir, settings.state_dir, settings.run_dir))
    assert not namespace.exists(rack.name)


def test_a_rack_goes_down_without_a_host_that_is_gone(pair: Pair) -> None:
    settings, rack = pair.paths.settings, pair.rack(uri="qemu:///system?socket=/nowhere/socket")
    pair.paths.root.mkdir(parents=True)
    hosts.note(pair.paths, rack.hosts)
    with pytest.raises(RacklessError, match="host far cannot be reached"):
        engine.down(settings, rack.name, ignore)
    for other in ("here", "fra"):
        with pytest.raises(RacklessError, match=f"rack {rack.name} has no other host {other}"):
            engine.down(settings, rack.name, ignore, without=[other])
    assert hosts.noted(pair.paths) == rack.hosts
    assert engine.down(settings, rack.name, ignore, keep_data=True, without=["far"]) == []
    assert hosts.noted(pair.paths) == {"here": rack.hosts["here"]}
    hosts.note(pair.paths, rack.hosts)
    assert engine.down(settings, rack.name, ignore, without=["far"]) == []
    assert not pair.paths.root.exists()


def test_gc_leaves_a_rack_alone_that_may_have_blades_elsewhere(pair: Pair) -> None:
    rack = pair.rack(uri="qemu:///system?socket=/nowhere/socket")
    pair.paths.root.mkdir(parents=True)
    (pair.paths.settings.run_dir / rack.name).mkdir(parents=True)
    assert [item.kind for item in leftovers.find(pair.paths.settings)] == ["folder"]
    words = like_qemu(pair.paths, "mb0", "print('up', flush=True); input()")
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as blade:
        assert blade.stdout
        assert blade.stdout.readline() == b"up\n"
        assert [item.kind for item in leftovers.find(pair.paths.settings)] == ["process", "folder"]
        hosts.note(pair.paths, rack.hosts)
        assert leftovers.find(pair.paths.settings) == []
        blade.terminate()


def test_hosts_are_noted_and_may_be_renamed_but_not_swapped(pair: Pair) -> None:
    paths = pair.paths
    paths.root.mkdir(parents=True)
    rack = pair.rack()
    hosts.note(paths, rack.hosts)
    assert hosts.noted(paths) == rack.hosts
    renamed = rack.model_copy(update={"hosts": {"here": rack.hosts["here"], "away": rack.hosts["far"]}})
    assert hosts.union(paths, renamed) == renamed.hosts
    one = rack.model_copy(update={"hosts": {}})
    assert hosts.union(paths, one) == rack.hosts, "what is left there must go"
    swapped = rack.model_copy(update={"hosts": {**rack.hosts, "far": Host.model_validate(
        {"address": "192.168.70.3", "uri": "qemu+ssh://root@192.168.70.3/system"})}})  # fmt: skip
    with pytest.raises(RacklessError, match="host far of the rack that is up is at qemu:///system"):
        hosts.union(paths, swapped)
    hosts.note(paths, {})
    assert hosts.noted(paths) == {}
    assert list(paths.root.iterdir()) == []
