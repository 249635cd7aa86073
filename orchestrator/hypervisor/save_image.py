"""libvirt's save images: a header, the domain's XML and a cookie padded with NULs, then QEMU's migration stream.

The XML can be another one, for other names and paths: libvirt starts QEMU as it says, and gives it the stream.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from orchestrator.errors import RacklessError

_MAGIC = b"LibvirtQemudSave"
_FIELDS = struct.Struct("<16s5I14I")  # magic; version, length of data, was running, compression, cookie; unused
_SUPPORTED_VERSION = 2


def read_xml(state: Path) -> str:
    """The domain XML of a save image. RacklessError if it is none."""
    with state.open("rb") as source:
        return _head(state, source)[1]


def rewrite(state: Path, target: Path, change: Callable[[str], str]) -> None:
    """Write to ``target`` the save image ``state`` with its domain XML changed. RacklessError if it is none."""
    with state.open("rb") as source:
        fields, old, cookie = _head(state, source)
        length = fields[2]
        xml = change(old).encode() + b"\0"
        if cookie:
            fields[5] = len(xml)
        head = xml + (cookie + b"\0" if cookie else b"")
        fields[2] = max(length, len(head))
        with target.open("wb") as out:
            out.write(_FIELDS.pack(*fields))
            out.write(head.ljust(fields[2], b"\0"))
            out.flush()
            _copy_rest(source.fileno(), out.fileno(), _FIELDS.size + length)


def _head(state: Path, source: BinaryIO) -> tuple[list[int], str, bytes]:
    """The header's fields (the first is the magic), the XML and the cookie; reads as far as the stream."""
    fields = list(_FIELDS.unpack(source.read(_FIELDS.size).ljust(_FIELDS.size, b"\0")))
    magic, version, length, cookie_offset = fields[0], fields[1], fields[2], fields[5]
    if magic != _MAGIC or version != _SUPPORTED_VERSION:
        raise RacklessError(f"{state} is not a libvirt save image of version {_SUPPORTED_VERSION}")
    data = source.read(length)
    cookie = data[cookie_offset:].rstrip(b"\0") if cookie_offset else b""
    return fields, data.partition(b"\0")[0].decode(), cookie


def _copy_rest(source: int, target: int, offset: int) -> None:
    left = os.fstat(source).st_size - offset
    while left > 0:
        sent = os.sendfile(target, source, offset, left)
        if sent == 0:
            break
        offset, left = offset + sent, left - sent
