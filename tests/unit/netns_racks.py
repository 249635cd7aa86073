"""Racks for tests that make network namespaces: names and folders of their own, removed whatever happens."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from orchestrator.hypervisor import daemon
from orchestrator.network import bridge, place
from orchestrator.settings import RackPaths, Settings

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make a network namespace")

MANAGEMENT = IPv4Network("10.78.0.0/24")
FABRIC = IPv4Network("10.77.0.0/24")


def ensure_network(where: place.Place | str, management: IPv4Network = MANAGEMENT, mtu: int = 9000) -> None:
    """Make the bridges of a rack, by its place; by its name if it has a namespace of its own."""
    where = place.OwnNamespace(where) if isinstance(where, str) else where
    bridge.ensure(where, management, FABRIC, mtu)


@contextmanager
def scratch_rack() -> Iterator[RackPaths]:
    """A rack of which nothing exists yet. In a short folder: a socket's path has at most 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="rl-", dir="/tmp"))
    environment = {f"RACKLESS_{name}": str(folder / name.lower()) for name in ("CACHE", "STATE", "RUN")}
    settings = replace(Settings.from_environment({**environment, "HOME": str(folder)}), lock_seconds=0.2)
    paths = RackPaths(settings, f"t{secrets.token_hex(4)}")
    try:
        yield paths
    finally:
        daemon.stop(paths)
        place.OwnNamespace(paths.name).remove()
        shutil.rmtree(folder)


_LIKE_QEMU = """
mkdir -p "$1" "$2" /run/libvirt /var/lib/libvirt
mount --bind "$1" /run/libvirt && mount --bind "$2" /var/lib/libvirt || exit
shift 2
exec "$@"
"""


def like_qemu(paths: RackPaths, blade: str, program: str) -> list[str]:
    """Words that start a Python program that looks like a blade's QEMU from outside: its command line, its mounts."""
    own, name = daemon.Daemon.of(paths), f"{paths.name}.{blade}"
    key = f'{{"qom-type":"secret","id":"masterKey0","file":"/var/lib/libvirt/qemu/domain-3-{name}/master-key.aes"}}'
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", _LIKE_QEMU, "sh", str(own.run), str(own.lib),
            sys.executable, "-c", program, "-name", f"guest={name},debug-threads=on", "-S", "-object", key,
            "-chardev", "socket,id=charmonitor,fd=32,server=on,wait=off"]  # fmt: skip
