"""Named pieces of one persistent-memory device, as files are pieces of a disk: for programs that need several.

On the device lie a head, a table of names, a table that tells of every unit of the device to what it belongs, and the
units. Every change is 8 bytes that become durable at once, after all that it leads to is: a power failure finds it made
or not made. The check sums find what no power failure leaves; then nothing of the device is used (Damaged).
"""

# ruff: noqa: N818 (they say what is the matter)

from __future__ import annotations

import struct
import threading
import zlib
from collections.abc import Iterable, Iterator
from itertools import groupby

from guest_agents.pmem import LINE, Device, PmemError

UNIT = 16 << 10
"""Bytes that belong to one name."""
MAX_NAME = 48
_MAGIC = b"SHL1"  # with a check of the sizes behind it, so that the head becomes durable at once
_NAMES_AT, _NAMES = 4096, 256
_NAME = struct.Struct("<IIQ48s")  # check sum of what follows it, 1, size, name; the first 8 bytes 0: free
_UNITS_AT = _NAMES_AT + _NAMES * _NAME.size
_OWNER = struct.Struct("<IHH")  # its place in the piece, number of the name from 1, check; all 0: free


class Foreign(PmemError):
    """The device holds something else."""


class Damaged(PmemError):
    """The tables do not have their check sums."""


class Full(PmemError):
    """There is no room."""


class Different(PmemError):
    """A piece has another size."""


def begun(device: Device) -> bool:
    """Whether a device is a shelf. One that is not stays as it is, while `Shelf` makes an empty one of a new device."""
    return bytes(device.memory[: len(_MAGIC)]) == _MAGIC


