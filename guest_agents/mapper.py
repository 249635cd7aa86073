"""Block devices of the kernel's device mapper, by its ioctls: what is under a file system can change while it is used.

Done here and not by `dmsetup`: three requests do not need a package in every image. Layouts are those of
linux/dm-ioctl.h, targets those of the kernel's Documentation/admin-guide/device-mapper.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import subprocess
from pathlib import Path

_CONTROL = Path("/dev/mapper/control")
_HEAD = struct.Struct("=3I3IiIIIQ128s129s7x")
_TARGET = struct.Struct("=QQiI16s")
_ROOM = 1024
_DEV_CREATE, _DEV_SUSPEND, _DEV_STATUS, _TABLE_LOAD = 3, 6, 7, 9
_SKIP_LOCKFS = 1 << 10
"""The file system above is not made to write all it has first: on a disk that fails it could not."""
_SECTOR = 512


def load_module() -> None:
    """Have the kernel know the device mapper. It loads the single targets by itself."""
    subprocess.run(["modprobe", "dm_mod"], check=True)


def device(name: str, below: Path) -> Path:
    """The mapped device called `name`, which is all of `below` now; made if it is not there. OSError of the kernel."""
    try:
        number = _request(_DEV_STATUS, name)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        number = _request(_DEV_CREATE, name)
    switch(name, below, "linear", "0")  # also one that was left half made
    return Path(f"/dev/dm-{os.minor(number)}")


def switch(name: str, below: Path, target: str, options: str) -> None:
    """Map all of `name` to `below` by another target from now on; `options` are those behind the device.

    Operations that are under way end first. OSError of the kernel: EINVAL when it does not know the target.
    """
    with below.open("rb") as disk:
        sectors = disk.seek(0, os.SEEK_END) // _SECTOR
    _request(_TABLE_LOAD, name, targets=1, data=_table(target, sectors, f"{below} {options}"))
    _request(_DEV_SUSPEND, name, flags=_SKIP_LOCKFS)  # without the flag to suspend it is a resume: the table counts


def _table(target: str, sectors: int, parameters: str) -> bytes:
    text = parameters.encode() + b"\0"
    return _TARGET.pack(0, sectors, 0, 0, target.encode()) + text.ljust(-(-len(text) // 8) * 8, b"\0")


def _head(name: str, targets: int = 0, flags: int = 0) -> bytes:
    return _HEAD.pack(4, 0, 0, _HEAD.size + _ROOM, _HEAD.size, targets, 0, flags, 0, 0, 0, name.encode(), b"")


def _request(command: int, name: str, targets: int = 0, flags: int = 0, data: bytes = b"") -> int:
    """One ioctl; the number of the device it was about."""
    buffer = bytearray(_head(name, targets, flags) + data.ljust(_ROOM, b"\0"))
    with _CONTROL.open("r+b", buffering=0) as control:
        fcntl.ioctl(control, 0xC000FD00 | _HEAD.size << 16 | command, buffer)
    number: int = _HEAD.unpack_from(buffer)[10]
    return number
