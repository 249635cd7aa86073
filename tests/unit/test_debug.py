"""Captures that Wireshark reads, archives without secrets, and gdb's beginning and end on a stand-in of libvirt."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import libvirt
import libvirt_qemu
import pytest

from orchestrator import capture, doctor, gdbstub, support
from orchestrator.errors import RacklessError
from orchestrator.hypervisor import daemon, domain
from orchestrator.hypervisor.domain import Owned
from orchestrator.network import namespace
from orchestrator.settings import RackPaths, Settings
from orchestrator.ssh import keys
from tests.unit.netns_racks import ensure_network, needs_root, scratch_rack
from tests.unit.stand_in import blade_specs

ROOT = Path(__file__).parents[2]


def roce(payload: bytes, sequence: int) -> bytes:
    """A RoCEv2 frame: Ethernet, IPv4, UDP to port 4791, base header of a reliable SEND ONLY, a CRC that is wrong."""
    bth = struct.pack(">BBHII", 0x04, 0x40, 0xFFFF, 17, 1 << 31 | sequence)
    udp = struct.pack(">HHHH", 49152, 4791, 8 + len(bth) + len(payload) + 4, 0) + bth + payload + bytes(4)
    words = [0x4500, 20 + len(udp), 1, 0x4000, 64 << 8 | 17, 0, 0x0A4D, 0x000A, 0x0A4D, 0x000B]
    sums = sum(words) % 0xFFFF  # a bridge with filters drops what has a wrong sum
    words[5] = 0xFFFF - sums
    return b"\x02\0\0\0\0\x0b\x02\0\0\0\0\x0a\x08\0" + struct.pack(">10H", *words) + udp


def packets(data: bytes) -> list[tuple[int, bytes]]:
    """Nanoseconds and contents of what is in a pcap file."""
    assert struct.unpack_from("<IHHiIII", data) == (0xA1B23C4D, 2, 4, 0, 0, 65536, 1)
    found, at = [], 24
    while at < len(data):
        seconds, nanoseconds, length, whole = struct.unpack_from("<IIII", data, at)
        assert length == whole
        found.append((seconds * 10**9 + nanoseconds, data[at + 16 : at + 16 + length]))
        at += 16 + length
    return found


def test_a_file_is_what_wireshark_reads_as_rocev2(tmp_path: Path) -> None:
    stamp = 1_763_866_512_123_456_789
    records = [capture.Packet(stamp + number, roce(b"x" * 64, number)).record() for number in range(3)]
    file = tmp_path / "some.pcap"
    file.write_bytes(capture.header() + b"".join(records))
    assert [when for when, _ in packets(file.read_bytes())] == [stamp, stamp + 1, stamp + 2]
    if shutil.which("tshark") is None:
        pytest.skip("no tshark here")
    fields = ["-T", "fields", "-e", "frame.time_epoch", "-e", "infiniband.bth.opcode", "-e", "infiniband.bth.psn"]
    shown = subprocess.run(["tshark", "-r", file, *fields], capture_output=True, text=True, check=True).stdout
    lines = [line.split("\t") for line in shown.splitlines()]
    assert [line[1:] for line in lines] == [["4", "0"], ["4", "1"], ["4", "2"]]
    assert lines[0][0] == "1763866512.123456789"


@pytest.mark.long
@pytest.mark.netns
@needs_root
def test_packets_of_taps_are_captured_once_or_both_ways() -> None:
    with scratch_rack() as paths:
        ensure_network(paths.name)
        entry = ["ip", "-n", namespace.name_of(paths.name)]
        for index in (0, 1):  # a veth stands in for a tap: what its other end sends is what a blade does
            far = f"far{index}"
            for words in (f"add fabric{index} mtu 9000 type veth peer name {far} mtu 9000",
                          f"set fabric{index} master fabric up", f"set {far} up"):  # fmt: skip
                subprocess.run([*entry, "link", *words.split()], check=True)
        specs = blade_specs(paths.name, ("gm0", "mb0"))
        frames = [roce(b"x" * 4096, number) for number in range(50)]

        def send() -> None:
            with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as one:
                one.bind(("far0", 0))
                for frame in frames:
                    one.send(frame)

        def taken(only: str | None) -> list[bytes]:
            file = io.BytesIO()
            sender = threading.Timer(0.3, lambda: namespace.inside(paths.name, send))
            sender.start()
            done = capture.capture(paths, specs, only, file, 20.0,
                                   lambda: file.getvalue().count(b"x" * 4096) >= len(frames))  # fmt: skip
            sender.join()
            ours = [data for _, data in packets(file.getvalue()) if data[:12] == frames[0][:12]]
            assert done.dropped == 0
            assert done.packets >= len(ours)
            return ours

        assert taken(None) == frames, "each once, though it passes two taps"
        assert taken("mb0") == frames, "what it gets"
        assert taken("gm0") == frames, "what it sends"


def test_a_tap_that_is_not_there_is_one_line() -> None:
    if os.geteuid():
        pytest.skip("needs root, for packet sockets")
    with scratch_rack() as paths:
        ensure_network(paths.name)
        with pytest.raises(RacklessError, match="cannot capture packets: No such device"):
            capture.capture(paths, blade_specs(paths.name, ("gm0",)), None, io.BytesIO(), 1.0)


@pytest.fixture
def paths(tmp_path: Path) -> RackPaths:
    return RackPaths(Settings(tmp_path / "cache", tmp_path / "state", tmp_path / "run"), "demo")


def contents(archive: Path) -> dict[str, bytes]:
    with tarfile.open(archive) as opened:
        return {member.name: opened.extractfile(member).read()  # type: ignore[union-attr]
                for member in opened.getmembers() if member.isfile()}  # fmt: skip


def test_an_archive_has_what_is_known_and_no_secret(
    paths: RackPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "checks", lambda _settings: iter(()))
    secret = keys.ensure_secret(paths)
    public = keys.ensure_rack_keys(paths).public_key_line
    host_key, _ = keys.ensure_host_key(paths, "mb0")
    (paths.blade("mb0").root).mkdir(parents=True)
    paths.blade("mb0").disk.write_bytes(b"what a user keeps")
    said = [b"booting", secret.hex().encode(), secret, host_key.encode(), keys.user_key(paths).read_bytes()]
    one_line = host_key.splitlines()[2]  # as when a log cuts a key to pieces
    paths.blade("mb0").console.write_bytes(b"\n".join([*said, one_line.encode(), b"the end"]))
    paths.events.write_text(json.dumps({"time": 5, "event": "note", "message": f"secret {secret.hex()}"}) + "\n")
    monkeypatch.setenv("RACKLESS_ACCEL", "tcg")
    rack_file = tmp_path / "demo.yml"
    rack_file.write_text("name: demo  # a comment\n")
    target = tmp_path / "out.tar.gz"
    elsewhere = tmp_path / "elsewhere"
    for planted in (target, target.with_name(".out.tar.gz.new")):
        planted.symlink_to(elsewhere)
    names = support.bundle(paths.settings, "demo", rack_file, target)
    found = contents(target)
    assert {f"rackless-demo/{name}" for name in names} == set(found)
    assert {"versions.json", "doctor.json", "status.json", "events.jsonl", "rack.yml", "consoles/mb0.log",
            "collected.error", "host.txt", "environment.json"} <= set(names)  # fmt: skip
    console = found["rackless-demo/consoles/mb0.log"]
    assert console.startswith(b"booting\n[removed]\n")
    assert console.endswith(b"the end")
    assert b"is not up" in found["rackless-demo/collected.error"]
    assert json.loads(found["rackless-demo/environment.json"])["RACKLESS_ACCEL"] == "tcg"
    everything = b"\n".join(found.values())
    for private in (secret, secret.hex().encode(), one_line.encode(), b"PRIVATE KEY", b"what a user keeps"):
        assert private not in everything
    assert not any("ssh" in name or name.endswith(("secret", ".raw")) for name in names)
    assert public  # public keys may be told
    assert (target.is_symlink(), target.stat().st_mode & 0o777, elsewhere.exists()) == (False, 0o600, False)
    assert [file.name for file in tmp_path.glob(".out*")] == [".out.tar.gz.new"]


def test_an_archive_of_nothing_is_refused(paths: RackPaths, tmp_path: Path) -> None:
    with pytest.raises(RacklessError, match="there is no rack demo"):
        support.bundle(paths.settings, "demo", None, tmp_path / "out.tar.gz")


@pytest.fixture
def blade(paths: RackPaths, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A running domain that notes what its monitor is told; `answer` makes the socket, as QEMU does."""
    (paths.settings.run_dir / "demo").mkdir(parents=True)
    made = SimpleNamespace(told=[], now=libvirt.VIR_DOMAIN_RUNNING, resumed=0, refuse=False)
    made.state = lambda: (made.now, 0)

    def resume() -> None:
        made.resumed += 1

    def monitor(_domain: object, command: str, _flags: int) -> str:
        made.told.append(command)
        if "unix:" in command and not made.refuse:
            Path(command.split("unix:")[1].split(",")[0]).touch()
        return "no such device\r\n" if made.refuse else ""

    made.resume = resume

    @contextmanager
    def connection(_paths: RackPaths, **_how: bool) -> Iterator[object]:
        yield object()

    monkeypatch.setattr(libvirt_qemu, "qemuMonitorCommand", monitor)
    monkeypatch.setattr(daemon, "connection", connection)
    monkeypatch.setattr(domain, "owned", lambda _conn, _rack: {"mb0": Owned(made, "running", {}),
                                                               "mb1": Owned(made, "off", {})})  # fmt: skip
    return made


