"""Persistent memory of a blade: stores that survive a power failure, once they are persisted.

    from guest_agents import pmem

    with pmem.open_device() as device:
        device.memory[0:5] = b"hello"        # a store: power may fail before it is durable
        device.persist(0, 5)                 # now it survives

There are two devices (docs/hotpot.md, "Persistent memory"). *vol* is what programs and RDMA touch. *media* is what the
host keeps when the power fails; nothing but `persist` writes there, a cache line at a time, as the caches of a real
machine do. Which is which the host tells; nvdimm.py finds them, and writes down where they are.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

FILE = Path("/run/rackless/pmem.json")
"""Where this blade's devices are, if it has any."""
LINE = 64
"""Bytes that become durable together. Power that fails meanwhile may leave a part, but never of 8 aligned bytes."""
SCRATCH = mmap.PAGESIZE
"""At the end of the device, and not of its `size`: for the self-test."""


class PmemError(Exception):
    """Persistent memory cannot be had; `hint` says what to do about it."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        self.message = message
        self.hint = hint
        super().__init__(f"{message} ({hint})" if hint else message)


@dataclass(frozen=True)
class Places:
    """Where vol and media are: files or devices, with offsets in them; sizes are bytes.

    mode -- devdax: vol can be mapped. fsdax or raw: it is a block device
    """

    mode: str
    size: int
    vol: str
    vol_offset: int
    media: str
    media_offset: int

    @classmethod
    def load(cls, file: Path = FILE) -> Places:
        """As this blade's agent wrote them down. PmemError: it has none."""
        try:
            return cls(**json.loads(file.read_text()))
        except FileNotFoundError:
            raise PmemError("this blade has no persistent memory", "give it `pmem` in the rack file") from None

    def save(self, file: Path = FILE) -> None:
        """Write them down."""
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_suffix(".part")
        beside.write_text(json.dumps(asdict(self)) + "\n")
        beside.replace(file)


class Device:
    """vol as `memory`, and the way from there to media. Close it, or use it as a context manager.

    exclusive -- nobody else may use it now: programs that do not know of each other would overwrite each other.
        PmemError when somebody does. The lock ends with the process.
    """

    def __init__(self, file: Path = FILE, *, exclusive: bool = True) -> None:
        places = Places.load(file)
        if places.mode != "devdax":
            raise PmemError(f"the persistent memory is in mode {places.mode}", "`rackless pmem mode BLADE devdax`")
        self.size = places.size - SCRATCH
        """Bytes for users."""
        with ExitStack() as stack:
            if exclusive:
                stack.enter_context(lock(file))
            vol = _map(stack, places.vol, places.vol_offset, places.size)
            self._media = _map(stack, places.media, places.media_offset, places.size)
            self.memory = vol[: self.size]
            """Plain loads and stores; an address of it may be registered for RDMA."""
            self._vol = vol
            stack.callback(self.memory.release)
            self._close: Callable[[], None] = stack.pop_all().close

    def persist(self, offset: int, length: int) -> None:
        """Make a range durable, with the rest of its first and last line. Returns when it survives a power failure.

        Thread-safe: the interpreter's lock is held while lines are copied, so an older line never replaces a newer.
        ValueError outside of the device.
        """
        if not 0 <= offset <= offset + length <= len(self._vol):
            raise ValueError(f"{length} bytes at {offset} of {self.size} bytes of persistent memory")
        start, end = offset // LINE * LINE, -(-(offset + length) // LINE) * LINE
        self._media[start:end] = self._vol[start:end]

    @property
    def scratch(self) -> memoryview:
        """The last page, which is no user's; its offset is `size`."""
        return self._vol[self.size :]

    def close(self) -> None:
        """Unmap. BufferError while views of `memory` are in use."""
        self._close()

    def __enter__(self) -> Device:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_device(file: Path = FILE) -> Device:
    """This blade's persistent memory, for one user at a time. PmemError."""
    return Device(file)


@contextmanager
def lock(file: Path = FILE) -> Iterator[None]:
    """Nobody uses the device during the block. PmemError when somebody does."""
    with _lock_file(file) as opened:
        try:
            fcntl.fcntl(opened, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        except (BlockingIOError, PermissionError):  # fcntl(2): either
            raise PmemError("somebody uses the persistent memory now", "Hotpot does, where it has started") from None
        yield


def in_use(file: Path = FILE) -> bool:
    """Does somebody use the device? Asking is in nobody's way."""
    with _lock_file(file) as opened:
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind: int = _FLOCK.unpack(fcntl.fcntl(opened, fcntl.F_OFD_GETLK, asked))[0]
        return kind != fcntl.F_UNLCK


_FLOCK = struct.Struct("@hhqqi0q")  # fcntl(2): type, whence, start, length, process


@contextmanager
def _lock_file(file: Path) -> Iterator[int]:
    opened = os.open(file.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield opened
    finally:
        os.close(opened)


def _map(stack: ExitStack, path: str, offset: int, size: int) -> memoryview:
    opened = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        mapped = mmap.mmap(opened, size, offset=offset)
    finally:
        os.close(opened)
    stack.callback(mapped.close)
    view = memoryview(mapped)
    stack.callback(view.release)
    return view
