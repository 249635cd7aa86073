"""What can be broken of a blade, as types: which faults it has, what they make of its link, what contradicts.

Pure: nothing here looks at a blade. Values are written with units, as in a rack file; in Python they are seconds,
fractions of one, bits per second and bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from orchestrator.errors import RacklessError
from orchestrator.fields import (
    BladeName,
    ClockOffset,
    DiskLatency,
    Latency,
    LinkRate,
    Loss,
    Quota,
    Share,
    Size,
    did_you_mean,
)
from orchestrator.model import Link
from orchestrator.spec import BladeSpec


def _some(value: Any) -> Any:
    if not value:
        raise ValueError("it is nothing; write more, or heal the fault")
    return value


_Some = AfterValidator(_some)


class Faults(BaseModel):
    """The faults of one blade; each is None (or empty, or false) when it is not there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    killed: bool = Field(default=False, description="Its power is off.")
    survive: Share | None = Field(default=None, description="Killed: what was stored to its pmem and not persisted "
                                  "survives with this probability.")  # fmt: skip
    seed: int | None = Field(default=None, ge=0, description="Killed: for what of that survives.")
    paused: bool = Field(default=False, description="Its CPUs stand still.")
    down: bool = Field(default=False, description="Its cable to the fabric is pulled.")
    side: int | None = Field(default=None, ge=0, description="Its side of a partition; 0 is the manager's.")
    deaf_to: tuple[BladeName, ...] = Field(default=(), description="Packets of these blades do not reach it.")
    latency: Annotated[Latency, _Some] | None = Field(default=None, description="Added to what it sends.")
    jitter: Annotated[Latency, _Some] | None = Field(default=None, description="How far that varies.")
    loss: Annotated[Loss, _Some] | None = Field(default=None, description="Packets it sends that are lost.")
    corruption: Annotated[Loss, _Some] | None = Field(default=None, description="Packets with a wrong bit.")
    duplication: Annotated[Loss, _Some] | None = Field(default=None, description="Packets that are sent twice.")
    bandwidth: LinkRate | None = Field(default=None, description="Most it sends, and most it gets.")
    cpu: Quota | None = Field(default=None, description="Share of each of its CPUs that is left.")
    memory: Annotated[Size, _Some] | None = Field(default=None, description="Memory taken from it.")
    disk_latency: DiskLatency | None = Field(default=None, description="Added to each operation of its data disk.")
    disk_errors: Literal["reads", "writes", "all"] | None = Field(default=None, description="What its disk refuses.")
    disk_full: bool = Field(default=False, description="All room of its data disk is taken.")
    clock: Annotated[ClockOffset, _Some] | None = Field(default=None, description="Its wall clock is set off by that.")

    def to_json(self) -> dict[str, Any]:
        """Only the faults that are there, units written out."""
        return self.model_dump(mode="json", exclude_defaults=True)

    def __bool__(self) -> bool:
        return self != Faults()

    @property
    def names(self) -> tuple[str, ...]:
        """The faults that are there."""
        return tuple(self.model_dump(exclude_defaults=True))

    def shown(self) -> list[str]:
        """Each fault in a word or two: "paused", "latency 20 ms"."""
        words = []
        for name, value in self.to_json().items():
            text = ",".join(value) if isinstance(value, list) else str(value)
            words.append(name.replace("_", " ") if value is True else f"{name.replace('_', ' ')} {text}")
        return words

    def having(self, **changes: Any) -> Faults:
        """These faults with others added or replaced. Raises RacklessError on a value that cannot be."""
        try:
            return Faults.model_validate({**self.to_json(), **changes})
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"][:1]) or "killed"
            message = first["msg"].removeprefix("Value error, ")
            raise RacklessError(f"fault {name}: {message}", hint="see `rackless fault --help`") from None

    def without(self, *names: str) -> Faults:
        """These faults but the named ones; all gone when none is named."""
        names = (*names, *POWER) if "killed" in names else names
        return Faults.model_validate({n: v for n, v in self.to_json().items() if names and n not in names})

    @model_validator(mode="after")
    def _says_how_only_if_killed(self) -> Faults:
        if not self.killed and (self.survive is not None or self.seed is not None):
            raise ValueError("only what is killed has lines that survive it")
        return self


NAMES = tuple(Faults.model_fields)
POWER = ("survive", "seed")
"""How a blade was killed."""
LINK = ("latency", "jitter", "loss", "corruption", "duplication", "bandwidth", "deaf_to")
"""Faults that are made in the blade's own kernel and on its tap."""
DISK = ("disk_latency", "disk_errors", "disk_full")
INSIDE = (*LINK, *DISK, "memory", "clock")
"""Faults for which the blade's agent is needed."""


def of(state: str, metadata: Mapping[str, Any]) -> Faults:
    """The faults of a blade: those its metadata tell, and whether libvirt says that it is off or stands still."""
    try:
        known = Faults.model_validate(metadata.get("faults") or {})
    except ValidationError:
        known = Faults()  # of another version of Rackless
    ready = bool(metadata.get("ready"))  # one that is being restored stands still, too
    if state != "off":
        known = known.without("killed")
    return known.having(killed=ready and state == "off", paused=ready and state == "paused")


def check_names(names: tuple[str, ...]) -> None:
    """Raise RacklessError for a name that no fault has."""
    for name in names:
        if name not in NAMES:
            raise RacklessError(f"no fault is called {name}", hint=did_you_mean(name, NAMES))


