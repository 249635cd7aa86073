"""What a rack file may say, as types.

`Rack.model_validate(data)` takes what a rack file holds, units written out, and gives plain numbers (see
fields.py); `Rack.model_dump(mode="json")` writes the units again, so it can be loaded back.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from ipaddress import IPv4Network
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from orchestrator.fields import (
    MIB,
    MTU_FOR_4096,
    PREFIX_MAX,
    PREFIX_MIN,
    BladeKind,
    BladeName,
    Cpus,
    DiskRate,
    DiskSize,
    Excache,
    Heartbeat,
    HostAddress,
    HostName,
    HostUri,
    ImageName,
    Iops,
    Latency,
    LinkRate,
    Loss,
    Memory,
    Mtu,
    Patience,
    Pmem,
    Quota,
    RackName,
    Subnet,
    did_you_mean,
)
from orchestrator.units import format_duration, format_size

_USUAL_SUBNETS = tuple(IPv4Network(text) for text in ("10.78.0.0/24", "10.79.0.0/24", "192.168.78.0/24"))


class Problem(NamedTuple):
    """One thing that is wrong with a rack, and where: path ("blades", "sb0", "disk")."""

    path: tuple[str, ...]
    message: str


class ProblemsError(ValueError):
    """Several problems found by one check."""

    def __init__(self, problems: Collection[Problem]) -> None:
        super().__init__("; ".join(f"{'.'.join(problem.path)}: {problem.message}" for problem in problems))
        self.problems = tuple(problems)


class _Part(BaseModel):
    # Built when it is used: `status` reads no rack file by its name, and is to be quick.
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class Fabric(_Part):
    """The Soft-RoCE network between the blades."""

    subnet: Subnet = Field(
        default=IPv4Network("10.77.0.0/24"), description="Addresses of the blades on the fabric."
    )
    mtu: Mtu = Field(
        default=9000, description=f"Largest packet in bytes; below {MTU_FOR_4096} RDMA's own MTU shrinks."
    )


class Management(_Part):
    """The network for SSH and the agents' control channel; no link or fault touches it."""

    subnet: Subnet = Field(
        default=IPv4Network("10.78.0.0/24"), description="Addresses for SSH; the last is the host's."
    )


class Membership(_Part):
    """How the manager tells that a blade is dead."""

    heartbeat: Heartbeat = Field(
        default=1.0,
        description="How often a blade tells the manager that it is alive.",
        examples=["1 s"],
        json_schema_extra={"default": "1 s"},
    )
    dead_after: Patience = Field(
        default=10.0,
        description="A blade that is silent this long is dead, for good: it may join anew, with nothing it had.",
        examples=["10 s"],
        json_schema_extra={"default": "10 s"},
    )

    @field_validator("dead_after")
    @classmethod
    def _some_beats(cls, dead_after: float, info: ValidationInfo) -> float:
        heartbeat = info.data.get("heartbeat")
        if heartbeat is not None and dead_after < 3 * heartbeat:
            raise ValueError(
                f'"{format_duration(dead_after)}" is less than three heartbeats;'
                f' write at least "{format_duration(3 * heartbeat)}", or a shorter heartbeat'
            )
        return dead_after


class Disk(_Part):
    """The disk of a storage blade."""

    size: DiskSize = Field(description="Capacity. Changing it makes a new, empty disk.", examples=["2 GiB"])
    iops: Iops | None = Field(
        default=None,
        description="Most reads and writes per second; without it there is no limit.",
        examples=[2000],
    )
    bandwidth: DiskRate | None = Field(
        default=None,
        description="Most bytes per second; without it there is no limit.",
        examples=["100 MiB/s"],
    )


class Link(_Part):
    """How good a blade's connection to the fabric is, in each direction."""

    latency: Latency = Field(
        default=0.0,
        description="Added to every packet, one way; up to 10 s.",
        examples=["50 us"],
        json_schema_extra={"default": "0 us"},
    )
    jitter: Latency = Field(
        default=0.0,
        description="How far the latency varies either way.",
        examples=["10 us"],
        json_schema_extra={"default": "0 us"},
    )
    bandwidth: LinkRate | None = Field(
        default=None, description="Most bits per second; without it there is no limit.", examples=["1 Gbit/s"]
    )
    loss: Loss = Field(
        default=0.0,
        description="Packets lost, at random; below 100 %.",
        examples=["0.1 %"],
        json_schema_extra={"default": "0 %"},
    )

    @field_validator("jitter")
    @classmethod
    def _jitter_within_latency(cls, jitter: float, info: ValidationInfo) -> float:
        latency = info.data.get("latency")
        if latency is not None and jitter > latency:
            raise ValueError(
                f'"{format_duration(jitter)}" is more than the latency;'
                f' write at most "{format_duration(latency)}", or a longer latency'
            )
        return jitter


