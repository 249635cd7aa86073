"""A blade's first minutes: identity from the host over a port, kept for a restart, served by its agent."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, replace
from ipaddress import IPv4Network
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from guest_agents import control, fabric, identity, provision
from guest_agents.identity import Identity
from guest_agents.lite import tier
from tests.unit.lite_blades import Fabric, StandInCore


def message(**changes: Any) -> dict[str, Any]:
    """An identify request as orchestrator/blade.py sends it."""
    nic = {"mac": "02:00:00:00:00:01", "address": "127.0.0.1", "prefix": 24, "mtu": 1500}
    return {
        "op": "identify", "rack": "t1", "name": "mb0", "kind": "memory", "machine_id": "f" * 32,
        "secret": "5e" * 32, "manager": "127.0.0.1", "management": nic, "fabric": nic,
        "link": {"latency": 0, "jitter": 0, "loss": 0, "bandwidth": None}, "authorized_key": "ssh-ed25519 AAAA",
        "host_key": "KEY\n", "hosts": {"mb0": "127.0.0.1"}, "excache": None, "disk": False,
        "index": 3, "heartbeat": 1.0, "dead_after": 10.0, "entropy": "00" * 64, "epoch_ns": 1,
    } | changes  # fmt: skip


# identity


def test_an_identity_has_what_the_host_said() -> None:
    places = {"size": 1 << 24, "vol": 1 << 32, "media": 1 << 33}
    mine = Identity.of(message(excache=1 << 20, disk=True, pmem=places))
    assert (mine.name, mine.kind, mine.excache, mine.disk, mine.pmem) == ("mb0", "memory", 1 << 20, True, places)


@pytest.mark.parametrize("name", [f.name for f in fields(Identity) if f.default is f.default_factory is MISSING])
def test_a_missing_field_is_named(name: str) -> None:
    request = message()
    del request[name]
    with pytest.raises(KeyError, match=name):
        Identity.of(request)


def test_what_has_a_default_may_be_missing() -> None:
    """So that an agent pushed into a running blade can read what the one before it kept."""
    request = message()
    del request["disk"], request["excache"]
    assert Identity.of(request) == Identity.of(message())


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "run/identity.json"
    monkeypatch.setattr(identity, "FILE", file)
    return file


def test_a_fresh_blade_has_none(kept: Path) -> None:
    assert identity.load() is None


def test_an_identity_is_kept_for_root_alone(kept: Path) -> None:
    mine = Identity.of(message())
    identity.save(mine)
    assert identity.load() == mine
    assert kept.stat().st_mode & 0o777 == 0o600
    identity.save(mine)
    assert [file.name for file in kept.parent.iterdir()] == ["identity.json"]


def test_an_agent_killed_while_it_saves_finds_the_old_identity(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Identity.of(message())
    identity.save(mine)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("json.dump", killed)
    with pytest.raises(KeyboardInterrupt):
        identity.save(Identity.of(message(name="mb1")))
    assert identity.load() == mine


# the port


class Host:
    """The host's side of a blade's port: a pseudo terminal in raw mode."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._buffer = b""

    def write(self, data: bytes) -> None:
        os.write(self._fd, data)

    def ask(self, request: object) -> dict[str, Any]:
        self.write(json.dumps(request).encode() + b"\n")
        return self.read()

    def read(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            self._buffer += os.read(self._fd, 65536)
        line, _, self._buffer = self._buffer.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply


@dataclass
class Blade:
    """What a served blade was told."""

    host: Host
    told: list[dict[str, Any]]

    def identify(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["name"] == "bad":
            raise control.ControlError("no network card", "plug one in")
        self.told.append(request)
        return {"joined": True}


Start = Callable[..., Blade]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts a blade's side in a thread, on a port of its own."""
    opened: list[int] = []
    threads: list[threading.Thread] = []
    ended = threading.Event()

    def sleep(seconds: float) -> None:
        if ended.wait(seconds):
            raise EOFError

    monkeypatch.setattr(provision, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))

    def begin(identified: bool = False) -> Blade:
        host, port = os.openpty()
        tty.setraw(port)
        opened.extend((host, port))
        monkeypatch.setattr(provision, "_device", lambda: Path(os.ttyname(port)))
        blade = Blade(Host(host), [])

        def serve() -> None:
            with suppress(EOFError, OSError):  # the test is over, the terminal is gone
                provision.serve(blade.identify, identified)

        threads.append(threading.Thread(target=serve, daemon=True))
        threads[-1].start()
        return blade

    yield begin
    ended.set()
    for fd in opened:
        os.close(fd)
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_hello_before_and_after_identify(start: Start) -> None:
    blade = start()
    hello = blade.host.ask({"op": "hello", "id": "1"})
    assert hello.pop("uptime") > 0
    assert hello == {"ok": True, "id": "1", "version": "unbuilt", "identified": False}
    assert blade.host.ask({**message(), "id": "2"}) == {"ok": True, "id": "2", "joined": True}
    assert blade.told[0]["rack"] == "t1"
    assert blade.host.ask({"op": "hello", "id": "3"})["identified"] is True


def test_a_restarted_agent_knows_that_it_is_identified(start: Start) -> None:
    assert start(identified=True).host.ask({"op": "hello"})["identified"] is True


def test_a_refusal_leaves_the_blade_fresh(start: Start) -> None:
    blade = start()
    refused = blade.host.ask({**message(name="bad"), "id": "1"})
    assert refused == {"ok": False, "id": "1", "error": "no network card", "hint": "plug one in"}
    assert blade.host.ask({"op": "hello"})["identified"] is False


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ({"op": "reboot"}, "unknown operation 'reboot'"),
        ({}, "unknown operation None"),
        ({"op": "identify"}, "identify: field 'name' is missing"),
    ],
)
def test_a_bad_request_is_refused(start: Start, request_: dict[str, Any], error: str) -> None:
    reply = start().host.ask(request_)
    assert (reply["ok"], reply["error"]) == (False, error)


