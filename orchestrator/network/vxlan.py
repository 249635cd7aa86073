"""A rack's bridges on several hosts, joined: each bridge has one VXLAN port, which knows the addresses of all peers.

Every host sends to every other by itself, so there is no loop to break, and nothing in the middle to configure: a
bridge never sends back into the port that a frame came from. The port's packets leave from where this process is,
among the host's own interfaces, also when its bridge is in the namespace of a rack (the kernel keeps a VXLAN device's
socket where the device was made).
"""

from __future__ import annotations

import hashlib
import ipaddress
import socket
from collections.abc import Collection
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import RacklessError
from orchestrator.network.place import FABRIC, MANAGEMENT, Place, port

OVERHEAD = 50
"""Bytes that VXLAN adds to a frame: the headers of the frame inside (14), VXLAN (8), UDP (8) and IPv4 (20)."""
MANAGEMENT_MTU = 1450
"""Of a management network that crosses hosts: it fits into the usual 1500 bytes between them."""
_PORT = 4789  # IANA's, RFC 7348
_EVERYBODY = "00:00:00:00:00:00"  # frames to a MAC that is not known yet go to all peers


@dataclass(frozen=True)
class Tunnel:
    """One end of what joins the hosts of a rack."""

    number: int
    """The rack's: the VXLAN network identifiers (24 bits) of its networks are this and the next 255."""
    address: str
    """This host's."""
    peers: tuple[str, ...]
    """The other hosts'."""

    def vni(self, network: str, side: int = 0) -> int:
        """The identifier of a network; each side of a parted fabric has one of its own."""
        return self.number + (0 if network == MANAGEMENT else 1 + side)


def number(rack: str, home: str) -> int:
    """A number for the tunnels of a rack of the machine with the address `home`."""
    return int.from_bytes(hashlib.sha256(f"{rack} {home}".encode()).digest()[:2]) << 8


def join(place: Place, tunnel: Tunnel, network: str, side: int = 0) -> None:
    """Give the bridge of a network its port to the other hosts, of the bridge's MTU; one that is right stays."""
    name = place.side(side) if network == FABRIC else place.bridge(network)
    wanted = (tunnel.vni(network, side), tunnel.address, {*tunnel.peers})
    with place.netlink(f"join {name} of rack {place.rack} to other hosts") as net:
        bridge = net.link_lookup(ifname=name)[0]
        mtu = net.get_links(bridge)[0].get_attr("IFLA_MTU")
        if _is(net, port(name)) != wanted:
            leave(net, name)
            with closing(_underlay()) as here:
                here.link("add", ifname=port(name), kind="vxlan", vxlan_id=wanted[0], vxlan_local=tunnel.address,
                          vxlan_port=_PORT, **place.target())  # fmt: skip
            index = net.link_lookup(ifname=port(name))[0]
            for peer in tunnel.peers:
                net.fdb("append", ifindex=index, lladdr=_EVERYBODY, dst=peer)
        index = net.link_lookup(ifname=port(name))[0]
        net.link("set", index=index, master=bridge, mtu=mtu, state="up")


def leave(net: Any, bridge: str) -> None:
    """Take a bridge's port to the other hosts away, if it has one."""
    for index in net.link_lookup(ifname=port(bridge)):
        net.link("del", index=index)


def of(place: Place) -> Tunnel | None:
    """The tunnel that the fabric of a rack has; None in a rack of one host."""
    with place.netlink(f"look at the fabric of rack {place.rack}") as net:
        found = _is(net, port(place.side(0)))
        return found and Tunnel(found[0] - 1, found[1], tuple(sorted(found[2])))


@dataclass(frozen=True)
class Route:
    """How this host reaches another one."""

    interface: str
    mtu: int


def routes(address: str, peers: Collection[str]) -> dict[str, Route]:
    """How this host, which should have `address`, reaches its peers. RacklessError when it cannot, or has it not."""
    with closing(_underlay()) as net:
        own = [str(found.get_attr("IFA_ADDRESS")) for found in net.get_addr(family=socket.AF_INET)]
        if address not in own:
            others = [each for each in own if not ipaddress.ip_address(each).is_loopback]
            raise RacklessError(f"the address {address} is not its own; it has {', '.join(others) or 'none'}",
                                hint="write one of these in the rack file, which the other hosts reach")  # fmt: skip
        return {peer: _route(net, peer) for peer in peers}


def _route(net: Any, peer: str) -> Route:
    from pyroute2 import NetlinkError

    try:
        (route,) = net.route("get", dst=peer)
    except NetlinkError as error:
        raise RacklessError(f"it has no way to {peer}: {error.args[-1]}", hint="connect the hosts first") from error
    (link,) = net.get_links(route.get_attr("RTA_OIF"))
    return Route(str(link.get_attr("IFLA_IFNAME")), int(link.get_attr("IFLA_MTU")))


def _is(net: Any, name: str) -> tuple[int, str, set[str]] | None:
    """Identifier, own address and peers of a VXLAN device; None when there is none of this name."""
    for index in net.link_lookup(ifname=name):
        (link,) = net.get_links(index)
        data = link.get_nested("IFLA_LINKINFO", "IFLA_INFO_DATA")
        entries = net.fdb("dump", ifindex=index)
        peers = {str(entry.get_attr("NDA_DST")) for entry in entries
                 if entry["ifindex"] == index and entry.get_attr("NDA_LLADDR") == _EVERYBODY}  # fmt: skip
        return data.get_attr("IFLA_VXLAN_ID"), str(data.get_attr("IFLA_VXLAN_LOCAL")), peers
    return None


def _underlay() -> Any:
    from pyroute2 import IPRoute

    return IPRoute()