class Host(_Part):
    """A machine that blades can be on: this one, or another whose libvirt can be reached. See hosts.md."""

    uri: HostUri | None = Field(
        default=None,
        description="Its libvirt. Exactly one host has none: this machine.",
        examples=["qemu+ssh://root@192.168.1.5/system"],
    )
    address: HostAddress = Field(
        description="Its own address, at which the other hosts reach it: the fabric crosses to them by VXLAN.",
        examples=["192.168.1.5"],
    )
    rackless: str = Field(
        default="rackless",
        min_length=1,
        description="The command there, of the same version: a name in its PATH, or a path.",
        json_schema_extra={"default": "rackless"},
    )


def _needs_disk(schema: dict[str, Any]) -> None:
    """Tell editors too that storage blades, and only those, have a disk."""
    storage = {"properties": {"kind": {"const": "storage"}}, "required": ["kind"]}
    schema["if"] = storage
    schema["then"] = {"required": ["disk"]}
    schema["else"] = {"properties": {"disk": False}}


class Blade(_Part):
    """One virtual machine of the rack."""

    model_config = ConfigDict(json_schema_extra=_needs_disk)

    kind: BladeKind = Field(
        description="What the blade is; its agent makes it that component of the rack.",
        examples=["memory"],
    )
    host: HostName | None = Field(
        default=None,
        description="The one of `hosts` that it is on; without it, it goes where there is room.",
        examples=["far"],
    )
    cpus: Cpus = Field(default=1, description="Virtual CPUs.")
    cpu_quota: Quota | None = Field(
        default=None,
        description="Share of each of its CPUs that the blade may use, once it is ready.",
        examples=["50 %"],
    )
    memory: Memory = Field(description="Memory of the virtual machine.", examples=["512 MiB"])
    excache: Excache | None = Field(
        default=None,
        description="Processor blades: how much of `memory` caches pages of memory blades (ExCache).",
        examples=["64 MiB"],
    )
    pmem: Pmem | None = Field(
        default=None,
        description="Memory blades: persistent memory beside `memory`; what was persisted survives power loss. "
        "The blade's kernel keeps 2 MiB of it, and 1/64 of its size in `memory`.",
        examples=["128 MiB"],
    )
    disk: Disk | None = Field(default=None, description="Storage blades: their disk.", validate_default=True)

    # These look at fields above their own, and are skipped for what those got wrong: no error hides another.

    @field_validator("excache")
    @classmethod
    def _excache_fits(cls, excache: int | None, info: ValidationInfo) -> int | None:
        kind, memory = info.data.get("kind"), info.data.get("memory")
        if excache is None:
            return None
        if kind not in (None, "processor"):
            raise ValueError(f"a {kind} blade has no ExCache; remove this line, or write kind: processor")
        if memory is not None and excache >= memory:
            raise ValueError(
                f'"{format_size(excache)}" is not less than the blade\'s memory;'
                f' write for example "{format_size(max(memory // 4 // MIB, 1) * MIB)}"'
            )
        return excache

    @field_validator("pmem")
    @classmethod
    def _pmem_on_memory_blades(cls, pmem: int | None, info: ValidationInfo) -> int | None:
        kind = info.data.get("kind")
        if pmem is not None and kind not in (None, "memory"):
            raise ValueError(f"a {kind} blade has no pmem; remove this line, or write kind: memory")
        return pmem

    @field_validator("disk")
    @classmethod
    def _disk_on_storage_blades(cls, disk: Disk | None, info: ValidationInfo) -> Disk | None:
        kind = info.data.get("kind")
        if disk is None and kind == "storage":
            raise ValueError("a storage blade needs a disk; write for example disk: {size: 2 GiB}")
        if disk is not None and kind not in (None, "storage"):
            raise ValueError(f"a {kind} blade has no disk; remove this line, or write kind: storage")
        return disk


class Rack(_Part):
    """A rack: its blades, in the order of the file, and what connects them."""

    name: RackName = Field(description="Name of the rack: 1 to 15 of a-z, 0-9 and -.", examples=["demo"])
    image: ImageName = Field(
        default="debian13", description="Recipe in images/ of the blades' root file system."
    )
    flavour: ImageName = Field(default="blade", description="Flavour of that recipe, such as `lab` with debuggers.")
    fabric: Fabric = Field(default=Fabric(), description="The network that RDMA runs on.")
    management: Management = Field(default=Management(), description="The network for SSH and control.")
    membership: Membership = Field(default=Membership(), description="How a dead blade is noticed.")
    hosts: dict[HostName, Host] = Field(
        default={},
        description="The machines that the rack is spread over; without it, it is on this one.",
        json_schema_extra={"additionalProperties": False},
    )
    blades: dict[BladeName, Blade] = Field(
        description="The blades by name; at least one is a manager.",
        examples=[{"gm0": {"kind": "manager", "memory": "256 MiB"}}],
        json_schema_extra={"additionalProperties": False},
    )
    links: dict[BladeName, Link] = Field(
        default={},
        description="Links that are worse than the host's own, by the name of their blade.",
        json_schema_extra={"additionalProperties": False},
    )

    def link(self, blade: str) -> Link:
        """The link of a blade, whether or not the file mentions one."""
        return self.links.get(blade, Link())

    @property
    def home(self) -> str | None:
        """The host that is this machine; None when the rack has no hosts."""
        return next((name for name, host in self.hosts.items() if host.uri is None), None)

    @property
    def far(self) -> dict[str, Host]:
        """The hosts that are not this machine."""
        return {name: host for name, host in self.hosts.items() if host.uri is not None}

    @model_validator(mode="after")
    def _whole_rack(self) -> Rack:
        kinds = {name: blade.kind for name, blade in self.blades.items()}
        pins = {name: blade.host for name, blade in self.blades.items() if blade.host is not None}
        problems = rack_problems(kinds, self.links, self.fabric.subnet, self.management.subnet)
        problems += host_problems({name: host.uri for name, host in self.hosts.items()}, pins)
        problems += address_problems({name: str(host.address) for name, host in self.hosts.items()})
        if problems:
            raise ProblemsError(problems)
        return self


