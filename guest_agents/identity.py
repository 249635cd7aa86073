"""A blade's identity: what makes a clone of a template a blade of its own.

Clones share memory, so hostname, machine-id, keys, clock and the state of the random generator must all be
replaced before anything talks to the network.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
import time
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

FILE = Path("/run/rackless/identity.json")
_RNDADDENTROPY = 0x40085203  # linux/random.h
_RNDRESEEDCRNG = 0x5207


@dataclass(frozen=True)
class Identity:
    """What the host tells a blade about itself. Addresses are strings, sizes bytes, the secret hex."""

    rack: str
    name: str
    kind: str
    machine_id: str
    secret: str
    manager: str
    management: dict[str, Any]  # mac, address, prefix, mtu
    fabric: dict[str, Any]  # mac, address, prefix, mtu
    link: dict[str, Any]  # latency, loss and so on: see fabric.shape
    authorized_key: str
    host_key: str
    hosts: dict[str, str]  # name -> management address, of every blade of the rack
    index: int  # place in the rack, from 0
    heartbeat: float  # seconds
    dead_after: float  # seconds
    disk: bool = False  # a data disk is plugged in as /dev/vdc, with an ext4 on it
    pmem: dict[str, int] | None = None  # size, and addresses of vol and media: see nvdimm.py
    excache: int | None = None  # bytes
    pressure: int = 0  # bytes taken from it by a fault: see pressure.py
    disk_faults: dict[str, Any] = field(default_factory=dict)  # what its disk has: see disk.break_as
    clock: float = 0.0  # seconds that its wall clock was set on by a fault

    @classmethod
    def of(cls, message: dict[str, Any]) -> Identity:
        """From an ``identify`` request; KeyError when a field is missing that has no default."""
        needed = [f.name for f in fields(cls)
                  if f.name in message or (f.default is MISSING and f.default_factory is MISSING)]  # fmt: skip
        return cls(**{name: message[name] for name in needed})


def load() -> Identity | None:
    """The identity this blade took before its agent was started anew, or None in a fresh blade."""
    try:
        return Identity.of(json.loads(FILE.read_text()))
    except FileNotFoundError:
        return None


def save(identity: Identity) -> None:
    """Keep the identity for a restart of the agent; readable by root alone, gone with the blade."""
    FILE.parent.mkdir(parents=True, exist_ok=True)
    part = FILE.with_suffix(".part")  # an agent that is killed here must find a whole file again
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(identity.__dict__, file)
    part.replace(FILE)


def reseed(entropy: bytes) -> None:
    """Mix the host's entropy into the kernel's generator and make it take effect now."""
    with open("/dev/urandom", "wb") as device:
        fcntl.ioctl(device, _RNDADDENTROPY, struct.pack("ii", len(entropy) * 8, len(entropy)) + entropy)
        fcntl.ioctl(device, _RNDRESEEDCRNG)


def set_clock(epoch_ns: int) -> None:
    """The guest's wall clock stood still while the template lay on disk."""
    time.clock_settime_ns(time.CLOCK_REALTIME, epoch_ns)


def write_files(identity: Identity) -> None:
    """Hostname, machine-id, /etc/hosts, SSH keys."""
    Path("/proc/sys/kernel/hostname").write_text(identity.name)
    Path("/etc/hostname").write_text(identity.name + "\n")
    Path("/etc/machine-id").write_text(identity.machine_id + "\n")
    write_hosts(identity.hosts)
    _private("/root/.ssh/authorized_keys", identity.authorized_key + "\n")
    _private("/etc/ssh/ssh_host_ed25519_key", identity.host_key)


def write_hosts(hosts: dict[str, str]) -> None:
    """Let the names of all blades mean their management addresses."""
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in hosts.items())]
    Path("/etc/hosts").write_text("\n".join(lines) + "\n")


def _private(path: str, text: str) -> None:
    file = Path(path)
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as handle:
        handle.write(text)
