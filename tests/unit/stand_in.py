"""Stand-in blades without VMs: real sshds in a rack's network namespace, for tests of all that uses SSH.

They share this machine's files, so a test gives paths of its own; commands run as root here.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.network.namespace import inside
from orchestrator.rackfile import validate
from orchestrator.settings import RackPaths, Settings
from orchestrator.spec import BladeSpec, make_spec
from orchestrator.ssh.config import ssh_config, write_ssh_config
from orchestrator.ssh.keys import ensure_host_key, ensure_rack_keys, host_key, write_known_hosts
from orchestrator.ssh.shared import close_shared_connections

SSHD = shutil.which("sshd", path="/usr/sbin:/sbin:/usr/bin")
NEEDED = ("ip", "nsenter", "nc", "ssh", "scp", "rsync")


def missing() -> str | None:
    """Say why stand-in blades cannot be made on this machine, None if they can."""
    if os.geteuid() != 0:
        return "needs root, to make a network namespace"
    absent = [name for name in NEEDED if shutil.which(name) is None] + ([] if SSHD else ["sshd"])
    return f"needs {', '.join(absent)}" if absent else None


KINDS = {"gm": "manager", "pb": "processor", "mb": "memory", "sb": "storage"}


@dataclass(frozen=True)
class StandInRack:
    """A rack whose blades are sshds."""

    paths: RackPaths
    specs: dict[str, BladeSpec]
    folder: Path
    """For the tests' own files."""
    servers: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def blades(self) -> dict[str, str]:
        """Name -> management address."""
        return {name: spec.mgmt_address for name, spec in self.specs.items()}

    @property
    def bin(self) -> Path:
        """First folder in the PATH of commands on the blades."""
        return self.folder / "bin"

    @property
    def ssh_config(self) -> Path:
        return ssh_config(self.paths)

    def install(self, name: str, script: str) -> None:
        """Put a program into the blades' PATH."""
        self.bin.mkdir(exist_ok=True)
        program = self.bin / name
        program.write_text(script)
        program.chmod(0o755)


def blade_specs(rack: str, names: Sequence[str]) -> dict[str, BladeSpec]:
    """Descriptions of blades whose names begin as their kinds do."""
    blades = {name: {"kind": KINDS[name[:2]], "memory": "256 MiB"} for name in names}
    model = validate({"name": rack, "blades": blades})
    return {name: make_spec(model, name, index, "0" * 64) for index, name in enumerate(names)}


@contextmanager
def stand_in_rack(folder: Path, names: Sequence[str] = ("gm0", "pb0", "mb0", "mb1")) -> Iterator[StandInRack]:
    """Yield a rack of stand-in blades in a namespace of its own; nothing is left of it afterwards."""
    name = f"t{secrets.token_hex(4)}"
    run_dir = Path("/tmp") / f"rackless-{name}"  # short: pytest's own folders are too long for sockets' names
    settings = Settings(cache_dir=folder / "cache", state_dir=folder / "state", run_dir=run_dir)
    rack = StandInRack(RackPaths(settings, name), blade_specs(name, names), folder)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, run_dir, ignore_errors=True)
        _ip("netns", "add", f"rackless-{name}")
        stack.callback(_ip, "netns", "del", f"rackless-{name}")
        _ip("-n", f"rackless-{name}", "link", "set", "lo", "up")
        authorized_keys = folder / "authorized_keys"
        authorized_keys.write_text(ensure_rack_keys(rack.paths).public_key_line + "\n")
        for blade, address in rack.blades.items():
            ensure_host_key(rack.paths, blade)
            _ip("-n", f"rackless-{name}", "addr", "add", f"{address}/32", "dev", "lo")
            rack.servers[blade] = stack.enter_context(_sshd(rack, blade, folder, authorized_keys))
        write_known_hosts(rack.paths, rack.blades)
        write_ssh_config(rack.paths, rack.blades)
        stack.callback(close_shared_connections, rack.paths, rack.blades.values())
        yield rack


@contextmanager
def _sshd(rack: StandInRack, blade: str, folder: Path, authorized_keys: Path) -> Iterator[subprocess.Popen[bytes]]:
    assert SSHD is not None
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists on it; without systemd it may be missing
    config = folder / f"sshd_config.{blade}"
    config.write_text(
        f"ListenAddress {rack.blades[blade]}:22\n"
        f"HostKey {host_key(rack.paths, blade)}\n"
        f"AuthorizedKeysFile {authorized_keys}\n"
        "PidFile none\nStrictModes no\nPermitRootLogin prohibit-password\nPasswordAuthentication no\n"
        "UsePAM no\nUseDNS no\nMaxSessions 64\n"
        f"SetEnv PATH={rack.bin}:/usr/sbin:/usr/bin:/sbin:/bin BLADE={blade} SHLVL=2\n"  # SHLVL: no ~/.bashrc
        "Subsystem sftp internal-sftp\n"
    )
    command = ["nsenter", f"--net=/run/netns/rackless-{rack.paths.name}", SSHD, "-D", "-e", "-f", str(config)]
    log = folder / f"sshd.{blade}.log"
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        _wait_for_port(rack, blade, server, log)
        yield server
    finally:
        server.terminate()
        server.wait()


def _wait_for_port(rack: StandInRack, blade: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            inside(rack.paths.name, lambda: socket.create_connection((rack.blades[blade], 22), 1)).close()
            return
        except OSError:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
