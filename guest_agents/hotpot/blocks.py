"""How a page lies in memory that others read, and on media: with its version, who wrote it, and a checksum.

Owners change pages while others read them by RDMA, which no lock can prevent. A reader notices by the checksum that it
got parts of two versions and reads again; so fetching a page is one read. The same checksum finds corrupt media.
"""

from __future__ import annotations

import hashlib
import struct
from typing import NamedTuple

from guest_agents.hotpot.errors import Corrupt

PAGE = 4096
_TRAILER = struct.Struct("<QQII")
_NUMBERS = struct.Struct("<QQI")
STRIDE = PAGE + 64
"""Bytes from one page to the next: a page and a cache line of which the trailer is part."""
_BLOCK = PAGE + _TRAILER.size
ZERO = bytes(PAGE)
LOST = (1 << 64) - 1
"""Version of a page of which no copy was left."""


class Copy(NamedTuple):
    """A committed page. Version 0 is the page of zeros with which it began; every commit adds 1."""

    version: int
    data: bytes
    xid: int = 0
    """The transaction that made this version: a recovery can tell by it that the transaction was carried out."""
    degree: int = 0
    """Copies that commits have asked for, the home included: that many are made again when a node dies."""


def _checksum(version: int, xid: int, degree: int, page: bytes | memoryview) -> int:
    """No CRC: that of a page does not change when a record in it that ends with its own CRC is replaced by another, as
    it is when half of a commit reaches the media."""
    digest = hashlib.blake2b(_NUMBERS.pack(version, xid, degree), digest_size=4)
    digest.update(page)
    return int.from_bytes(digest.digest(), "little") ^ _OF_ZERO


_OF_ZERO = 0
_OF_ZERO = _checksum(0, 0, 0, ZERO)  # so that memory which is all zero is a valid page 0 of version 0


def seal(copy: Copy) -> bytes:
    """The page with its trailer, STRIDE bytes."""
    version, data, xid, degree = copy
    trailer = _TRAILER.pack(version, xid, degree, _checksum(version, xid, degree, data))
    return data + trailer + bytes(STRIDE - _BLOCK)


def unseal(block: bytes) -> Copy:
    """The page of a block. Corrupt: the checksum is not that of page and version."""
    page = block[:PAGE]
    version, xid, degree, checksum = _TRAILER.unpack_from(block, PAGE)
    if checksum != _checksum(version, xid, degree, page):
        raise Corrupt
    return Copy(version, page, xid, degree)


def version_of(trailer: bytes) -> int:
    """The version in what follows a page, unchecked."""
    version: int = _TRAILER.unpack_from(trailer)[0]
    return version