class Shelf:
    """The pieces of a device. A device that is all zero at its beginning becomes an empty shelf. Thread-safe."""

    def __init__(self, device: Device) -> None:
        """Foreign, Damaged, Full (a device too small for the tables)."""
        self.device = device
        self._memory = device.memory
        self._lock = threading.RLock()
        # The table of units takes room from the units: as many as fit with it.
        self._units = (device.size - _UNITS_AT - UNIT) // (UNIT + _OWNER.size)
        self._data = -(-(_UNITS_AT + self._units * _OWNER.size) // UNIT) * UNIT
        if self._units < 1:
            raise Full(f"{device.size} bytes of persistent memory are too few")
        self._begin()
        self._names = dict(self._read_names())
        self._owned: dict[int, dict[int, int]] = {slot: {} for slot in self._names}
        self._free: list[int] = []
        self._read_units()

    @property
    def size(self) -> int:
        """Bytes for pieces."""
        return self._units * UNIT

    @property
    def used(self) -> int:
        """Bytes that pieces have."""
        return (self._units - len(self._free)) * UNIT

    def names(self) -> dict[str, int]:
        """The pieces: size by name."""
        with self._lock:
            return dict(self._names.values())

    def open(self, name: str, size: int) -> Piece:
        """A piece of `size` bytes, as it is or new and all zero; it has no room yet (reserve). Full, Different."""
        with self._lock:
            for slot, (other, has) in self._names.items():
                if other == name:
                    if has != size:
                        raise Different(f"{name} has {has} bytes, not {size}")
                    return Piece(self, slot, name, size)
            return Piece(self, self._add(name, size), name, size)

    def close(self) -> None:
        """Close the device."""
        self.device.close()

    # Called by pieces

    def units(self, slot: int) -> dict[int, int]:
        """The units of a piece: by place in it, number on the device."""
        return self._owned[slot]

    def address(self, unit: int) -> int:
        """Where on the device a unit is."""
        return self._data + unit * UNIT

    def give(self, slot: int, places: Iterable[int]) -> None:
        """More units for a piece, all zero. Full: none."""
        with self._lock:
            missing = [place for place in places if place not in self._owned[slot]]
            if len(missing) > len(self._free):
                raise Full(f"{len(missing) * UNIT} bytes of persistent memory; {len(self._free) * UNIT} are free")
            taken = sorted(self._free.pop() for _ in missing)
            for start, count in _runs(taken):
                begin = self.address(start)
                self._memory[begin : begin + count * UNIT] = bytes(count * UNIT)
                self.device.persist(begin, count * UNIT)
            for place, unit in zip(missing, taken, strict=True):
                self._write_owner(unit, _OWNER.pack(place, slot + 1, _check(unit, place, slot + 1)))
                self._owned[slot][place] = unit
            self._persist_owners(taken)

    def take_back(self, slot: int, places: Iterable[int]) -> None:
        """Units of a piece are free again."""
        with self._lock:
            self._release([self._owned[slot].pop(place) for place in places if place in self._owned[slot]])

    def remove(self, slot: int) -> None:
        """A name less. It goes first: units that belong to nobody are free when the shelf is opened again."""
        with self._lock:
            place = _NAMES_AT + slot * _NAME.size
            self._memory[place : place + 8] = bytes(8)
            self.device.persist(place, 8)
            del self._names[slot]
            owned = self._owned.pop(slot)
            units = list(owned.values())
            owned.clear()  # pieces that are still open have it, too
            self._release(units)

    # Inside

    def _begin(self) -> None:
        head = _MAGIC + zlib.crc32(struct.pack("<QQ", self._units, UNIT)).to_bytes(4, "little")
        found = bytes(self._memory[: len(head)])
        if found == head:
            return
        if found[: len(_MAGIC)] == _MAGIC:
            raise Damaged("the head of the persistent memory is damaged, or it has another size")
        if any(self._memory[: self._data]):
            raise Foreign("the persistent memory holds something else", "`rackless pmem erase BLADE` gives it away")
        self._memory[: len(head)] = head
        self.device.persist(0, len(head))

    def _read_names(self) -> Iterator[tuple[int, tuple[str, int]]]:
        for slot in range(_NAMES):
            place = _NAMES_AT + slot * _NAME.size
            entry = bytes(self._memory[place : place + _NAME.size])
            check, there, size, name = _NAME.unpack(entry)
            if entry[:8] == bytes(8):
                continue
            if not there or check != zlib.crc32(entry[4:]):
                raise Damaged(f"entry {slot} of the names on the persistent memory is damaged: a piece is lost")
            yield slot, (name.rstrip(b"\0").decode(), size)

    def _read_units(self) -> None:
        orphans = []
        table = bytes(self._memory[_UNITS_AT : _UNITS_AT + self._units * _OWNER.size])
        for unit, entry in enumerate(_OWNER.iter_unpack(table)):
            place, number, check = entry
            if entry == (0, 0, 0):
                self._free.append(unit)
            elif check != _check(unit, place, number):
                raise Damaged(f"unit {unit} of the persistent memory is damaged: {UNIT} bytes of a piece are lost")
            elif number - 1 in self._owned:
                self._owned[number - 1][place] = unit
            else:
                orphans.append(unit)
        self._free.reverse()  # the first are taken first
        self._release(orphans)

    def _add(self, name: str, size: int) -> int:
        encoded = name.encode()
        if not 0 < len(encoded) <= MAX_NAME:
            raise ValueError(f"a name has 1 to {MAX_NAME} bytes, not {name!r:.60}")
        slot = next((slot for slot in range(_NAMES) if slot not in self._names), None)
        if slot is None:
            raise Full(f"there are {_NAMES} pieces of the persistent memory already")
        rest = _NAME.pack(0, 1, size, encoded)[4:]
        entry = zlib.crc32(rest).to_bytes(4, "little") + rest
        place = _NAMES_AT + slot * _NAME.size
        self._memory[place + 8 : place + len(entry)] = entry[8:]
        self.device.persist(place, len(entry))
        self._memory[place : place + 8] = entry[:8]
        self.device.persist(place, 8)
        self._names[slot] = (name, size)
        self._owned[slot] = {}
        return slot

    def _release(self, units: list[int]) -> None:
        for unit in units:
            self._write_owner(unit, bytes(_OWNER.size))
        self._persist_owners(units)
        self._free += units

    def _write_owner(self, unit: int, entry: bytes) -> None:
        place = _UNITS_AT + unit * _OWNER.size
        self._memory[place : place + _OWNER.size] = entry

    def _persist_owners(self, units: list[int]) -> None:
        for line in sorted({(_UNITS_AT + unit * _OWNER.size) // LINE for unit in units}):
            self.device.persist(line * LINE, LINE)


class Piece:
    """`size` bytes under a name, at places of the device that need not lie together. Thread-safe."""

    def __init__(self, shelf: Shelf, slot: int, name: str, size: int) -> None:
        self.name = name
        self.size = size
        self._shelf = shelf
        self._slot = slot
        self._units = shelf.units(slot)
        self._lock = threading.Lock()

    def reserve(self, offset: int, length: int) -> None:
        """Take the room of a range. Full."""
        self._shelf.give(self._slot, range(offset // UNIT, -(-(offset + length) // UNIT)))

    def release(self, offset: int, length: int) -> None:
        """Give back the room of whole units: they are zeros."""
        with self._lock:
            self._shelf.take_back(self._slot, range(-(-offset // UNIT), (offset + length) // UNIT))

    def read(self, offset: int, length: int) -> bytes:
        """What was last written; where nothing was, zeros."""
        memory = self._shelf.device.memory
        with self._lock:
            parts = [bytes(count) if at is None else bytes(memory[at : at + count])
                     for at, count in self._places(offset, length)]  # fmt: skip
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Store; readers get all of it or nothing. Full, where no room was reserved."""
        memory, view, done = self._shelf.device.memory, memoryview(data), 0
        with self._lock:
            if any(at is None for at, _ in self._places(offset, len(view))):
                self.reserve(offset, len(view))
            for at, count in self._places(offset, len(view)):
                assert at is not None
                memory[at : at + count] = view[done : done + count]
                done += count

    def persist(self, offset: int, length: int) -> None:
        """Returns when a range survives a power failure."""
        for at, count in self._places(offset, length):
            if at is not None:
                self._shelf.device.persist(at, count)

    def remove(self) -> None:
        """Give the room and the name back. Who still uses it gets ValueError."""
        with self._lock:
            self.size = 0
            self._shelf.remove(self._slot)

    def _places(self, offset: int, length: int) -> Iterator[tuple[int | None, int]]:
        """Where a range lies on the device: (address, or None where there is no room, length)."""
        if not 0 <= offset <= offset + length <= self.size:
            raise ValueError(f"{length} bytes at {offset} of {self.name}, which has {self.size}")
        begin, end = offset, offset + length
        while begin < end:
            place = begin // UNIT
            unit = self._units.get(place)
            upto = (place + 1) * UNIT
            while upto < end and unit is not None and self._units.get(upto // UNIT) == unit + upto // UNIT - place:
                upto += UNIT
            count = min(upto, end) - begin
            yield None if unit is None else self._shelf.address(unit) + begin % UNIT, count
            begin += count


def _check(unit: int, place: int, number: int) -> int:
    return zlib.crc32(struct.pack("<III", unit, place, number)) & 0xFFFF


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Neighbours together: (first, how many)."""
    for _, group in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        units = [number for _, number in group]
        yield units[0], len(units)
