"""The rack's two bridges: ``mgmt`` for SSH and control, never faulted, and ``fabric`` for Soft-RoCE."""

from __future__ import annotations

import fcntl
from ipaddress import IPv4Network
from pathlib import Path

from orchestrator.errors import RacklessError
from orchestrator.network import vxlan
from orchestrator.network.place import FABRIC, MANAGEMENT, Place
from orchestrator.network.vxlan import Tunnel
from orchestrator.spec import host_address

MANAGEMENT_MTU = 1500
TUN = Path("/dev/net/tun")
_TUNGETFEATURES = 0x800454CF  # linux/if_tun.h


def ensure(place: Place, management: IPv4Network, fabric: IPv4Network, fabric_mtu: int,
           tunnel: Tunnel | None = None) -> None:  # fmt: skip
    """Make both bridges, or complete what is there. RacklessError when the place has no room for them.

    With a `tunnel` they go on on other hosts; see `extend` for those.
    """
    place.prepare({MANAGEMENT: management, FABRIC: fabric})
    extend(place, fabric_mtu, tunnel)
    with place.netlink(f"address the management network of rack {place.rack}") as net:
        index = place.find(net, place.bridge(MANAGEMENT))
        wanted = (str(host_address(management)), management.prefixlen)
        present = {(a.get_attr("IFA_ADDRESS"), a["prefixlen"]) for a in net.get_addr(index=index, family=2)}
        for address, prefix in present - {wanted}:
            net.addr("delete", index=index, address=address, prefixlen=prefix)
        if wanted not in present:
            net.addr("add", index=index, address=wanted[0], prefixlen=wanted[1])


def extend(place: Place, fabric_mtu: int, tunnel: Tunnel | None) -> None:
    """Make both bridges with no address: all that a host needs on which the rack's own machine is not."""
    management_mtu = mtu_of_management(tunnel is not None)
    with place.netlink(f"make the bridges of rack {place.rack}") as net:
        for network, mtu in ((MANAGEMENT, management_mtu), (FABRIC, fabric_mtu)):
            name = place.bridge(network)
            index = place.find(net, name) or place.add(net, name)
            # No spanning tree: a port forwards at once. The MTU sticks only when set, not taken from ports.
            net.link("set", index=index, mtu=mtu, state="up", br_stp_state=0)
            if tunnel is None:
                vxlan.leave(net, name)
    if tunnel is not None:
        for network in (MANAGEMENT, FABRIC):
            vxlan.join(place, tunnel, network)


def mtu_of_management(spread: bool) -> int:
    """The largest packet of the management network; smaller when the rack is spread over hosts."""
    return vxlan.MANAGEMENT_MTU if spread else MANAGEMENT_MTU


def require_taps() -> None:
    """Raise RacklessError when this host cannot make the interfaces that blades plug into."""
    try:
        # Asking for the features tells the real device from something else that opens.
        with TUN.open("rb") as device:
            fcntl.ioctl(device, _TUNGETFEATURES, bytes(4))
    except OSError as error:
        raise RacklessError(f"{TUN} does not work: {error.strerror}",
                            hint="`modprobe tun`; in a container, hand the device in") from error  # fmt: skip
