"""What a program and the LITE core of its blade say to each other: native/lite/wire.h in Python, where it is explained.

One packet of a data channel (Unix SEQPACKET) is one request or one reply: a header, then at most `INLINE` bytes.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import NamedTuple

REQUEST = struct.Struct("<BBHIQQQQQQII")
"""op, priority, flags, tag, handle, offset, length, arg0, arg1, address, buffer, timeout_ms: 64 bytes."""
REPLY = struct.Struct("<IiQQQ")
"""tag, status, length, value, value2: 32 bytes."""
SEGMENT = struct.Struct("<QQ")
"""offset, length: an entry of READV and WRITEV."""

INLINE = 8192
"""Bytes of payload a packet may have, segments included."""
SEGMENTS = 256
"""Entries READV and WRITEV may have."""
PORTS = 64
"""Ports are 0 to 63."""
WINDOW = 256
"""Requests a channel may have unanswered; more wait in its socket."""
MAX_MESSAGE = 4 << 20
"""Most bytes of an RPC message."""
PACKET = REQUEST.size + INLINE
"""Longest packet, bytes."""
NO_LIMIT = 0xFFFFFFFF
"""timeout_ms: wait for ever."""


class Op(IntEnum):
    """What a request asks for; wire.h has the table of their arguments."""

    READ = 1
    WRITE = 2
    FETCH_ADD = 3
    CAS = 4
    READV = 5
    WRITEV = 6
    CALL = 7
    SEND = 8
    RECEIVE = 9
    REPLY = 10
    REPLY_RECEIVE = 11
    CANCEL = 12


class Flag(IntFlag):
    """How data travel between program and core."""

    INLINE_DATA = 1
    """Outgoing data follow the request's header."""
    INLINE_REPLY = 2
    """Incoming data, at most `INLINE` bytes, shall follow the reply's header."""
    NO_WAIT = 4
    """RECEIVE: if there is no message answer TIMED_OUT at once."""


class Reply(NamedTuple):
    """A reply's header; `status` is 0 or the `code` of a LiteError."""

    tag: int
    status: int
    length: int
    value: int
    value2: int


def request(
    op: int,
    tag: int,
    *,
    handle: int = 0,
    offset: int = 0,
    length: int = 0,
    arg0: int = 0,
    arg1: int = 0,
    address: int = 0,
    buffer: int = 0,
    flags: int = 0,
    priority: int = 0,
    timeout_ms: int = 0,
) -> bytes:
    """A request's header; inline data are to follow in the same packet."""
    return REQUEST.pack(op, priority, flags, tag, handle, offset, length, arg0, arg1, address, buffer, timeout_ms)


def reply(packet: bytes | bytearray | memoryview) -> Reply:
    """The header of a reply; its inline data, if any, are `packet[REPLY.size:]`. struct.error if it is too short."""
    return Reply(*REPLY.unpack_from(packet))