def link_fields(spec: BladeSpec, faults: Faults, addresses: Mapping[str, str]) -> dict[str, Any]:
    """What the blade's own kernel makes of its link: seconds, fractions, bit/s, fabric addresses it does not hear.

    A fault makes a link worse and never better: latencies add up, the smaller bandwidth counts, a packet that one
    of two losses spares may be lost by the other.
    """
    link: Link = spec.link
    return {
        "latency": link.latency + (faults.latency or 0.0),
        "jitter": link.jitter + (faults.jitter or 0.0),
        "loss": 1 - (1 - link.loss) * (1 - (faults.loss or 0.0)),
        "bandwidth": bandwidth(spec, faults),
        "corruption": faults.corruption or 0.0,
        "duplication": faults.duplication or 0.0,
        "deaf_to": [addresses[name] for name in faults.deaf_to if name in addresses],
    }


def bandwidth(spec: BladeSpec, faults: Faults) -> int | None:
    """Most bit/s of the blade's link, both ways; None without a limit."""
    return min((rate for rate in (spec.link.bandwidth, faults.bandwidth) if rate), default=None)


def quota(spec: BladeSpec, faults: Faults) -> float | None:
    """Share of each CPU that the blade has; None without a limit."""
    return min((share for share in (spec.cpu_quota, faults.cpu) if share), default=None)


def disk_fields(faults: Faults) -> dict[str, Any]:
    """What the blade's agent makes of its data disk, without what is as it should be; latency in seconds."""
    wanted = {"latency": faults.disk_latency, "errors": faults.disk_errors, "full": faults.disk_full}
    return {name: value for name, value in wanted.items() if value}


def shuts_files(old: Faults, new: Faults) -> bool:
    """Is a disk healed that refused operations? Its file system has given up by then: only a power cycle helps."""
    return bool(old.disk_errors and not new.disk_errors)


def check(name: str, old: Faults, new: Faults, spec: BladeSpec) -> None:
    """Refuse faults of blade `name` that contradict each other, or that would do nothing. Raises RacklessError."""
    added = {fault for fault, value in new.to_json().items() if old.to_json().get(fault) != value}
    if old.killed and added - {"killed", "side"}:  # its side it takes when it is back
        raise RacklessError(f"{name} is killed: nothing else can be broken of it", hint=f"`rackless heal {name}` first")
    if not spec.pmem and added & set(POWER):
        raise RacklessError(f"{name} has no persistent memory of which lines could survive",
                            hint="without --survive and --seed it can be killed")  # fmt: skip
    first = f"`rackless heal {name} --only"
    if "killed" in added and old.paused:
        raise RacklessError(f"{name} is paused, and would be killed", hint=f"{first} paused` first")
    inside = {fault for fault in INSIDE if old.to_json().get(fault) != new.to_json().get(fault)}
    if inside and (new.paused and (old.paused or inside & added)):
        raise RacklessError(f"{name} is paused: its own kernel cannot do that", hint=f"{first} paused` first")
    if new.down and (added & {"latency", "jitter", "loss", "corruption", "duplication", "bandwidth"}):
        raise RacklessError(f"the link of {name} is down: it cannot be slow or lose packets as well",
                            hint=f"{first} down` first")  # fmt: skip
    if new.down and "down" in added and set(old.names) & {"latency", "jitter", "loss", "bandwidth"}:
        raise RacklessError(f"the link of {name} has other faults ({', '.join(old.shown())})",
                            hint=f"`rackless heal {name}` first")  # fmt: skip
    if (spec.link.jitter + (new.jitter or 0)) > (spec.link.latency + (new.latency or 0)):
        raise RacklessError(f"the jitter of {name} would be more than its latency",
                            hint="give a latency that is at least as long")  # fmt: skip
    if name in new.deaf_to:
        raise RacklessError(f"{name} cannot be deaf to itself")
    if new.memory and new.memory >= spec.memory:
        raise RacklessError(f"{name} does not have so much memory to take", hint="take less")
    disk_faults = set(DISK) & set(new.names)
    if disk_faults and spec.disk is None:
        raise RacklessError(f"{name} has no data disk that could be broken", hint="storage blades have one")
    if new.disk_errors and len(disk_faults) > 1:
        raise RacklessError(f"the disk of {name} fails: it cannot be slow or full as well",
                            hint=f"{first} disk_errors` first, or leave that out")  # fmt: skip


def sides(groups: list[list[str]], blades: Mapping[str, str], manager: str) -> dict[str, int]:
    """The side of every blade in a partition into groups; blades in none are on the side of the manager, 0.

    `blades` has the kind of each. Raises RacklessError for a blade that is not there or is in two groups, and when
    nothing would be parted.
    """
    found: dict[str, int] = {}
    for number, group in enumerate(groups, 1):
        if not group:
            raise RacklessError("a group of the partition is empty", hint="write for example gm0,pb0 mb0,mb1")
        for name in group:
            if name not in blades:
                raise RacklessError(f"no blade {name} in the rack", hint=did_you_mean(name, [*blades]))
            if name in found:
                raise RacklessError(f"{name} is in two groups of the partition", hint="a blade has one side")
            found[name] = number
    own = found.get(manager, 0)
    parted = {name: 0 if found.get(name, own) == own else found[name] for name in blades}
    if not any(parted.values()):
        raise RacklessError("that partition parts nothing: all blades are in one group",
                            hint="name at least two groups, or one without the manager")  # fmt: skip
    return parted


def cut_off(one: str, its: Faults, other: str, others: Faults) -> bool:
    """Can a pair of blades not talk to each other on the fabric, as far as their faults tell?"""
    stopped = any(faults.killed or faults.paused or faults.down for faults in (its, others))
    return stopped or (its.side or 0) != (others.side or 0) or other in its.deaf_to or one in others.deaf_to
