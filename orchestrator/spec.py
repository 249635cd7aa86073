"""Everything a running blade is made of, and what must happen to it when that changes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cache
from ipaddress import IPv4Address, IPv4Network
from typing import Any, NamedTuple

from pydantic import ConfigDict, TypeAdapter, ValidationError

from orchestrator.fields import Excache, Kind, Memory, Pmem, Quota
from orchestrator.model import Disk, Link, Membership, Rack, blade_capacity, first_host

LIVE_FIELDS = frozenset({"cpu_quota", "excache", "link", "membership", "disk.iops", "disk.bandwidth"})
"""What can change while a blade runs; every other change makes the blade anew."""

_IMAGE_CHARACTERS = 12
"""An image's key is a long hash: its beginning tells two apart."""


@dataclass(frozen=True)
class BladeSpec:
    """One blade, complete: two blades with equal specs are the same blade.

    Sizes are bytes and `cpu_quota` is a fraction of each CPU, as in model.Blade.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    rack: str
    name: str
    kind: Kind
    index: int
    """Place in the rack, from 0: both addresses follow from it, and it stays while the blade lives."""
    image: str
    """Key of the built image (a content hash), not the recipe's name."""
    cpus: int
    memory: Memory
    mgmt_address: str
    mgmt_prefix: int
    mgmt_mac: str
    fabric_address: str
    fabric_prefix: int
    fabric_mac: str
    fabric_mtu: int
    cpu_quota: Quota | None = None
    excache: Excache | None = None
    pmem: Pmem | None = None
    disk: Disk | None = None
    link: Link = field(default_factory=Link)
    host: str | None = None
    """The other host that it is on, by its name in the rack file; None on this machine."""
    membership: Membership = field(default_factory=Membership)

    def to_json(self) -> dict[str, Any]:
        """As JSON values, units written out; `from_json` reads it back exactly."""
        data: dict[str, Any] = _adapter().dump_python(self, mode="json")
        if self.host is None:
            del data["host"]  # as always, on one host
        return data

    @staticmethod
    def from_json(data: object) -> BladeSpec:
        """Read what `to_json` wrote. Raises ValueError when another version of Rackless wrote it."""
        try:
            return _adapter().validate_python(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "all of it"
            raise ValueError(f"not a blade's description: {where}: {first['msg']}") from None

    def digest(self) -> str:
        """A short hash of everything above, the same in every process."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Change(NamedTuple):
    """One field that differs between two specs, in the words of the rack file."""

    field: str
    old: str
    new: str

    @property
    def live(self) -> bool:
        return self.field in LIVE_FIELDS or self.field.split(".")[0] in LIVE_FIELDS

    def __str__(self) -> str:
        return f"{self.field} {self.old} -> {self.new}"


def make_spec(rack: Rack, name: str, index: int, image_key: str, host: str | None = None) -> BladeSpec:
    """What blade `name` of the rack should be, at place `index`; `host` is that of placement.py."""
    blade = rack.blades[name]
    return BladeSpec(
        rack=rack.name,
        name=name,
        kind=blade.kind,
        index=index,
        image=image_key,
        cpus=blade.cpus,
        memory=blade.memory,
        mgmt_address=str(blade_address(rack.management.subnet, index)),
        mgmt_prefix=rack.management.subnet.prefixlen,
        mgmt_mac=mac_address(rack.name, name, "management"),
        fabric_address=str(blade_address(rack.fabric.subnet, index)),
        fabric_prefix=rack.fabric.subnet.prefixlen,
        fabric_mac=mac_address(rack.name, name, "fabric"),
        fabric_mtu=rack.fabric.mtu,
        cpu_quota=blade.cpu_quota,
        excache=blade.excache,
        pmem=blade.pmem,
        disk=blade.disk,
        link=rack.link(name),
        membership=rack.membership,
        host=host,
    )


def changes(old: BladeSpec, new: BladeSpec) -> tuple[Change, ...]:
    """Every field that differs, nested ones by their path ("disk.iops", "link.latency")."""
    before, after = _flat(old), _flat(new)
    return tuple(
        Change(path, _shown(path, before), _shown(path, after))
        for path in dict.fromkeys([*before, *after])
        if before.get(path) != after.get(path)
    )


def blade_address(subnet: IPv4Network, index: int) -> IPv4Address:
    """Address of the blade with this index in a subnet (see model.first_host)."""
    if not 0 <= index < blade_capacity(subnet):
        raise ValueError(f"{subnet} has no address for a blade with index {index}")
    return subnet[first_host(subnet) + index]


def host_address(subnet: IPv4Network) -> IPv4Address:
    """Address of the host's side of a subnet's bridge: the last one a host may have."""
    return subnet[-2]


def mac_address(rack: str, blade: str, network: str) -> str:
    """A locally administered unicast MAC that belongs to this blade and network for ever."""
    octets = bytearray(hashlib.sha256(f"{rack}/{blade}/{network}".encode()).digest()[:6])
    octets[0] = octets[0] & 0xFC | 0x02
    # libvirt refuses fe:*, which it keeps for the host's ends of taps.
    if octets[0] == 0xFE:
        octets[0] = 0xFA
    return octets.hex(":")


@cache
def _adapter() -> TypeAdapter[BladeSpec]:
    return TypeAdapter(BladeSpec)


def _flat(spec: BladeSpec) -> dict[str, str]:
    """The spec's fields as text, nested ones by their path; what is not set is left out."""
    flat: dict[str, str] = {}

    def visit(path: str, value: object) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                visit(f"{path}.{key}" if path else key, inner)
        elif value is not None:
            flat[path] = str(value)

    visit("", spec.to_json())
    return flat


def _shown(path: str, flat: dict[str, str]) -> str:
    text = flat.get(path, "this machine" if path == "host" else "none")
    return text[:_IMAGE_CHARACTERS] if path == "image" else text