@pytest.mark.parametrize("noise", [b"\n", b'"name": "mb0"}\n', b"\xff\xfe\n", b"null\n", b"[]\n", b"7\n"])
def test_what_is_no_request_is_skipped(start: Start, noise: bytes) -> None:
    blade = start()
    blade.host.write(noise)
    assert blade.host.ask({"op": "hello", "id": "after"})["id"] == "after"


def test_requests_in_pieces_and_together(start: Start) -> None:
    blade = start()
    for byte in b'{"op": "hello", "id": "pieces"}\n':
        blade.host.write(bytes([byte]))
    assert blade.host.read()["id"] == "pieces"
    blade.host.write(b'{"op": "hello", "id": "a"}\n{"op": "hello", "id": "b"}\n')
    assert [blade.host.read()["id"] for _ in range(2)] == ["a", "b"]


def test_half_a_line_of_a_host_that_went_away_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A virtio port reads nothing while no host has it open; here it does so for three looks."""
    chunks = [b'{"op": "hel', b"", b"", b"", b'{"op": "hello"}\n']
    monkeypatch.setattr(provision, "os", SimpleNamespace(read=lambda _port, _size: chunks.pop(0)))
    pauses: list[float] = []
    monkeypatch.setattr(provision, "time", SimpleNamespace(sleep=pauses.append))
    lines = provision._lines(0, lambda: 0.05)
    assert next(lines) == b'{"op": "hello"}'
    assert pauses == [0.05] * 3


# the agent


@pytest.fixture
def agent_module(monkeypatch: pytest.MonkeyPatch, kept: Path) -> Iterator[ModuleType]:
    """guest_agents.agent with stand-ins for what needs a blade: RDMA, network cards, tc."""
    node = ModuleType("guest_agents.verbs.node")
    made = SimpleNamespace(handlers=lambda: {}, bury=lambda _dead: None)
    vars(node).update(Node=object, open_node=lambda _device: made,
                      ping_handler=lambda _node, _secret: lambda _request: {})  # fmt: skip
    monkeypatch.setitem(sys.modules, "guest_agents.verbs.node", node)
    for name in ("guest_agents.config", "guest_agents.agent"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as free:
        monkeypatch.setattr(control, "PORT", free.getsockname()[1])
    shaped: list[dict[str, Any]] = []
    monkeypatch.setattr(fabric, "configure", lambda *_: None)
    monkeypatch.setattr(fabric, "shape", shaped.append)
    monkeypatch.setattr(fabric, "rdma_state", lambda: "ACTIVE")
    for name in ("reseed", "set_clock", "write_files"):
        monkeypatch.setattr(identity, name, lambda _: None)
    import guest_agents.agent as module

    monkeypatch.setattr(module, "Core", lambda: StandInCore(Fabric()))
    monkeypatch.setattr(tier, "SOCKET", kept.parent / "lite.sock")
    vars(module)["shaped"] = shaped
    yield module
    sys.modules.pop("guest_agents.agent", None)
    sys.modules.pop("guest_agents.config", None)


def test_a_manager_takes_its_identity_joins_itself_and_serves(agent_module: ModuleType, kept: Path) -> None:
    before = time.monotonic()
    health = agent_module.take_identity(message(name="gm0", kind="manager"))
    assert time.monotonic() - before < 10
    assert health.pop("uptime_seconds") >= 0
    assert health == {
        "name": "gm0", "kind": "manager", "version": "unbuilt", "joined": True, "node_id": 4,
        "rdma": "ACTIVE", "monitors": [],
    }  # fmt: skip
    known = identity.load()
    assert known is not None
    assert known.name == "gm0"

    secret = bytes.fromhex(message()["secret"])
    with control.ControlClient(("127.0.0.1", control.PORT), secret) as host:
        assert host.call("agent.status")["joined"] is True
        assert [m["name"] for m in host.call("member.list")["members"]] == ["gm0"]
        host.call("agent.update", link={"latency": 0.001}, excache=1 << 20, heartbeat=2.0, dead_after=20.0)
        assert host.call("lite.stat")["lmrs"] == 0
        with pytest.raises(control.ControlError, match="field 'link' is missing"):
            host.call("agent.update")
    assert agent_module.shaped == [message()["link"], {"latency": 0.001}]
    updated = identity.load()
    assert updated is not None
    assert (updated.link, updated.excache) == ({"latency": 0.001}, 1 << 20)
    assert (updated.heartbeat, updated.dead_after) == (2.0, 20.0)
    with pytest.raises(control.ControlError, match="another secret"):
        control.call(("127.0.0.1", control.PORT), b"wrong", "agent.status")


def test_a_blade_that_stood_still_gets_the_time_and_other_random_numbers(
    agent_module: ModuleType, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent_module.take_identity(message(name="gm0", kind="manager"))
    told: list[object] = []
    monkeypatch.setattr(identity, "reseed", told.append)
    monkeypatch.setattr(identity, "set_clock", told.append)
    secret = bytes.fromhex(message()["secret"])
    with control.ControlClient(("127.0.0.1", control.PORT), secret) as host:
        host.call("agent.wake", entropy="00ff", epoch_ns=10**18)
        agent = agent_module._running[-1]
        agent.identity = replace(agent.identity, clock=-2.0)  # a fault: it stays
        host.call("agent.wake", entropy="ff", epoch_ns=10**18)
    assert told == [b"\x00\xff", 10**18, b"\xff", 10**18 - 2 * 10**9]


def test_every_kind_of_blade_has_monitors(agent_module: ModuleType) -> None:
    from typing import get_args

    from orchestrator.fields import Kind

    assert set(agent_module.MONITORS) == set(get_args(Kind))


def test_vnodes_get_addresses_that_nobody_has(agent_module: ModuleType) -> None:
    from orchestrator.spec import blade_address, host_address

    subnet = IPv4Network("10.78.0.0/27")
    nic = {"mac": "m", "address": str(blade_address(subnet, 0)), "prefix": 27, "mtu": 1500}
    hosts = {"gm0": nic["address"], "odd": "10.78.0.27"}
    agent = agent_module.Agent(identity.Identity.of(message(management=nic, hosts=hosts)))
    given = list(agent.vnode_addresses())
    assert given[:3] == ["10.78.0.29", "10.78.0.28", "10.78.0.26"]
    assert str(host_address(subnet)) not in given
    assert not set(given) & {str(blade_address(subnet, index)) for index in range(5)}
