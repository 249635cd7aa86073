"""Redo log on media: records that say what is to become of pages, dropped when it has become of them.

Records lie on 4 KiB boundaries, each with a header (magic, state, checksum, transaction, length), so that a recovery
finds them without an index. The checksum begins with a number that only this log has, so that nothing which a program
has committed can be taken for a record. The first 4 KiB are the log's own.
"""

from __future__ import annotations

import hashlib
import secrets
import struct
import threading
import zlib
from enum import IntEnum
from typing import NamedTuple

from guest_agents.extents import Extents
from guest_agents.hotpot.errors import Corrupt, Retry, TooLarge
from guest_agents.hotpot.media import Media

_HEADER = struct.Struct("<8sIIQQ")
_COVERED = struct.Struct("<QQQQ")
_STATE = struct.Struct("<I")
_STATE_AT = 8
_MAGIC = b"HOTPOT\0\2"
_UNIT = 4096
_FIRST = struct.Struct("<8sQI")
_FIRST_MAGIC = b"HOTLOG\0\3"


class State(IntEnum):
    """What a recovery does with a record."""

    DROPPED = 0
    PREPARED = 1
    """Undo, unless somebody has seen the decision: nobody was told that it is committed."""
    COMMITTED = 2
    """Redo: it was decided after it had been prepared."""
    NOW = 3
    """Redo: there was nothing to decide."""
    DONE = 4
    """Redo, and keep until the other owners have done their parts too (MRSW)."""
    UNDO = 5
    """Was redone; then it was decided to take it back (MRSW)."""
    ENDED = 6
    """Was redone, and its pages unlocked; kept for owners that may ask whether it was committed."""


_STATES = frozenset(int(state) for state in State)
_WRITTEN_AT_ONCE = {State.PREPARED, State.NOW, State.DONE}
"""States in which records begin: if the checksum of such a one is wrong, its writing was interrupted."""


class Kept(NamedTuple):
    """A record that a recovery found."""

    place: int
    xid: int
    state: State
    body: bytes


class Log:
    """All of `media` for records that are open at the same time. Thread-safe."""

    def __init__(self, media: Media) -> None:
        """Take over what is there; `found` are the open records, `corrupt` says what cannot be used. Corrupt."""
        self._media = media
        self._lock = threading.Lock()
        self._extents = Extents(media.size - _UNIT, _UNIT)
        self._salt = self._begin()
        self.corrupt: list[str] = []
        self.found = self._scan()
        """Open records of an earlier life."""

    @property
    def used(self) -> int:
        """Bytes of open records."""
        return self._extents.allocated

    def append(self, xid: int, state: State, body: bytes) -> int:
        """Write and persist a record; its place. TooLarge for any log; Retry when others have it full now."""
        length = _HEADER.size + len(body)
        with self._lock:
            place = self._extents.allocate(length)
        if place is None:
            if length > self._extents.size:
                raise TooLarge(f"a record of {length} bytes, in a log of {self._extents.size}")
            raise Retry("the log is full")
        place += _UNIT
        header = _HEADER.pack(_MAGIC, state, self._checksum(place, xid, body), xid, len(body))
        self._media.write(place, header + body)
        self._media.persist(place, length)
        return place

    def set_state(self, place: int, state: State) -> None:
        """Change a record's state, persistently."""
        self._media.write(place + _STATE_AT, _STATE.pack(state))
        self._media.persist(place, _HEADER.size)

    def drop(self, place: int) -> None:
        """The record is not needed any more; its place may be used again, so this has to survive."""
        self.set_state(place, State.DROPPED)
        with self._lock:
            self._extents.free(place - _UNIT)

    def records(self) -> list[tuple[int, State]]:
        """Transaction and state of the open records, as media have them."""
        with self._lock:
            places = sorted(self._extents.taken())
        found = []
        for place in places:
            magic, state, _checksum, xid, _length = _HEADER.unpack(self._media.read(place + _UNIT, _HEADER.size))
            if magic == _MAGIC and state != State.DROPPED:
                found.append((xid, State(state)))
        return found

    def close(self) -> None:
        """Unmap; the file stays."""
        self._media.close()

    def _checksum(self, place: int, xid: int, body: bytes) -> int:
        digest = hashlib.blake2b(_COVERED.pack(self._salt, place, xid, len(body)), digest_size=4)  # blocks.py says why
        digest.update(body)
        return int.from_bytes(digest.digest(), "little")

    def _begin(self) -> int:
        magic, salt, checksum = _FIRST.unpack(self._media.read(0, _FIRST.size))
        if magic == _FIRST_MAGIC and checksum == zlib.crc32(salt.to_bytes(8, "little")):
            return int(salt)
        if self._media.read(_UNIT, self._media.size - _UNIT).strip(b"\0"):
            raise Corrupt(f"{self._media.path.name} does not begin as a log", hint="it was left as it is")
        new = secrets.randbits(64)
        self._media.write(0, _FIRST.pack(_FIRST_MAGIC, new, zlib.crc32(new.to_bytes(8, "little"))))
        self._media.persist(0, _FIRST.size)
        return new

    def _scan(self) -> list[Kept]:
        found, gaps, end = [], [], _UNIT
        for place in range(_UNIT, self._media.size - _UNIT + 1, _UNIT):
            if place < end:
                continue
            record = self._parse(place)
            if record is None:
                continue
            if place > end:
                gaps.append(self._extents.allocate(place - end))
            self._extents.allocate(_HEADER.size + len(record.body))
            end = place + -(-(_HEADER.size + len(record.body)) // _UNIT) * _UNIT
            found.append(record)
        for gap in gaps:
            assert gap is not None
            self._extents.free(gap)
        return found

    def _parse(self, place: int) -> Kept | None:
        magic, state, checksum, xid, length = _HEADER.unpack(self._media.read(place, _HEADER.size))
        if magic != _MAGIC or state == State.DROPPED:
            return None
        fits = length <= self._media.size - place - _HEADER.size
        body = self._media.read(place + _HEADER.size, length) if fits else b""
        if fits and state in _STATES and checksum == self._checksum(place, xid, body):
            return Kept(place, xid, State(state), body)
        if state not in _WRITTEN_AT_ONCE:  # those were whole when they were promised
            self.corrupt.append(f"{self._media.path.name}: the record of transaction {xid:x} is corrupt")
        self._media.write(place + _STATE_AT, _STATE.pack(State.DROPPED))
        self._media.persist(place, _HEADER.size)
        return None
