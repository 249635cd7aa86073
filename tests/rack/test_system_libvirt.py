"""A rack in a libvirtd that is not Rackless's, as with RACKLESS_LIBVIRT_URI=qemu:///system.

That libvirtd is started here, with a distribution's configuration, in a scratch network that stands for the host's:
neither this machine's libvirt nor its interfaces are touched.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from pyroute2 import netns

from orchestrator import templates
from orchestrator.hypervisor import daemon
from orchestrator.network import namespace
from orchestrator.settings import RackPaths, Settings
from tests.rack.conftest import Bench, unique

pytestmark = pytest.mark.rack


@dataclass
class Host(Bench):
    """Where `rackless` runs beside that libvirtd."""

    name: str = ""
    pid_file: Path = Path()

    def inside(self, *words: str) -> list[str]:
        return ["nsenter", f"--net={namespace.NAMED / namespace.name_of(self.name)}", *words]

    def command(self, *words: str) -> list[str]:
        return self.inside(*super().command(*words))

    def ask(self, *words: str) -> str:
        """What a command there prints."""
        return subprocess.run(self.inside(*words), env=self.env(), capture_output=True, text=True, check=True).stdout

    def interfaces(self) -> dict[str, str]:
        """Names and aliases."""
        return {link["ifname"]: link.get("ifalias", "") for link in json.loads(self.ask("ip", "-json", "link"))}

    def domains(self) -> list[str]:
        uri = self.environment["RACKLESS_LIBVIRT_URI"]
        return sorted(self.ask("virsh", "-c", uri, "list", "--all", "--name").split())


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """The scratch host, its libvirtd running. Gone afterwards, whatever happened."""
    name = unique("h")
    run = Path(f"/run/rackless-{name}")
    settings = replace(Settings.from_environment(), state_dir=tmp_path / "host", run_dir=Path(f"{run}-host"))
    paths = RackPaths(settings, name)
    libvirt = daemon.Daemon.of(paths)
    # As distributions have it: QEMU runs as a user of its own that may not see root's files.
    monkeypatch.setattr(daemon, "render", lambda template, **values: "" if template == "qemu.conf.j2"
                        else templates.render(template, **values))  # fmt: skip
    uri = f"qemu:///system?socket={libvirt.socket}"
    made = Host(tmp_path, run, {"RACKLESS_LIBVIRT_URI": uri}, name, libvirt.pids["libvirtd"])
    Bench(tmp_path, run).rackless("image", "build")  # here: from the scratch network no mirror can be reached
    netns.create(namespace.name_of(name))
    try:
        made.ask("ip", "link", "set", "lo", "up")
        daemon.ensure(paths)
        yield made
    finally:
        daemon.stop(paths)
        netns.remove(namespace.name_of(name))
        for folder in (run, run.with_name(f"{run.name}-2"), paths.settings.run_dir):
            shutil.rmtree(folder, ignore_errors=True)


def test_a_rack_among_the_hosts_interfaces(host: Host) -> None:
    name = unique("s")
    blades = {
        "gm0": {"kind": "manager", "memory": "256 MiB"},
        "sb0": {"kind": "storage", "memory": "256 MiB", "cpu_quota": "50 %", "disk": {"size": "64 MiB"}},
    }
    links = {"sb0": {"bandwidth": "1 Gbit/s"}}
    before = host.interfaces()

    clash = host.rack_file(name, "pair", management={"subnet": "10.90.0.0/24"})
    host.ask("ip", "addr", "add", "10.90.0.1/24", "dev", "lo")
    refused = host.rackless("up", str(clash), check=False)
    assert refused.returncode == 1
    assert "the management subnet 10.90.0.0/24" in refused.stderr
    assert host.interfaces() == before

    file = host.rack_file(name, "pair", blades=blades, links=links)
    host.rackless("up", str(file))
    try:
        states = host.status(name)
        assert {blade: about["state"] for blade, about in states.items()} == {"gm0": "ready", "sb0": "ready"}
        assert host.domains() == sorted(f"{name}.{blade}" for blade in blades)
        new = {link: alias for link, alias in host.interfaces().items() if link not in before}
        bridges = sorted(link for link, alias in new.items() if alias == f"rackless:{name}:{host.run}")
        assert [bridge[:4] for bridge in bridges] == ["rlf-", "rlm-"]
        fabric, management = bridges
        assert new.keys() == {fabric, management, *(f"{bridge}-{index}" for bridge in bridges for index in (0, 1))}
        assert not new.keys() & {link for _, link in socket.if_nameindex()}, "this machine's own network was changed"
        assert "tbf" in host.ask("tc", "qdisc", "show", "dev", f"{fabric}-1")

        assert host.rackless("plan", str(file)).returncode == 0
        assert host.rackless("ssh", "--rack", name, "sb0", "--", "hostname").stdout == "sb0\n"
        config = host.folder / "state/racks" / name / "ssh/ssh_config"
        assert "ProxyCommand" not in config.read_text()
        assert host.ask("ssh", "-F", str(config), "gm0", "hostname") == "gm0\n"
        assert json.loads(host.rackless("gc", "--json").stdout) == []

        stranger = replace(host, run=host.run.with_name(f"{host.run.name}-2"), folder=host.folder / "stranger")
        stranger.folder.mkdir()
        told = stranger.rackless("up", str(stranger.rack_file(name, "pair")), check=False)
        assert f"has a rack called {name}, of another RACKLESS_RUN" in told.stderr
        stranger.rackless("down", name)  # has nothing to take down
        assert len(host.domains()) == len(blades)

        elsewhere = Bench(host.folder, host.run)  # somebody who forgets the variable
        for words in (("down", name), ("up", str(file)), ("status", name)):
            told = elsewhere.rackless(*words, check=False)
            assert told.returncode == 1
            assert f"set RACKLESS_LIBVIRT_URI={host.environment['RACKLESS_LIBVIRT_URI']}" in told.stderr
        assert json.loads(elsewhere.rackless("gc", "--json").stdout) == []
    finally:
        host.rackless("down", name)
    assert host.domains() == []
    assert host.interfaces() == before
    assert not (host.folder / "state/racks" / name).exists()
    assert not (host.run / name).exists()
    assert daemon.running(host.pid_file), "the host's libvirtd was ended"
