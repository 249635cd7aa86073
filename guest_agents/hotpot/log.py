"""Redo log on media: records that say what is to become of pages, dropped when it has become of them.

Records lie on 4 KiB boundaries, each with a header (magic, transaction, state, length, checksum), so that a recovery
can find them without an index.
"""

from __future__ import annotations

import struct
import threading
import zlib
from enum import IntEnum
from pathlib import Path

from guest_agents.extents import Extents
from guest_agents.hotpot.errors import Retry, TooLarge
from guest_agents.hotpot.media import Media

_HEADER = struct.Struct("<8sQIIQ")
_STATE = struct.Struct("<I")
_STATE_AT = 16
_MAGIC = b"HOTPOT\0\1"
_UNIT = 4096


class State(IntEnum):
    """What a recovery would do with a record."""

    DROPPED = 0
    PREPARED = 1
    """Undo: nobody was told that it is committed."""
    COMMITTED = 2
    """Redo."""


class Log:
    """`size` bytes for records that are open at the same time. Thread-safe."""

    def __init__(self, path: Path, size: int) -> None:
        """A new log. NoSpace."""
        self._media = Media(path, size)
        self._extents = Extents(size, _UNIT)
        self._lock = threading.Lock()

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
        checksum = zlib.crc32(body)
        self._media.write(place, _HEADER.pack(_MAGIC, xid, state, checksum, len(body)) + body)
        self._media.persist(place, length)
        return place

    def set_state(self, place: int, state: State) -> None:
        """Change a record's state, persistently."""
        self._write_state(place, state)
        self._media.persist(place, _HEADER.size)

    def _write_state(self, place: int, state: State) -> None:
        self._media.write(place + _STATE_AT, _STATE.pack(state))

    def drop(self, place: int) -> None:
        """The record is not needed any more. That need not survive: undoing it, or redoing it on pages that have its
        versions already, changes nothing."""
        self._write_state(place, State.DROPPED)
        with self._lock:
            self._extents.free(place)

    def records(self) -> list[tuple[int, State]]:
        """Transaction and state of the open records, as media have them."""
        found = []
        for place in range(0, self._extents.size, _UNIT):
            magic, xid, state, _checksum, _length = _HEADER.unpack(self._media.read(place, _HEADER.size))
            if magic == _MAGIC and state != State.DROPPED:
                found.append((xid, State(state)))
        return found

    def close(self) -> None:
        """Unmap; the file stays."""
        self._media.close()
