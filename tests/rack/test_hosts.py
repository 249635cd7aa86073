"""A rack on three hosts: this machine's rack network, and two others that are namespaces of this machine.

"near" has its libvirtd's socket on this machine; "far" is reached by ssh alone, and has disks, sockets and the agents'
image in folders of its own (of the cache it shares the rest, which would take long to copy). A cable joins each to
where `rackless` runs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from pyroute2 import netns

from orchestrator.hypervisor import daemon
from orchestrator.hypervisor.daemon import Daemon
from orchestrator.network import namespace
from orchestrator.settings import RackPaths, Settings
from tests.rack.conftest import PROJECT, Bench, Rack, unique

SSHD = shutil.which("sshd", path="/usr/sbin:/sbin:/usr/bin")

pytestmark = [pytest.mark.rack, pytest.mark.timeout(400), pytest.mark.skipif(SSHD is None, reason="there is no sshd")]

SOURCE = Path(__file__).parent / "native" / "paging_stress.c"
ADDRESSES = {"here": "192.168.70.1", "near": "192.168.70.2", "far": "192.168.70.3"}


@dataclass
class Machines(Bench):
    """Where `rackless` runs, and the other two."""

    name: str = ""
    libvirts: dict[str, Daemon] = field(default_factory=dict)

    def inside(self, host: str, *words: str) -> list[str]:
        return ["nsenter", f"--net={namespace.NAMED / namespace.name_of(f'{self.name}-{host}')}", *words]

    def command(self, *words: str) -> list[str]:
        return self.inside("here", *super().command(*words))

    def ask(self, host: str, *words: str) -> str:
        """What a command among that host's interfaces prints."""
        return subprocess.run(self.inside(host, *words), capture_output=True, text=True, check=True).stdout

    def domains(self, host: str) -> list[str]:
        uri = f"qemu:///system?socket={self.libvirts[host].socket}"
        return sorted(self.ask(host, "virsh", "-c", uri, "list", "--all", "--name").split())

    def mounts(self, host: str) -> list[str]:
        """Words before a command that is to see the host's files, too."""
        pid = daemon.running(self.libvirts[host].pids["libvirtd"])
        return ["nsenter", f"--target={pid}", "--net", "--mount"]

    def hosts(self) -> dict[str, dict[str, str]]:
        uris = {"near": f"qemu:///system?socket={self.libvirts['near'].socket}",
                "far": f"qemu+ssh://root@{ADDRESSES['far']}/system?command={self.folder}/ssh"}  # fmt: skip
        command = str(self.folder / "rackless")
        return {"here": {"address": ADDRESSES["here"]},
                **{host: {"address": ADDRESSES[host], "uri": uri, "rackless": command} for host, uri in uris.items()}}


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    """The hosts, their libvirtds and the one's sshd running. Gone afterwards, whatever happened."""
    name = unique("h")
    made = Machines(tmp_path, Path(f"/run/rackless-{name}"), name=name)
    Bench(tmp_path, made.run).rackless("image", "build")  # here: from a scratch network no mirror can be reached
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, made.run, ignore_errors=True)
        for host in ADDRESSES:
            own = namespace.name_of(f"{name}-{host}")
            netns.create(own)
            stack.callback(netns.remove, own)
            made.ask(host, "ip", "link", "set", "lo", "up")
        made.ask("here", *["ip", "link", "add", "cables", "mtu", "9050", "type", "bridge"])
        for host, address in ADDRESSES.items():
            own = namespace.name_of(f"{name}-{host}")
            made.ask("here", *f"ip link add {host} mtu 9050 type veth peer name cable mtu 9050 netns {own}".split())
            made.ask("here", *f"ip link set {host} master cables up".split())
            made.ask(host, *f"ip addr add {address}/24 dev cable".split())
            made.ask(host, *["ip", "link", "set", "cable", "up"])
        made.ask("here", *["ip", "link", "set", "cables", "up"])
        for host in ("near", "far"):
            run = Path(f"{made.run}-{host}")
            settings = replace(Settings.from_environment(), state_dir=tmp_path / host, run_dir=run)
            paths = RackPaths(settings, f"{name}-{host}")
            stack.callback(shutil.rmtree, settings.run_dir, ignore_errors=True)
            stack.callback(daemon.stop, paths)
            daemon.ensure(paths)
            made.libvirts[host] = Daemon.of(paths)
        script = tmp_path / "rackless"
        script.write_text(f'#!/bin/sh\nPYTHONPATH={PROJECT} exec {sys.executable} -m orchestrator.cli.main "$@"\n')
        script.chmod(0o755)
        hide(made)
        serve_ssh(made, stack)
        yield made


