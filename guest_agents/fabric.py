"""A blade's two networks: management (SSH and control) and fabric (Soft-RoCE)."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

MANAGEMENT = "mgmt"
FABRIC = "fabric"
RXE = "rxe0"


def configure(management: dict[str, Any], fabric: dict[str, Any], deadline: float) -> None:
    """Bring both NICs up when the host has plugged them in, and make the Soft-RoCE device.

    ``deadline`` is a ``time.monotonic()``; TimeoutError when a NIC is not there by then. Safe to repeat.
    """
    batch = []
    for name, nic in ((MANAGEMENT, management), (FABRIC, fabric)):
        device = _wait_for_mac(nic["mac"], deadline)
        if device != name:  # NICs come up in any order: only their MAC tells which is which
            batch.append(f"link set dev {device} name {name}")
        batch.append(f"link set dev {name} mtu {nic['mtu']} up")
        batch.append(f"addr replace {nic['address']}/{nic['prefix']} dev {name}")
    subprocess.run(["ip", "-batch", "-"], input="\n".join(batch), text=True, check=True)
    if not Path(f"/sys/class/infiniband/{RXE}").exists():
        subprocess.run(["rdma", "link", "add", RXE, "type", "rxe", "netdev", FABRIC], check=True)


def hold(own: str, prefix: int, addresses: Collection[str]) -> None:
    """Have exactly these addresses on the management network besides our own."""
    shown = subprocess.run(["ip", "-json", "-4", "addr", "show", "dev", MANAGEMENT], capture_output=True, check=True)
    held = {entry["local"] for device in json.loads(shown.stdout) for entry in device["addr_info"]} - {own}
    batch = [f"addr del {address}/{prefix} dev {MANAGEMENT}" for address in held - set(addresses)]
    batch += [f"addr add {address}/{prefix} dev {MANAGEMENT}" for address in set(addresses) - held]
    if batch:
        subprocess.run(["ip", "-batch", "-"], input="\n".join(batch), text=True, check=True)


def shape(link: dict[str, Any]) -> None:
    """Latency, jitter (s), loss, corruption, duplication (0..1), bandwidth (bit/s) of what leaves on the fabric.

    `deaf_to` are fabric addresses whose packets are dropped as they come in: dropped as they leave, the sender's
    RDMA would be told. What is not set is lifted.
    """
    latency, jitter = link.get("latency") or 0, link.get("jitter") or 0
    options = []
    if latency or jitter:
        options += ["delay", _microseconds(latency), *([_microseconds(jitter)] if jitter else [])]
    for name, option in (("loss", "loss"), ("corruption", "corrupt"), ("duplication", "duplicate")):
        if link.get(name):
            options += [option, f"{link[name] * 100:.4f}%"]
    if link.get("bandwidth"):
        options += ["rate", f"{link['bandwidth']}bit"]
    if options:
        subprocess.run(
            ["tc", "qdisc", "replace", "dev", FABRIC, "root", "netem", "limit", "10000", *options], check=True
        )
    present = subprocess.run(["tc", "qdisc", "show", "dev", FABRIC], capture_output=True, text=True).stdout
    if not options and "netem" in present:
        subprocess.run(["tc", "qdisc", "del", "dev", FABRIC, "root"], check=True)
    batch = [f"qdisc del dev {FABRIC} ingress"] if "ingress" in present else []
    deaf_to = link.get("deaf_to") or []
    if deaf_to:
        batch.append(f"qdisc add dev {FABRIC} ingress")
    batch += [f"filter add dev {FABRIC} parent ffff: protocol ip prio 1 u32 match ip src {address}/32 action drop"
              for address in deaf_to]  # fmt: skip
    if batch:
        subprocess.run(["tc", "-batch", "-"], input="\n".join(batch), text=True, check=True)


def rdma_state() -> str:
    """State of the Soft-RoCE port: ``ACTIVE``, ``DOWN`` and so on; ``ABSENT`` when there is none."""
    try:
        return Path(f"/sys/class/infiniband/{RXE}/ports/1/state").read_text().split(":")[1].strip()
    except OSError:
        return "ABSENT"


def _wait_for_mac(mac: str, deadline: float) -> str:
    while True:
        for address in Path("/sys/class/net").glob("*/address"):
            if address.read_text().strip() == mac:
                return address.parent.name
        if time.monotonic() > deadline:
            raise TimeoutError(f"no network card with address {mac} was plugged in")
        time.sleep(0.02)


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.0f}us"
