"""A blade's data disk and clock on this machine: what fills it, and what the kernel is told to make it slow or fail."""

from __future__ import annotations

import ctypes
import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest_agents import clock, disk, mapper
from tests.unit.netns_racks import needs_root


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "rackless", str(tmp_path)], check=True)
    yield tmp_path
    disk.fill(tmp_path, False)
    subprocess.run(["umount", str(tmp_path)], check=True)


@needs_root
def test_a_full_disk_has_no_room_and_nothing_is_seen(volume: Path) -> None:
    for _again in range(2):
        disk.fill(volume, True)
        assert list(volume.iterdir()) == []
        with pytest.raises(OSError) as caught, (volume / "more").open("wb", buffering=0) as file:
            file.write(b"x" * 65536)
        assert caught.value.errno == errno.ENOSPC
        (volume / "more").unlink()
    disk.fill(volume, False)
    (volume / "more").write_bytes(b"x" * (7 << 20))


class Head(ctypes.Structure):
    """struct dm_ioctl, as linux/dm-ioctl.h has it."""

    _fields_ = [
        ("version", ctypes.c_uint32 * 3), ("data_size", ctypes.c_uint32), ("data_start", ctypes.c_uint32),
        ("target_count", ctypes.c_uint32), ("open_count", ctypes.c_int32), ("flags", ctypes.c_uint32),
        ("event_nr", ctypes.c_uint32), ("padding", ctypes.c_uint32), ("dev", ctypes.c_uint64),
        ("name", ctypes.c_char * 128), ("uuid", ctypes.c_char * 129), ("data", ctypes.c_char * 7),
    ]  # fmt: skip


class Target(ctypes.Structure):
    """struct dm_target_spec."""

    _fields_ = [
        ("sector_start", ctypes.c_uint64), ("length", ctypes.c_uint64), ("status", ctypes.c_int32),
        ("next", ctypes.c_uint32), ("target_type", ctypes.c_char * 16),
    ]  # fmt: skip


def test_the_kernel_reads_what_is_written() -> None:
    head = Head.from_buffer_copy(mapper._head("vnode", targets=1, flags=mapper._SKIP_LOCKFS))
    assert (head.name, head.target_count, head.flags, head.data_start) == (b"vnode", 1, 1 << 10, ctypes.sizeof(Head))
    table = mapper._table("delay", 2048, "/dev/vdc 0 20")
    target = Target.from_buffer_copy(table)
    assert (target.target_type, target.sector_start, target.length) == (b"delay", 0, 2048)
    assert table[ctypes.sizeof(Target) :].rstrip(b"\0") == b"/dev/vdc 0 20"
    assert len(table) % 8 == 0


def test_each_fault_is_a_target(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: list[tuple[str, str]] = []
    monkeypatch.setattr(mapper, "switch", lambda _name, _below, target, options: told.append((target, options)))
    monkeypatch.setattr(disk, "ROOT", tmp_path)
    disk.break_as({"latency": 0.02})
    disk.break_as({})
    assert told == [("delay", "0 20"), ("linear", "0")]


def test_a_clock_is_set_on_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 10**18
    monkeypatch.setattr("time.time_ns", lambda: now)
    told: list[int] = []
    monkeypatch.setattr("time.clock_settime_ns", lambda _clock, ns: told.append(ns))
    clock.jump(3600.0)
    clock.jump(-0.5)
    assert told == [now + 3600 * 10**9, now - 5 * 10**8]


