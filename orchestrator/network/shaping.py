"""Bandwidth of a blade's fabric link, towards the blade: a token bucket on its tap.

libvirt's own ``<bandwidth>`` needs sch_sfq and sch_netem, which host kernels may lack; tbf is everywhere.
Latency, jitter, loss, and bandwidth from the blade are put in the guest's kernel (guest_agents/fabric.py): it
has netem.
"""

from __future__ import annotations

from orchestrator.network.place import FABRIC, Place

_ROOT = 0xFFFFFFFF  # TC_H_ROOT
_BURST_SECONDS = 0.01  # two ticks of a kernel with HZ=200: a smaller bucket overflows between two of its looks
_LEAST_BURST_BYTES = 2 * (9000 + 18)  # jumbo frames with their headers: a frame larger than the bucket never passes
_QUEUE_BYTES = 4 << 20
_LARGEST_RATE = (1 << 32) - 1  # bytes/s in a field of 32 bits: 34 Gbit/s, which no link made of software reaches


def limit(place: Place, index: int, bandwidth: int | None) -> None:
    """Limit what the blade at ``index`` gets from the fabric to ``bandwidth`` bit/s; None lifts the limit."""
    if not place.exists():
        return
    tap = place.tap(FABRIC, index)
    with place.netlink(f"limit the bandwidth of {tap}") as net:
        found = net.link_lookup(ifname=tap)
        if not found:
            return  # the blade died meanwhile; its next `up` sets the limit
        if bandwidth is None:
            if any(q.get_attr("TCA_KIND") == "tbf" for q in net.get_qdiscs(index=found[0])):
                net.tc("del", index=found[0], parent=_ROOT)
            return
        rate = min(bandwidth // 8, _LARGEST_RATE)
        net.tc("replace", "tbf", index=found[0], parent=_ROOT, rate=rate,
               burst=max(round(rate * _BURST_SECONDS), _LEAST_BURST_BYTES), limit=_QUEUE_BYTES)  # fmt: skip
