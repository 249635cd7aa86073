"""Packets of the fabric, as blades send and get them, in a file that Wireshark and tcpdump open.

Read from the blades' taps with packet sockets, so that nothing has to be installed, and no blade notices. Wireshark
knows RoCEv2 by its UDP port, 4791. The file is a pcap with nanoseconds (pcap-savefile(5)).
"""

from __future__ import annotations

import selectors
import socket
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import BinaryIO

from orchestrator.errors import RacklessError
from orchestrator.network import place
from orchestrator.network.place import FABRIC
from orchestrator.settings import RackPaths
from orchestrator.spec import BladeSpec

MOST_BYTES = 1 << 16
"""Of a packet: the fabric's are up to 9018 bytes long."""
_ETHERNET = 1
_MAGIC_NANOSECONDS = 0xA1B23C4D
_ETH_P_ALL = 3
_SO_RCVBUFFORCE = 33
_SO_TIMESTAMPNS = 35
_SOL_PACKET, _PACKET_STATISTICS, _PACKET_IGNORE_OUTGOING = 263, 6, 23
_BUFFER_BYTES = 32 << 20
_BATCH = 256
_LOOK_SECONDS = 0.2


@dataclass(frozen=True)
class Packet:
    """One frame as it was on the wire."""

    nanoseconds: int
    """Since the epoch."""
    data: bytes

    def record(self) -> bytes:
        """For the file."""
        seconds, rest = divmod(self.nanoseconds, 1_000_000_000)
        return struct.pack("<IIII", seconds, rest, len(self.data), len(self.data)) + self.data


@dataclass(frozen=True)
class Captured:
    """How many packets are in the file, and how many came too fast."""

    packets: int
    dropped: int


def header() -> bytes:
    """The beginning of the file."""
    return struct.pack("<IHHiIII", _MAGIC_NANOSECONDS, 2, 4, 0, 0, MOST_BYTES, _ETHERNET)


def capture(paths: RackPaths, blades: Mapping[str, BladeSpec], only: str | None, file: BinaryIO,
            seconds: float | None, stop: Callable[[], bool] = lambda: False) -> Captured:  # fmt: skip
    """Write what passes on the fabric into `file` until `seconds` have passed, or `stop` says so, or Ctrl-C.

    Each packet is there once: as it leaves the blade that sends it. With `only` what that blade sends and gets, so that
    what was lost on its way is missing. RacklessError when it may not, or a tap is not there.
    """
    where = place.of(paths)
    elsewhere = [name for name, spec in blades.items() if only in (None, name) and spec.host]
    if elsewhere:
        raise RacklessError(f"packets of {', '.join(elsewhere)} are on host {blades[elsewhere[0]].host}",
                            hint="capture one blade of this machine, as in `rackless pcap --only BLADE`")  # fmt: skip
    taps = [where.tap(FABRIC, spec.index) for name, spec in blades.items() if only in (None, name)]
    with ExitStack() as stack:
        try:
            sockets = where.inside(lambda: [stack.enter_context(listen(tap, only is not None)) for tap in taps])
        except PermissionError:
            raise RacklessError("cannot capture packets: Operation not permitted", hint="run it as root") from None
        except OSError as error:
            raise RacklessError(f"cannot capture packets: {error.strerror}", hint="see `rackless status`") from error
        return record(sockets, file, seconds, stop)


def listen(interface: str, both_ways: bool) -> socket.socket:
    """A packet socket at an interface of this thread's network namespace; OSError when it cannot be.

    Not `both_ways`: without what this side sends into a tap, which is what its blade gets.
    """
    made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)  # of no protocol: nothing comes before it is bound
    try:
        made.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        made.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        made.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, int(not both_ways))
        made.bind((interface, _ETH_P_ALL))
        made.setblocking(False)
    except OSError:
        made.close()
        raise
    return made


def record(
    sockets: Sequence[socket.socket], file: BinaryIO, seconds: float | None, stop: Callable[[], bool]
) -> Captured:
    """Write what comes to `sockets` into `file`, in the order of time; see `capture`."""
    deadline = None if seconds is None else time.monotonic() + seconds
    file.write(header())
    file.flush()
    count = 0
    with selectors.DefaultSelector() as ready, suppress(KeyboardInterrupt):
        for one in sockets:
            ready.register(one, selectors.EVENT_READ, data=one)
        while not stop() and (deadline is None or time.monotonic() < deadline):
            wait = _LOOK_SECONDS if deadline is None else max(0.0, min(_LOOK_SECONDS, deadline - time.monotonic()))
            came = (packet for key, _ in ready.select(wait) for packet in _read(key.data))
            packets = sorted(came, key=lambda packet: packet.nanoseconds)
            file.write(b"".join(packet.record() for packet in packets))
            file.flush()
            count += len(packets)
    return Captured(count, sum(_dropped(one) for one in sockets))


def _read(one: socket.socket) -> list[Packet]:
    """What waits at a socket, some at a time."""
    packets = []
    for _ in range(_BATCH):
        try:
            data, ancillary, _, _ = one.recvmsg(MOST_BYTES, 64)
        except (BlockingIOError, InterruptedError):
            break
        except OSError:  # the tap went away with its blade
            break
        packets.append(Packet(_stamp(ancillary), data))
    return packets


def _stamp(ancillary: Sequence[tuple[int, int, bytes]]) -> int:
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, _SO_TIMESTAMPNS):
            seconds, nanoseconds = struct.unpack("qq", data[:16])
            return int(seconds * 1_000_000_000 + nanoseconds)
    return time.time_ns()


def _dropped(one: socket.socket) -> int:
    """Packets for which the socket had no room."""
    try:
        return int(struct.unpack("II", one.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))[1])
    except OSError:
        return 0