def rack_problems(
    kinds: Mapping[str, str],
    links: Collection[str],
    fabric: IPv4Network | None,
    management: IPv4Network | None,
) -> list[Problem]:
    """What is wrong between the parts of a rack; a None is a part whose own problem is already known."""
    problems = []
    if "manager" not in kinds.values():
        problems.append(
            Problem(("blades",), "there is no manager; add for example gm0: {kind: manager, memory: 256 MiB}")
        )
    for name in links:
        if name not in kinds:
            message = f'no blade is named "{name}"; {did_you_mean(name, [*kinds])}'
            problems.append(Problem(("links", name), message))
    if fabric is not None and management is not None and fabric.overlaps(management):
        free = next(subnet for subnet in _USUAL_SUBNETS if not subnet.overlaps(fabric))
        advice = f"write for example management: {{subnet: {free}}}"
        message = f'"{management}" overlaps the fabric\'s {fabric}; {advice}'
        problems.append(Problem(("management", "subnet"), message))
    for part, subnet in (("fabric", fabric), ("management", management)):
        if subnet is not None and len(kinds) > blade_capacity(subnet):
            room = blade_capacity(subnet)
            message = f'"{subnet}" has room for {room} blades, not {len(kinds)}; {_wider(subnet, len(kinds))}'
            problems.append(Problem((part, "subnet"), message))
    return problems


def host_problems(uris: Mapping[str, str | None], pins: Mapping[str, str]) -> list[Problem]:
    """What is wrong between hosts (their URIs by name) and the blades pinned to them (hosts by blade)."""
    problems = []
    here = [name for name, uri in uris.items() if uri is None]
    if uris and not here:
        problems.append(Problem(("hosts",), "none is this machine; add one without a uri, as here: {address: ...}"))
    for name in here[1:]:
        problems.append(Problem(("hosts", name), f'it has no uri, and "{here[0]}" is this machine; write its uri'))
    for name, uri in uris.items():
        first = next(other for other, theirs in uris.items() if theirs == uri)
        if uri is not None and first != name:
            problems.append(Problem(("hosts", name, "uri"), f'it is that of "{first}"; write its own, or remove it'))
    for blade, host in pins.items():
        if host not in uris:
            advice = did_you_mean(host, [*uris]) if uris else "add hosts: with it, or remove this line"
            problems.append(Problem(("blades", blade, "host"), f'no host is named "{host}"; {advice}'))
    return problems


def address_problems(addresses: Mapping[str, str]) -> list[Problem]:
    """Hosts (their addresses by name) that would be taken for each other."""
    problems = []
    for name, address in addresses.items():
        first = next(other for other, theirs in addresses.items() if theirs == address)
        if first != name:
            problems.append(Problem(("hosts", name, "address"), f'it is that of "{first}"; write its own'))
    return problems


def first_host(subnet: IPv4Network) -> int:
    """Host number of the blade with index 0: 10 where there is room, so that low addresses stay free."""
    return 10 if subnet.num_addresses >= 256 else 1


def blade_capacity(subnet: IPv4Network) -> int:
    """Blades a subnet has addresses for: its last host number belongs to the bridge."""
    return subnet.num_addresses - 2 - first_host(subnet)


def _wider(subnet: IPv4Network, blades: int) -> str:
    for prefix in range(PREFIX_MAX, PREFIX_MIN - 1, -1):
        wider = IPv4Network((subnet.network_address, prefix), strict=False)
        if blade_capacity(wider) >= blades:
            return f'write "{wider}"'
    return f"write fewer blades: a /{PREFIX_MIN} is the widest"


def warnings(rack: Rack) -> tuple[str, ...]:
    """What is allowed but probably not meant."""
    if rack.fabric.mtu < MTU_FOR_4096:
        return (
            f"fabric.mtu {rack.fabric.mtu} keeps RDMA packets below 4096 bytes;"
            f" write {MTU_FOR_4096} or more for the full RDMA MTU",
        )
    return ()
