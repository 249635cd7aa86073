"""What blades cost this host: processor time and memory of QEMU, bytes through the taps."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import libvirt

from orchestrator.hypervisor.daemon import Daemon
from orchestrator.hypervisor.domain import Owned, explain
from orchestrator.hypervisor.hosts import Hosts
from orchestrator.settings import PRIVATE_LIBVIRT, RackPaths

# Its "balloon" would tell the resident size, but asks every QEMU: 4.5 s for 16 blades without KVM, and not 40 ms.
_WANTED = libvirt.VIR_DOMAIN_STATS_CPU_TOTAL | libvirt.VIR_DOMAIN_STATS_INTERFACE
_HOST_RUN = Path("/run/libvirt")


@dataclass(frozen=True)
class Traffic:
    """Through one network card since it was plugged in, seen from the blade."""

    bytes_in: int
    bytes_out: int


@dataclass(frozen=True)
class Usage:
    """One QEMU process."""

    cpu_seconds: float
    resident_bytes: int | None
    """None when it has just ended, or is on another host."""
    cards: Mapping[str, Traffic]
    """By the name of the tap."""


def usage(hosts: Hosts, found: Mapping[str, Owned]) -> dict[str, Usage]:
    """What each blade that runs costs, all of a host asked at once. One that ends at this moment is left out."""
    blades = {owned.domain.UUIDString(): name for name, owned in found.items()}
    costs: dict[str, Usage] = {}
    for host in (None, *hosts.far) if hosts.here else hosts.far:
        told = explain("count what blades use", partial(
            hosts.conn(host).getAllDomainStats, _WANTED, libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT))  # fmt: skip
        for domain, stats in told:
            if domain.UUIDString() in blades and "cpu.time" in stats:
                bytes_here = resident(hosts.paths, domain.name()) if host is None else None
                costs[blades[domain.UUIDString()]] = parsed(stats, bytes_here)
    return costs


def parsed(stats: Mapping[str, Any], resident_bytes: int | None) -> Usage:
    """libvirt's names and units (nanoseconds) made into ours."""
    cards = {}
    for number in range(stats.get("net.count", 0)):
        card = f"net.{number}"
        if f"{card}.rx.bytes" in stats:
            cards[str(stats[f"{card}.name"])] = Traffic(stats[f"{card}.rx.bytes"], stats[f"{card}.tx.bytes"])
    return Usage(stats["cpu.time"] / 1e9, resident_bytes, cards)


def resident(paths: RackPaths, domain: str) -> int | None:
    """Host memory of a domain's QEMU, bytes; None when it has ended."""
    private = paths.settings.libvirt_uri == PRIVATE_LIBVIRT
    run = Daemon.of(paths).run if private else _HOST_RUN
    try:
        pid = int((run / "qemu" / f"{domain}.pid").read_text())
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None
