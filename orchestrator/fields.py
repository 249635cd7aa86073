"""The types of single values in a rack file, with their limits: every number of a rack is checked here.

Quantities are written with their units ("512 MiB") and become plain numbers: bytes, seconds, bits per second,
fractions of one. Each error says what to write instead.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection
from ipaddress import IPv4Address, IPv4Network
from typing import Annotated, Any, Literal, get_args
from urllib.parse import parse_qs, urlsplit

from pydantic import AfterValidator, BeforeValidator, PlainSerializer, WithJsonSchema

from orchestrator import units
from orchestrator.units import Quantity, format_percent, format_size, shown

KIB, MIB, GIB, TIB = 1024, 1024**2, 1024**3, 1024**4

Kind = Literal["processor", "memory", "storage", "manager"]
KINDS: tuple[str, ...] = get_args(Kind)

MEMORY_MIN, MEMORY_MAX = 192 * MIB, TIB
PMEM_STEP = 16 * MIB
PMEM_MAX = 30 * GIB  # two devices of it, in the 64 GiB of addresses that hypervisor/domain.py keeps free for them
DISK_MIN, DISK_MAX = 64 * MIB, 64 * TIB
CPUS_MAX = 64
LATENCY_MAX_SECONDS = 10.0
CLOCK_MAX_SECONDS = 366 * 86400.0
MTU_MIN, MTU_MAX = 1400, 9000
"""The least still fits an RDMA MTU of 1024, and through VXLAN on Ethernet's 1500 bytes (1450)."""
MTU_FOR_4096 = 4200
"""An RDMA path MTU of 4096 needs this: the payload and the RoCE v2 headers, with room for the IP options."""
PREFIX_MIN, PREFIX_MAX = 16, 28

URI_EXAMPLE = '"qemu+ssh://root@192.168.1.5/system"'

