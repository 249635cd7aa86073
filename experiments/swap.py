"""Linux swap on one device at a time, as context managers on blades: the memory of another blade, zram, a disk.

The device is the same RAM disk (brd) of the memory blade for all network peers. All shell here runs as root in blades.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from experiments.blades import serving
from orchestrator.ssh import client

if TYPE_CHECKING:
    from fabric import Connection

MIB = 1 << 20
PAGE_CLUSTER = 3
"""Linux's default: 8 pages come in together (a power of 2)."""
_DISK_MIB = 160
_NBD_PORT, _NVME_PORT = 10809, 4420
_NQN = "swap-{transport}"  # one for each transport: with the same, the kernel would quietly use both paths
_SUBSYSTEM = "/sys/kernel/config/nvmet/subsystems"
_NVME_PORTS = "/sys/kernel/config/nvmet/ports"


@contextmanager
def on_nbd(near: Connection, far: Connection, address: str) -> Iterator[None]:
    """A network block device of `far` (its fabric address), over TCP."""
    _ram_disk(far)
    with serving(far, f"nbd-server -C /dev/null -d {address}:{_NBD_PORT} /dev/ram0", _NBD_PORT):
        client.run(near, f"modprobe nbd && nbd-client -swap -b 4096 {address} {_NBD_PORT} /dev/nbd0")
        try:
            with _swap(near, "/dev/nbd0"):
                yield
        finally:
            client.run(near, "nbd-client -d /dev/nbd0")


@contextmanager
def on_nvme(near: Connection, far: Connection, address: str, transport: str) -> Iterator[None]:
    """NVMe over fabrics to `far`. transport: tcp or rdma."""
    _ram_disk(far)
    nqn = _NQN.format(transport=transport)
    subsystem, port = f"{_SUBSYSTEM}/{nqn}", f"{_NVME_PORTS}/1"
    client.run(far, f"""set -e; modprobe nvmet-{transport}
        mountpoint -q /sys/kernel/config || mount -t configfs none /sys/kernel/config
        mkdir {subsystem} {subsystem}/namespaces/1 {port}
        echo 1 > {subsystem}/attr_allow_any_host
        echo /dev/ram0 > {subsystem}/namespaces/1/device_path; echo 1 > {subsystem}/namespaces/1/enable
        echo {transport} > {port}/addr_trtype; echo ipv4 > {port}/addr_adrfam
        echo {address} > {port}/addr_traddr; echo {_NVME_PORT} > {port}/addr_trsvcid
        ln -s {subsystem} {port}/subsystems/""")
    try:
        wanted = f"transport={transport},traddr={address},trsvcid={_NVME_PORT},nqn={nqn}"
        device = client.run(near, f"""set -e; modprobe nvme-{transport}
            echo {wanted} > /dev/nvme-fabrics
            for i in $(seq 100); do for d in /dev/nvme*n1; do [ -b $d ] && echo $d && exit; done; sleep 0.1; done
            echo no namespace appeared >&2; exit 1""").stdout.strip()
        with _swap(near, device):
            yield
    finally:
        client.run(near, "for c in /sys/class/nvme/nvme[0-9]*; do echo 1 > $c/delete_controller; done", check=False)
        client.run(far, f"""rm {port}/subsystems/{nqn}; rmdir {port}
            echo 0 > {subsystem}/namespaces/1/enable; rmdir {subsystem}/namespaces/1 {subsystem}""")


@contextmanager
def on_zram(near: Connection) -> Iterator[None]:
    """Packed pages in the blade's own memory. They are not counted to the program, which makes it no equal peer."""
    device = client.run(near, "modprobe zram && cat /sys/class/zram-control/hot_add").stdout.strip()
    client.run(near, f"echo {_DISK_MIB}M > /sys/block/zram{device}/disksize")
    try:
        with _swap(near, f"/dev/zram{device}"):
            yield
    finally:
        client.run(near, f"echo {device} > /sys/class/zram-control/hot_remove")


@contextmanager
def on_disk(blade: Connection) -> Iterator[None]:
    """A file on the disk of a storage blade, for programs on that blade."""
    path = "/srv/vnode/.swap"
    client.run(blade, f"umask 077; dd if=/dev/zero of={path} bs=1M count={_DISK_MIB} status=none")
    try:
        with _swap(blade, path):
            yield
    finally:
        client.run(blade, f"rm {path}")


@contextmanager
def _swap(blade: Connection, device: str) -> Iterator[None]:
    quoted = shlex.quote(device)
    client.run(blade, f"mkswap {quoted} && swapon {quoted}")
    try:
        yield
    finally:
        client.run(blade, f"swapoff {quoted}", timeout=600)


def _ram_disk(far: Connection) -> None:
    client.run(far, f"modprobe brd rd_nr=1 rd_size={_DISK_MIB * 1024}")
