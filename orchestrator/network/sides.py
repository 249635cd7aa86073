"""Partitions of the fabric: each side has a bridge of its own, and a blade's tap is plugged into that of its side.

It needs nothing of the host's kernel but bridges, and no blade has to answer. RoCE packets, ARP and all else on the
fabric stay on their side; the management network is not touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.network import vxlan
from orchestrator.network.place import FABRIC, Place, port


def part(place: Place, sides: Mapping[int, int]) -> None:
    """Plug the taps of blades, by index, into the bridges of their sides; bridges left without taps are removed.

    Blades that are not named, or are not on this host, stay where they are: every host of a rack is told of all. A side
    crosses hosts as the fabric does. Raises RacklessError when the host refuses.
    """
    if not place.exists():
        return
    tunnel = vxlan.of(place)
    with place.netlink(f"part the fabric of rack {place.rack}") as net:
        (fabric,) = net.get_links(net.link_lookup(ifname=place.side(0))[0])
        for number in sorted(set(sides.values())):
            name = place.side(number)
            bridge = place.find(net, name) or place.add(net, name)
            if number:
                net.link("set", index=bridge, mtu=fabric.get_attr("IFLA_MTU"), state="up", br_stp_state=0)
                if tunnel:
                    vxlan.join(place, tunnel, FABRIC, number)
            for index in (index for index, side in sides.items() if side == number):
                tap = net.link_lookup(ifname=place.tap(FABRIC, index))
                if tap and _master(net, tap[0]) != bridge:  # without one its power is off
                    net.link("set", index=tap[0], master=bridge)
        ports = {port(name) for name in place.sides(net)}
        used = {link.get_attr("IFLA_MASTER") for link in net.get_links() if link.get_attr("IFLA_IFNAME") not in ports}
        for name, bridge in place.sides(net).items():
            if bridge not in used:
                vxlan.leave(net, name)
                net.link("del", index=bridge)


def _master(net: Any, index: int) -> int | None:
    (link,) = net.get_links(index)
    found: int | None = link.get_attr("IFLA_MASTER")
    return found