_PRIVATE = tuple(IPv4Network(text) for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"))
_NAME = r"[a-z][a-z0-9-]{0,14}"
# Each is an Ansible group or means every blade on a command line.
_RESERVED_NAMES = {*KINDS, "all", "ungrouped", "localhost", "rack"}


def did_you_mean(word: str, known: Collection[str]) -> str:
    """The end of an error message about an unknown word: the nearest known one, and all of them."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    every = ", ".join(known)
    return f'did you mean "{near[0]}"? ({every})' if near else f"write one of {every}"


def _between(low: float, high: float, show: Callable[[Any], str]) -> AfterValidator:
    def check(value: Any) -> Any:
        if value < low:
            raise ValueError(f'"{show(value)}" is too small; write at least "{show(low)}"')
        if value > high:
            raise ValueError(f'"{show(value)}" is too large; write at most "{show(high)}"')
        return value

    return AfterValidator(check)


def _multiple_of(step: int) -> AfterValidator:
    def check(value: int) -> int:
        if value % step:
            up = format_size((value // step + 1) * step)
            raise ValueError(
                f'"{format_size(value)}" is not a multiple of {format_size(step)}; write for example "{up}"'
            )
        return value

    return AfterValidator(check)


def _count(low: int, high: int, what: str) -> tuple[BeforeValidator, WithJsonSchema]:
    def check(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{shown(value)} is not a number of {what}; write for example {low}")
        if not low <= value <= high:
            raise ValueError(f"{value} is outside {low} to {high} {what}; write for example {_clamp(value)}")
        return value

    def _clamp(value: int) -> int:
        return min(max(value, low), high)

    return BeforeValidator(check), WithJsonSchema({"type": "integer", "minimum": low, "maximum": high})


def _schema(quantity: Quantity) -> WithJsonSchema:
    return WithJsonSchema(
        {
            "type": "string",
            "title": quantity.noun,
            "pattern": quantity.pattern,
            "examples": [quantity.example],
        }
    )


def _name(what: str) -> BeforeValidator:
    def check(value: object) -> str:
        if not isinstance(value, str) or not re.fullmatch(_NAME, value):
            raise ValueError(
                f"{shown(value)} cannot name a {what}; write 1 to 15 of a-z, 0-9 and -, a letter first"
            )
        if value in _RESERVED_NAMES:
            raise ValueError(f'"{value}" has a meaning of its own; write for example "{value[0]}b0"')
        return value

    return BeforeValidator(check)


def _kind(value: object) -> object:
    if value not in KINDS:
        raise ValueError(f"{shown(value)} is not a kind of blade; {did_you_mean(str(value)[:40], KINDS)}")
    return value


def _image(value: object) -> object:
    if not isinstance(value, str) or not re.fullmatch(r"[a-z][a-z0-9.-]{0,31}", value):
        raise ValueError(f'{shown(value)} is not the name of an image or flavour; write for example "debian13"')
    return value


def _subnet(value: object) -> IPv4Network:
    if isinstance(value, IPv4Network):
        network = value
    else:
        try:
            network = IPv4Network(str(value).strip(), strict=False)
        except ValueError:
            raise ValueError(
                f'{shown(value)} is not an IPv4 subnet; write for example "10.77.0.0/24"'
            ) from None
        if "/" not in str(value) or str(network) != str(value).strip():
            raise ValueError(f'{shown(value)} is not written as a subnet; write "{_nearest(network)}"')
    if not any(network.subnet_of(private) for private in _PRIVATE):
        raise ValueError(
            f'"{network}" is not private; write one inside 10.0.0.0/8, 172.16.0.0/12 or 192.168.0.0/16'
        )
    if not PREFIX_MIN <= network.prefixlen <= PREFIX_MAX:
        raise ValueError(f'"{network}" is not a /{PREFIX_MIN} to /{PREFIX_MAX}; write "{_nearest(network)}"')
    return network


def _address(value: object) -> IPv4Address:
    try:
        address = value if isinstance(value, IPv4Address) else IPv4Address(str(value).strip())
    except ValueError:
        raise ValueError(f'{shown(value)} is not an IPv4 address; write for example "192.168.1.5"') from None
    if address.is_unspecified or address.is_loopback or address.is_multicast:
        raise ValueError(f'"{address}" is no address that other hosts reach; write for example "192.168.1.5"')
    return address


def _uri(value: object) -> str:
    """A libvirt that may use bridges and limit CPUs, of another host: by SSH, or by its socket on this machine."""
    text = str(value)
    try:
        parts = urlsplit(text)
        by_ssh = parts.scheme == "qemu+ssh" and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:  # such as a port that is no number
        raise ValueError(f"{shown(value)} is not a libvirt URI; write for example {URI_EXAMPLE}") from None
    words = parse_qs(parts.query)
    socket = words.get("socket", [""])[0]
    by_socket = parts.scheme in ("qemu", "qemu+unix") and not parts.netloc and socket.startswith("/")
    if not isinstance(value, str) or not (by_ssh or by_socket):
        raise ValueError(f"{shown(value)} is not the libvirt of another host; write for example {URI_EXAMPLE}")
    if parts.path != "/system":
        raise ValueError(f"{shown(value)} may not limit CPUs nor use bridges; write a URI of /system")
    known = ("command", "keyfile") if by_ssh else ("socket",)
    for word in words:
        if word not in known:
            raise ValueError(f'"{word}" is not known in the URI of such a host; {did_you_mean(word, known)}')
    return text


def _nearest(network: IPv4Network) -> IPv4Network:
    """A subnet of an allowed size at the same address."""
    prefix = min(max(network.prefixlen, PREFIX_MIN), PREFIX_MAX)
    if network.prefixlen == 32:
        prefix = 24  # an address without a prefix: the usual size is meant
    return IPv4Network((network.network_address, prefix), strict=False)


def _unit(
    parse: Callable[[object], Any], format_: Callable[[Any], str], quantity: Quantity
) -> tuple[BeforeValidator, PlainSerializer, WithJsonSchema]:
    return (
        BeforeValidator(parse),
        PlainSerializer(format_, return_type=str, when_used="json"),
        _schema(quantity),
    )


RackName = Annotated[str, _name("rack"), WithJsonSchema({"type": "string", "pattern": f"^{_NAME}$"})]
BladeName = Annotated[str, _name("blade"), WithJsonSchema({"type": "string", "pattern": f"^{_NAME}$"})]
SnapshotName = Annotated[str, _name("snapshot")]
HostName = Annotated[str, _name("host"), WithJsonSchema({"type": "string", "pattern": f"^{_NAME}$"})]
HostUri = Annotated[str, BeforeValidator(_uri)]
HostAddress = Annotated[
    IPv4Address,
    BeforeValidator(_address),
    PlainSerializer(str, return_type=str, when_used="json"),
    WithJsonSchema({"type": "string", "pattern": r"^[0-9]+\.[0-9]+\.[0-9]+\.[0-9]+$"}),
]
Subnet = Annotated[
    IPv4Network,
    BeforeValidator(_subnet),
    PlainSerializer(str, return_type=str, when_used="json"),
    WithJsonSchema({"type": "string", "pattern": r"^[0-9]+\.[0-9]+\.[0-9]+\.[0-9]+/(1[6-9]|2[0-8])$"}),
]
Size = Annotated[int, *_unit(units.parse_size, units.format_size, units.SIZE)]
Duration = Annotated[float, *_unit(units.parse_duration, units.format_duration, units.DURATION)]
Bandwidth = Annotated[int, *_unit(units.parse_bandwidth, units.format_bandwidth, units.BANDWIDTH)]
ByteRate = Annotated[int, *_unit(units.parse_byte_rate, units.format_byte_rate, units.BYTE_RATE)]
Percent = Annotated[float, *_unit(units.parse_percent, units.format_percent, units.PERCENT)]

Memory = Annotated[Size, _between(MEMORY_MIN, MEMORY_MAX, format_size), _multiple_of(MIB)]
Excache = Annotated[Size, _between(MIB, MEMORY_MAX, format_size), _multiple_of(MIB)]
Pmem = Annotated[Size, _between(PMEM_STEP, PMEM_MAX, format_size), _multiple_of(PMEM_STEP)]
DiskSize = Annotated[Size, _between(DISK_MIN, DISK_MAX, format_size), _multiple_of(MIB)]
DiskRate = Annotated[ByteRate, _between(64 * KIB, TIB, units.format_byte_rate)]
Quota = Annotated[Percent, _between(0.01, 1.0, format_percent)]
Loss = Annotated[Percent, _between(0.0, 0.99, format_percent)]
Share = Annotated[Percent, _between(0.0, 1.0, format_percent)]
Latency = Annotated[Duration, _between(0.0, LATENCY_MAX_SECONDS, units.format_duration)]
DiskLatency = Annotated[Duration, _between(0.001, LATENCY_MAX_SECONDS, units.format_duration)]
ClockOffset = Annotated[
    float, BeforeValidator(units.parse_offset), PlainSerializer(units.format_offset, return_type=str, when_used="json"),
    _between(-CLOCK_MAX_SECONDS, CLOCK_MAX_SECONDS, units.format_offset),
]  # fmt: skip
Heartbeat = Annotated[Duration, _between(0.1, 60.0, units.format_duration)]
Patience = Annotated[Duration, _between(1.0, 600.0, units.format_duration)]
LinkRate = Annotated[Bandwidth, _between(64_000, 400_000_000_000, units.format_bandwidth)]

Cpus = Annotated[int, *_count(1, CPUS_MAX, "CPUs")]
Mtu = Annotated[int, *_count(MTU_MIN, MTU_MAX, "bytes")]
Iops = Annotated[int, *_count(1, 10_000_000, "operations per second")]
BladeKind = Annotated[Kind, BeforeValidator(_kind)]
ImageName = Annotated[str, BeforeValidator(_image)]
