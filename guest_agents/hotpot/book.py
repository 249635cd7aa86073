"""What a node, or the dispatcher, has to know after a crash: a JSON document on media, replaced as a whole.

There are two slots, written in turn, so that there is always a whole one.
"""

from __future__ import annotations

import json
import struct
import zlib
from typing import Any

from guest_agents.hotpot.errors import Corrupt, NoSpace
from guest_agents.hotpot.media import Media

_HEADER = struct.Struct("<8sQQI")
_MAGIC = b"HOTBOOK\2"


class Book:
    """The document on `media`; not thread-safe."""

    def __init__(self, media: Media) -> None:
        """Find the last one. Corrupt: there was one, and neither slot is whole."""
        self._media = media
        self._slot = media.size // 2
        found = [self._read(slot) for slot in (0, 1)]
        known = [document for document in found if document is not None]
        newest = max(known, key=lambda one: one[0], default=None)
        self._number = 0 if newest is None else newest[0]
        self.document: dict[str, Any] | None = None if newest is None else newest[1]
        """The last document saved; None if there was never one."""
        self.damaged = bool(known) and self._used(1) and len(known) < 2
        """One of the slots is not whole: a save was interrupted, or it is corrupt and the document may be old."""
        if not known and self._used(1):
            raise Corrupt(f"both halves of {media.path.name} are corrupt", hint="it was left as it is")

    def save(self, document: dict[str, Any]) -> None:
        """Returns when it survives a crash. NoSpace: too long; the last one stays."""
        text = json.dumps(document, separators=(",", ":")).encode()
        if _HEADER.size + len(text) > self._slot:
            raise NoSpace(f"{len(text)} bytes for {self._media.path.name}, which has room for {self._slot}")
        number = self._number + 1
        place = number % 2 * self._slot
        self._media.write(place, _HEADER.pack(_MAGIC, number, len(text), self._checksum(number, text)) + text)
        self._media.persist(place, _HEADER.size + len(text))
        self._number, self.document = number, document

    def close(self) -> None:
        """Unmap; the media stay."""
        self._media.close()

    def _read(self, slot: int) -> tuple[int, dict[str, Any]] | None:
        magic, number, length, checksum = _HEADER.unpack(self._media.read(slot * self._slot, _HEADER.size))
        if magic != _MAGIC or length > self._slot - _HEADER.size:
            return None
        text = self._media.read(slot * self._slot + _HEADER.size, length)
        if checksum != self._checksum(number, text):
            return None
        document: dict[str, Any] = json.loads(text)
        return number, document

    def _used(self, least: int) -> bool:
        """Whether both slots have been written to: the first save of all may be interrupted, too."""
        used = [any(self._media.read(slot * self._slot, _HEADER.size)) for slot in (0, 1)]
        return sum(used) > least

    def _checksum(self, number: int, text: bytes) -> int:
        return zlib.crc32(text, zlib.crc32(number.to_bytes(8, "little")))
