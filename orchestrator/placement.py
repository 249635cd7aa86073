"""Which host each blade of a rack is on. Pure: it looks at nothing but what it is given.

A blade with `host:` is there. One that exists stays where it is, for moving it would lose what it has; unless it grows,
nobody asks whether it fits: it has what it has, whatever others have taken of its host since. One that died goes to the
host that has its disk, if there is room. Each other one goes, the largest first, to the host that will be the least
full with it: full as its memory is, or as its CPUs are, whichever is more. Memory is never promised twice; CPUs may be,
as on one host, but a blade has no more of them than its host.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.errors import RacklessError
from orchestrator.model import Blade, Rack
from orchestrator.units import format_size


@dataclass(frozen=True)
class Room:
    """What a host has for the blades of a rack, those that are there already included."""

    memory: int
    """Bytes."""
    cpus: int


@dataclass(frozen=True)
class Seat:
    """Where a blade is that exists, and what it has there."""

    host: str
    memory: int
    """Bytes."""
    cpus: int


def place(rack: Rack, rooms: Mapping[str, Room], there: Mapping[str, Seat],
          kept: Mapping[str, str] | None = None) -> dict[str, str]:  # fmt: skip
    """The host of every blade, by name. `rooms` has all hosts of the rack, `there` the blades that exist.

    `kept` says which host has files that a blade which does not exist any more has left.

    Planning again, when the blades are where this says, gives the same. Raises RacklessError, which names the blade
    and what each host has left, when they do not fit.
    """
    kept = kept or {}
    used = {host: Room(0, 0) for host in rooms}
    placed: dict[str, str] = {}

    def put(name: str, host: str, checked: bool = True) -> None:
        blade = rack.blades[name]
        if checked and not _fits(blade, used[host], rooms[host]):
            raise _full(name, rack, used, rooms)
        used[host] = _with(used[host], blade)
        placed[name] = host

    staying = {name: seat for name, seat in there.items() if name in rack.blades and seat.host in rooms
               and rack.blades[name].host in (None, seat.host)}  # fmt: skip
    for name, seat in staying.items():
        blade = rack.blades[name]
        if blade.memory <= seat.memory and blade.cpus <= seat.cpus:
            put(name, seat.host, checked=False)
    for name, blade in rack.blades.items():
        host = staying[name].host if name in staying else blade.host
        if name not in placed and host is not None:
            put(name, host)
    rest = [name for name in rack.blades if name not in placed]
    # Stable: then in the order of the file.
    for name in sorted(rest, key=lambda name: (name not in kept, -rack.blades[name].memory)):
        blade = rack.blades[name]
        fitting = [host for host in rooms if _fits(blade, used[host], rooms[host])]
        if not fitting:
            raise _full(name, rack, used, rooms)
        least = min(fitting, key=lambda host: _fullness(_with(used[host], blade), rooms[host]))
        put(name, kept[name] if kept.get(name) in fitting else least)
    return {name: placed[name] for name in rack.blades}


def _with(used: Room, blade: Blade) -> Room:
    return Room(used.memory + blade.memory, used.cpus + blade.cpus)


def _fits(blade: Blade, used: Room, room: Room) -> bool:
    return used.memory + blade.memory <= room.memory and blade.cpus <= room.cpus


def _fullness(used: Room, room: Room) -> float:
    return max(used.memory / room.memory, used.cpus / room.cpus)


def _full(name: str, rack: Rack, used: Mapping[str, Room], rooms: Mapping[str, Room]) -> RacklessError:
    blade = rack.blades[name]
    left = ", ".join(
        f"{host} {max(room.memory - used[host].memory, 0) >> 20} MiB and {room.cpus} CPUs"
        for host, room in rooms.items()
        if blade.host in (None, host)
    )
    what = f"{format_size(blade.memory)} and {blade.cpus} CPU{'s' if blade.cpus > 1 else ''}"
    where = f"host {blade.host}" if blade.host else "any host"
    return RacklessError(f"blades.{name} does not fit on {where}: it has {what}; left are: {left}",
                         hint="write less memory or fewer blades, or add a host")  # fmt: skip
