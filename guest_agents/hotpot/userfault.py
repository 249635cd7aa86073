"""userfaultfd of Linux, by ioctl: faults of a mapping of shared memory, and what may be done about them.

Programs make a descriptor for the mapping of a dataset and give it to the service, which answers: it can do so for
another process, and must, because a Python thread that faults holds the interpreter lock. `man 2 ioctl_userfaultfd`.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import struct
import time
from contextlib import suppress
from typing import NamedTuple

from guest_agents.hotpot.blocks import PAGE
from guest_agents.hotpot.errors import NoUserfaultfd

_SYSCALL = {"x86_64": 323, "aarch64": 282}
_MAGIC = 0xAA
_WP, _MISSING_SHMEM, _MINOR_SHMEM, _WP_SHMEM = 1 << 0, 1 << 5, 1 << 10, 1 << 12
_MISSING, _PROTECT, _MINOR = 1, 2, 4
_CONTINUE_PROTECTED = 2
_EVENT_FAULT = 0x12
_MESSAGE = struct.Struct("<B7xQQ8x")
_RANGE = struct.Struct("<QQ")
_RANGE_MODE = struct.Struct("<QQQ")
_RANGE_MODE_OUT = struct.Struct("<QQQq")
_BUSY_SECONDS = 0.0005


def _request(direction: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | _MAGIC << 8 | number


_API = _request(3, 0x3F, _RANGE_MODE.size)
_REGISTER = _request(3, 0x00, _RANGE_MODE_OUT.size)
_WAKE = _request(2, 0x02, _RANGE.size)
_WRITE_PROTECT = _request(3, 0x06, _RANGE_MODE.size)
_CONTINUE = _request(3, 0x07, _RANGE_MODE_OUT.size)


class Fault(NamedTuple):
    """A thread waits: it read or wrote where nothing is mapped, or wrote to what is write-protected."""

    address: int
    write: bool
    protected: bool


def open_for(address: int, size: int) -> int:
    """A descriptor that gets the faults of a mapping of shared memory in this process. NoUserfaultfd."""
    libc = ctypes.CDLL(None, use_errno=True)
    number = _SYSCALL.get(platform.machine())
    file = -1 if number is None else libc.syscall(number, os.O_CLOEXEC | os.O_NONBLOCK)
    if file < 0:
        raise NoUserfaultfd(f"userfaultfd is not available: {os.strerror(ctypes.get_errno() or errno.ENOSYS)}")
    try:
        wanted = _WP | _MISSING_SHMEM | _MINOR_SHMEM | _WP_SHMEM
        fcntl.ioctl(file, _API, bytearray(_RANGE_MODE.pack(_MAGIC, wanted, 0)))
        modes = _MISSING | _PROTECT | _MINOR
        fcntl.ioctl(file, _REGISTER, bytearray(_RANGE_MODE_OUT.pack(address, size, modes, 0)))
    except OSError as failure:
        os.close(file)
        raise NoUserfaultfd(f"userfaultfd refuses shared memory: {failure.strerror}") from None
    return file


def read(file: int) -> Fault | None:
    """The next fault, None if there is none."""
    try:
        message = os.read(file, _MESSAGE.size)
    except BlockingIOError:
        return None
    event, flags, address = _MESSAGE.unpack(message)
    if event != _EVENT_FAULT:
        return None
    return Fault(address // PAGE * PAGE, bool(flags & 1), bool(flags & 2))


def let(file: int, address: int, *, writable: bool) -> None:
    """Map the page that the file under the mapping has there, and let who waits for it go on."""
    mode = 0 if writable else _CONTINUE_PROTECTED
    try:
        _ioctl(file, _CONTINUE, _RANGE_MODE_OUT.pack(address, PAGE, mode, 0))
    except FileExistsError:  # it is mapped
        if writable:
            unprotect(file, address)
        else:
            wake(file, address)


def unprotect(file: int, address: int) -> None:
    """Let a page that is mapped be written, and who waits for that go on."""
    _ioctl(file, _WRITE_PROTECT, _RANGE_MODE.pack(address, PAGE, 0))


def protect(file: int, address: int, size: int = PAGE) -> None:
    """Let no page of a range be written any more."""
    _ioctl(file, _WRITE_PROTECT, _RANGE_MODE.pack(address, size, 1))


def wake(file: int, address: int, size: int = PAGE) -> None:
    """Let those who wait for pages of a range try again."""
    _ioctl(file, _WAKE, _RANGE.pack(address, size))


def _ioctl(file: int, request: int, argument: bytes) -> None:
    while True:
        try:
            with suppress(ProcessLookupError):  # the program has ended
                fcntl.ioctl(file, request, bytearray(argument))
        except OSError as failure:
            if failure.errno == errno.ENOENT:  # it has unmapped the range
                return
            if failure.errno != errno.EAGAIN:
                raise
            time.sleep(_BUSY_SECONDS)  # the program is changing its mappings
        else:
            return
