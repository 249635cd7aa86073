"""The rack's two bridges: ``mgmt`` for SSH and control, never faulted, and ``fabric`` for Soft-RoCE."""

from __future__ import annotations

import fcntl
from ipaddress import IPv4Network
from pathlib import Path

from pyroute2 import NetNS, netns

from orchestrator.errors import RacklessError
from orchestrator.network import namespace
from orchestrator.spec import host_address

MANAGEMENT = "mgmt"
FABRIC = "fabric"
MANAGEMENT_MTU = 1500
TUN = Path("/dev/net/tun")
_TUNGETFEATURES = 0x800454CF  # linux/if_tun.h


def ensure(rack: str, management: IPv4Network, fabric_mtu: int) -> None:
    """Make the namespace and both bridges, or complete what is there."""
    name = namespace.name_of(rack)
    if not namespace.exists(rack):
        (namespace.NAMED / name).unlink(missing_ok=True)
        netns.create(name)
    with NetNS(name) as net:
        net.link("set", index=net.link_lookup(ifname="lo")[0], state="up")
        for bridge, mtu in ((MANAGEMENT, MANAGEMENT_MTU), (FABRIC, fabric_mtu)):
            if not net.link_lookup(ifname=bridge):
                net.link("add", ifname=bridge, kind="bridge")
            # No spanning tree: a port forwards at once. The MTU sticks only when set, not taken from ports.
            net.link("set", index=net.link_lookup(ifname=bridge)[0], mtu=mtu, state="up", br_stp_state=0)
        index = net.link_lookup(ifname=MANAGEMENT)[0]
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


def remove(rack: str) -> None:
    """Remove the namespace and with it all that is in it; nothing when there is none."""
    if namespace.exists(rack):
        netns.remove(namespace.name_of(rack))
    (namespace.NAMED / namespace.name_of(rack)).unlink(missing_ok=True)