def test_gdbserver_is_off_afterwards_and_the_blade_runs(paths: RackPaths, blade: Any) -> None:
    def interrupted() -> None:
        with gdbstub.gdbserver(paths, "mb0") as where:
            assert where.stat().st_mode & 0o777 == 0o600
            blade.now = libvirt.VIR_DOMAIN_PAUSED  # as long as gdb is attached
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert blade.told == [f"gdbserver unix:{paths.settings.run_dir}/demo/mb0.gdb,server=on,wait=off", "gdbserver none"]
    assert blade.resumed == 1
    assert list((paths.settings.run_dir / "demo").iterdir()) == []


@pytest.mark.parametrize("prepare", [lambda blade: setattr(blade, "refuse", True), None])
def test_gdbserver_that_cannot_be(paths: RackPaths, blade: Any, prepare: Callable[[Any], None] | None) -> None:
    if prepare:
        prepare(blade)
    name, said = ("mb0", "no gdbserver: no such device") if prepare else ("mb1", "mb1 does not run")
    with pytest.raises(RacklessError, match=said), gdbstub.gdbserver(paths, name):
        pytest.fail("it must not begin")


@pytest.mark.long
def test_words_are_checked_before_anything_is_done(tmp_path: Path) -> None:
    environment = {**os.environ, **{f"RACKLESS_{name}": str(tmp_path / name) for name in ("CACHE", "STATE", "RUN")}}
    for words, said in (
        (["gdb", "mb0", "--rack", "nowhere"], "rack nowhere is not up"),
        (["capture", "--rack", "nowhere", "-o", str(tmp_path / "x.pcap")], "rack nowhere is not up"),
        (["support-bundle", "--rack", "nowhere"], "there is no rack nowhere"),
        (["graph", "--rack", "nowhere"], "rack nowhere is not up"),
        (["metrics", "--rack", "nowhere"], "rack nowhere is not up"),
        (["events", "--rack", "nowhere"], "has no events"),
    ):
        done = subprocess.run([sys.executable, "-m", "orchestrator.cli.main", *words], cwd=ROOT, env=environment,
                              capture_output=True, text=True, timeout=60)  # fmt: skip
        assert (done.returncode, done.stdout) == (1, "")
        assert said in done.stderr
        assert "Traceback" not in done.stderr
    assert list(tmp_path.glob("*.pcap")) == []


@pytest.mark.long
def test_a_command_that_is_misspelled_or_asked_about_knows_all_others() -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "orchestrator.cli.main", *words], cwd=ROOT, text=True,
                              capture_output=True, timeout=60)  # fmt: skip

    assert "'status'" in run("statu").stderr.partition("Did you mean")[2]
    listed = run("--help").stdout
    for name in ("up", "blade", "events", "graph", "dashboard", "metrics", "gdb", "capture", "support-bundle"):
        assert f"  {name} " in listed
        assert f" {name} [OPTIONS]" in run(name, "--help").stdout, "only this one is made, and it is"
