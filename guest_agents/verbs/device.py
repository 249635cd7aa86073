"""The blade's RDMA device: Soft-RoCE `rxe0`, its protection domain and the GID by which peers reach it."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import Any

from pyverbs.addr import GID
from pyverbs.device import Context
from pyverbs.pd import PD


class VerbsError(Exception):
    """RDMA failed: one line, and what to look at."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


PORT = 1


@dataclass(frozen=True)
class Device:
    """An open device. Everything made from it must be closed before it."""

    context: Any
    pd: Any
    gid: str
    """As an IPv6 address, for example ::ffff:10.77.0.2."""
    gid_index: int
    mtu: int
    """Active path MTU as the verbs enumeration: 5 is 4096 bytes."""

    def close(self) -> None:
        """Close the protection domain and the device."""
        self.pd.close()
        self.context.close()


def parse_gid(text: str) -> Any:
    """A GID object of a GID in any IPv6 notation; pyverbs itself wants eight groups of four digits."""
    return GID(IPv6Address(text).packed.hex(":", 2))  # not .exploded: Python 3.13 ends mapped ones in dotted decimals


def open_device(name: str = "rxe0") -> Device:
    """Open `name`; the GID is the IPv4-mapped one, because RoCE v2 routes by IP address."""
    try:
        context = Context(name=name)
        port = context.query_port(PORT)
    except Exception as failure:
        raise VerbsError(f"no RDMA device {name}: {failure}", "is rdma_rxe loaded, and the link added?") from failure
    for index in range(port.gid_tbl_len):
        gid = IPv6Address(str(context.query_gid(PORT, index)))
        if gid.ipv4_mapped is not None:
            return Device(context, PD(context), str(gid), index, int(port.active_mtu))
    raise VerbsError(f"{name} has no IPv4 GID", "does the fabric interface have its address?")
