"""Where things are on this host and how long to wait for them; the only reader of RACKLESS_* variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from orchestrator.errors import RacklessError

Accelerator = Literal["auto", "kvm", "tcg"]

PRIVATE_LIBVIRT = "private"

TCG_FACTOR = 6.0
"""TCG runs guest code some 5 to 10 times slower than KVM; restores and libvirt calls hardly slow down."""


@dataclass(frozen=True)
class Settings:
    """One host's configuration. Times are for KVM; see `scaled`."""

    cache_dir: Path
    """Images and templates: shared by all racks, safe to delete when none is running."""
    state_dir: Path
    """One folder per rack: keys, secret, logs, disks."""
    run_dir: Path
    """Sockets and pid files: gone after a reboot."""
    libvirt_uri: str = PRIVATE_LIBVIRT
    """ "private" is a libvirtd of our own; anything else is a libvirt URI such as qemu:///system."""
    accelerator: Accelerator = "auto"
    boot_seconds: float = 30.0
    """From a cold start to the blade's marker on its console."""
    ready_seconds: float = 20.0
    """From identity to an agent that has joined and an active RDMA link."""
    identify_seconds: float = 10.0
    """From restore (or boot) to a blade that has taken its identity."""
    ssh_seconds: float = 10.0
    """For an SSH connection to be accepted."""
    handshake_seconds: float = 60.0
    """For the banner, and for keys to be exchanged and accepted; never scaled, it is enough for an emulated blade."""
    control_seconds: float = 10.0
    """For one request to an agent to be answered."""
    status_seconds: float = 3.0
    """For one agent to say how it is; never scaled, `status` must not hang on a dead blade."""
    managers_seconds: float = 60.0
    """For the splitkernel's managers to answer, who wait for silent blades until these are dead; never scaled."""
    lock_seconds: float = 3.0
    """For another `rackless` on the same rack to let go of it; never scaled."""
    max_workers: int = 16
    """Blades worked on at the same time."""
    control_port: int = 7070
    """TCP port of the agents on the management network."""

    @property
    def snapshots(self) -> Path:
        """Snapshots of racks, in a folder per rack: not in that of the rack, which `down` removes."""
        return self.state_dir / "snapshots"

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read RACKLESS_CACHE, _STATE, _RUN, _LIBVIRT_URI and _ACCEL, and any time as in RACKLESS_READY_SECONDS.

        Raises RacklessError on a bad value.
        """
        env = os.environ if environ is None else environ
        root = os.geteuid() == 0
        home = Path(env.get("HOME") or Path.home())
        cache = Path("/var/cache/rackless") if root else home / ".cache/rackless"
        state = Path("/var/lib/rackless") if root else home / ".local/share/rackless"
        return cls(
            cache_dir=_folder(env, "RACKLESS_CACHE", cache),
            state_dir=_folder(env, "RACKLESS_STATE", state),
            run_dir=_folder(env, "RACKLESS_RUN", Path("/run/rackless")),
            libvirt_uri=env.get("RACKLESS_LIBVIRT_URI") or PRIVATE_LIBVIRT,
            accelerator=_accelerator(env.get("RACKLESS_ACCEL") or "auto"),
            **_times(env),
        )

    def scaled(self, accelerator: str) -> Settings:
        """These settings with the waits on guest code stretched for `accelerator` ("kvm" or "tcg")."""
        if accelerator != "tcg":
            return self
        return replace(
            self,
            boot_seconds=self.boot_seconds * TCG_FACTOR,
            ready_seconds=self.ready_seconds * TCG_FACTOR,
            identify_seconds=self.identify_seconds * TCG_FACTOR,
            ssh_seconds=self.ssh_seconds * TCG_FACTOR,
            control_seconds=self.control_seconds * TCG_FACTOR,
        )


@dataclass(frozen=True)
class BladePaths:
    """Files of one blade."""

    root: Path

    @property
    def console(self) -> Path:
        return self.root / "console.log"

    @property
    def disk(self) -> Path:
        return self.root / "disk.raw"

    @property
    def pmem(self) -> Path:
        """What survives of its persistent memory; see pmem.py."""
        return self.root / "pmem.raw"

    @property
    def pmem_vol(self) -> Path:
        """What its programs see of it."""
        return self.root / "pmem.vol"


@dataclass(frozen=True)
class RackPaths:
    """Files of one rack: everything under one folder, so that `down` can remove exactly that."""

    settings: Settings
    name: str

    @property
    def root(self) -> Path:
        return self.settings.state_dir / "racks" / self.name

    @property
    def ssh(self) -> Path:
        """Keys, known_hosts and ssh_config of the rack (0700)."""
        return self.root / "ssh"

    @property
    def secret(self) -> Path:
        """The key of the control channel (0600)."""
        return self.root / "secret"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def events(self) -> Path:
        """What happened to the rack, as lines of JSON; see journal.py."""
        return self.root / "events.jsonl"

    @property
    def blades(self) -> Path:
        return self.root / "blades"

    def blade(self, name: str) -> BladePaths:
        return BladePaths(self.blades / name)


def _folder(env: Mapping[str, str], variable: str, default: Path) -> Path:
    # Absolute: libvirtd and QEMU run with another working directory.
    return Path(env.get(variable) or default).expanduser().absolute()


def _times(env: Mapping[str, str]) -> dict[str, Any]:
    times = {}
    for name in (field.name for field in fields(Settings) if field.name.endswith("_seconds")):
        text = env.get(f"RACKLESS_{name.upper()}")
        if text:
            try:
                times[name] = float(text)
            except ValueError:
                raise RacklessError(f'RACKLESS_{name.upper()}="{text}" is not a number of seconds') from None
    return times


def _accelerator(text: str) -> Accelerator:
    if text not in get_args(Accelerator):
        raise RacklessError(f'RACKLESS_ACCEL="{text}" is not an accelerator', hint="write auto, kvm or tcg")
    return cast(Accelerator, text)
