"""The rack's two bridges: ``mgmt`` for SSH and control, never faulted, and ``fabric`` for Soft-RoCE."""

from __future__ import annotations

import fcntl
from ipaddress import IPv4Network
from pathlib import Path

from orchestrator.errors import RacklessError
from orchestrator.network.place import FABRIC, MANAGEMENT, Place
from orchestrator.spec import host_address

MANAGEMENT_MTU = 1500
TUN = Path("/dev/net/tun")
_TUNGETFEATURES = 0x800454CF  # linux/if_tun.h


def ensure(place: Place, management: IPv4Network, fabric: IPv4Network, fabric_mtu: int) -> None:
    """Make both bridges, or complete what is there. RacklessError when the place has no room for them."""
    place.prepare({MANAGEMENT: management, FABRIC: fabric})
    indexes: dict[str, int] = {}
    with place.netlink(f"make the bridges of rack {place.rack}") as net:
        for network, mtu in ((MANAGEMENT, MANAGEMENT_MTU), (FABRIC, fabric_mtu)):
            name = place.bridge(network)
            index = indexes[network] = place.find(net, name) or place.add(net, name)
            # No spanning tree: a port forwards at once. The MTU sticks only when set, not taken from ports.
            net.link("set", index=index, mtu=mtu, state="up", br_stp_state=0)
        index = indexes[MANAGEMENT]
        wanted = (str(host_address(management)), management.prefixlen)
        present = {(a.get_attr("IFA_ADDRESS"), a["prefixlen"]) for a in net.get_addr(index=index, family=2)}
        for address, prefix in present - {wanted}:
            net.addr("delete", index=index, address=address, prefixlen=prefix)
        if wanted not in present:
            net.addr("add", index=index, address=wanted[0], prefixlen=wanted[1])


def require_taps() -> None:
    """Raise RacklessError when this host cannot make the interfaces that blades plug into."""
    try:
        # Asking for the features tells the real device from something else that opens.
        with TUN.open("rb") as device:
            fcntl.ioctl(device, _TUNGETFEATURES, bytes(4))
    except OSError as error:
        raise RacklessError(f"{TUN} does not work: {error.strerror}",
                            hint="`modprobe tun`; in a container, hand the device in") from error  # fmt: skip