def hide(made: Machines) -> None:
    """Give the far host folders of its own where this machine's racks have theirs."""
    agents = Settings.from_environment().cache_dir.glob("images/agents-*")
    for folder in (*agents, made.folder / "state", made.run):
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run([*made.mounts("far"), "mount", "-t", "tmpfs", "none", str(folder)], check=True)


def serve_ssh(made: Machines, stack: ExitStack) -> None:
    """An sshd on the far host that lets one new key in, and an `ssh` that uses it."""
    assert SSHD
    folder = made.folder / "sshd"
    folder.mkdir()
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    (folder / "known").write_text(f"{ADDRESSES['far']} {(folder / 'host.pub').read_text()}")
    (folder / "config").write_text(f"HostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\nStrictModes no\n"
                                   f"PermitRootLogin yes\nPasswordAuthentication no\nPidFile none\nUsePAM no\n")
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists on it; without systemd it may be missing
    words = [*made.mounts("far"), SSHD, "-D", "-e", "-f", str(folder / "config")]
    server = stack.enter_context(subprocess.Popen(words, stderr=subprocess.PIPE, text=True))
    stack.callback(server.terminate)
    assert server.stderr
    assert "listening" in server.stderr.readline()
    threading.Thread(target=server.stderr.read, daemon=True).start()  # or it would wait until somebody reads more
    ssh = made.folder / "ssh"
    ssh.write_text(f'#!/bin/sh\nexec ssh -F none -i {folder}/user -o UserKnownHostsFile={folder}/known "$@"\n')
    ssh.chmod(0o755)


def test_a_program_spans_hosts(machines: Machines) -> None:
    name = unique("s")
    small = {"memory": "256 MiB"}
    blades: dict[str, dict[str, Any]] = {
        "gm0": {"kind": "manager", "host": "here", **small},
        "pb0": {"kind": "processor", "host": "here", **small},
        "mb0": {"kind": "memory", "host": "near", "pmem": "16 MiB", **small},
        "sb0": {"kind": "storage", "host": "far", "disk": {"size": "64 MiB"}, **small},
    }
    links = {"mb0": {"bandwidth": "1 Gbit/s"}}
    file = machines.rack_file(name, "pair", blades=blades, links=links, hosts=machines.hosts())
    up = json.loads(machines.rackless("up", "--json", str(file)).stdout)
    try:
        states = machines.status(name)
        assert {blade: (about["host"], about["state"]) for blade, about in states.items()} == {
            blade: (about["host"], "ready") for blade, about in blades.items()}  # fmt: skip
        assert machines.domains("near") == [f"{name}.mb0"]
        assert machines.domains("far") == [f"{name}.sb0"]
        assert machines.rackless("plan", str(file)).returncode == 0
        assert any("tbf" in line and "-2 " in line for line in machines.ask("near", "tc", "qdisc").splitlines())
        disk = machines.folder / "state/racks" / name / "blades/sb0/disk.raw"
        assert not disk.exists()
        subprocess.run([*machines.mounts("far"), "test", "-f", str(disk)], check=True)

        program = machines.folder / "stress"
        subprocess.run(["cc", "-std=gnu17", "-O2", "-o", program, SOURCE, "-lpthread"], check=True)
        rack = Rack(machines, name, file)
        rack.on("sb0", "echo this is sb0 > /dev/ttyS0")
        assert "this is sb0" in rack("console", "--log", "sb0").stdout, "its console's log is on the far host"
        rack("cp", str(program), "pb0:/tmp/stress")
        stats = machines.folder / "stats.json"
        words = "chmod +x /tmp/stress; /tmp/stress sequential 8 | tee said; sha256sum said"
        done = rack("run", "--on", "pb0", "--excache", "4MiB", "--stats", str(stats), "--", "sh", "-c", words)
        counted = json.loads(stats.read_text())
        assert counted["flushes"] > 100, "its memory went to the near host and came back"
        assert counted["storage"]["sb0"]["by_opcode"]["P2S_OPEN"] > 0, "its file is on the far host"

        machines.rackless("fault", "kill", "mb0", "--rack", name)
        rack("heal", "mb0")
        assert machines.status(name)["mb0"]["state"] == "ready"
        assert machines.domains("near") == [f"{name}.mb0"], "it comes back on its own host"
        print(up, done.stdout, counted)
    finally:
        machines.rackless("down", name)
    for host in ("near", "far"):
        assert machines.domains(host) == []
        assert json.loads(machines.ask(host, "ip", "-json", "link", "show", "type", "bridge")) == []
        left = subprocess.run([*machines.mounts(host), "ls", str(machines.folder / "state/racks")],
                              capture_output=True, text=True, check=False)  # fmt: skip
        assert left.stdout == ""
    assert os.listdir(machines.run) == []
