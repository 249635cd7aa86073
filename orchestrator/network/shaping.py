"""Bandwidth of a blade's fabric link, towards the blade: a token bucket on its tap.

libvirt's own ``<bandwidth>`` needs sch_sfq and sch_netem, which host kernels may lack; tbf is everywhere.
Latency, jitter, loss, and bandwidth from the blade are put in the guest's kernel (guest_agents/fabric.py): it
has netem.
"""

from __future__ import annotations

import os

from pyroute2 import NetNS

from orchestrator.network import namespace

_ROOT = 0xFFFFFFFF  # TC_H_ROOT
_BURST_BYTES = 128 << 10  # at least a few 9000-byte frames, or the bucket itself would cut the rate
_QUEUE_BYTES = 4 << 20
_LARGEST_RATE = (1 << 32) - 1  # bytes/s in a field of 32 bits: 34 Gbit/s, which no link made of software reaches


def limit(rack: str, tap: str, bandwidth: int | None) -> None:
    """Limit what ``tap`` carries to its blade to ``bandwidth`` bit/s; None lifts the limit."""
    if not namespace.exists(rack):
        return
    with NetNS(namespace.name_of(rack), flags=os.O_RDONLY) as net:  # or it would make one
        found = net.link_lookup(ifname=tap)
        if not found:
            return  # the blade died meanwhile; its next `up` sets the limit
        if bandwidth is None:
            if any(q.get_attr("TCA_KIND") == "tbf" for q in net.get_qdiscs(index=found[0])):
                net.tc("del", index=found[0], parent=_ROOT)
            return
        net.tc("replace", "tbf", index=found[0], parent=_ROOT, rate=min(bandwidth // 8, _LARGEST_RATE),
               burst=_BURST_BYTES, limit=_QUEUE_BYTES)  # fmt: skip
