"""Swap space on memory blades: the block device that the kernel would see, asked directly. No VM, no kernel module.

The real server, over stand-in verbs and memory blades (native/fake_monitor.c); what is under way to a blade that dies
fails, and whatever else is true stays true.
"""

from __future__ import annotations

import errno
import os
import random
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from tests.unit.paging_stage import FLAGS, HERE, NATIVE, missing

pytestmark = [pytest.mark.long, pytest.mark.skipif(missing() is not None, reason=missing() or "")]
BLOCK, REGION = 4096, 4 << 20
READ, WRITE, GOODBYE, _FLUSH, TRIM = range(5)
REQUEST, REPLY = struct.Struct(">IIQQI"), struct.Struct(">IIQ")
REQUEST_MAGIC, REPLY_MAGIC = 0x25609513, 0x67446698


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("swap") / "swap_serve"
    sources = [HERE / "swap_serve.c", HERE / "fake_monitor.c", HERE / "fake_verbs.c",
               *(NATIVE / name for name in ("swap.c", "fabric.c", "arena.c"))]  # fmt: skip
    subprocess.run(["cc", *FLAGS, "-fsanitize=undefined", "-o", program, *sources, "-lpthread"], check=True)
    return program


class Device:
    """The kernel's side: requests may be under way side by side, answers come in any order."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._number = 0
        self._asked: dict[int, tuple[int, int]] = {}

    def ask(self, kind: int, at: int, data: bytes | int) -> int:
        """Send a request (`data`: what to write, or how much to read or trim); its number."""
        self._number += 1
        length = data if isinstance(data, int) else len(data)
        self._asked[self._number] = kind, length
        self._end.sendall(REQUEST.pack(REQUEST_MAGIC, kind, self._number, at, length))
        if isinstance(data, bytes):
            self._end.sendall(data)
        return self._number

    def hear(self) -> tuple[int, int, bytes]:
        """The next answer: to which request, errno, what was read."""
        magic, error, number = REPLY.unpack(self._receive(REPLY.size))
        assert magic == REPLY_MAGIC
        kind, length = self._asked.pop(number)
        return number, error, self._receive(length) if kind == READ and not error else b""

    def do(self, kind: int, at: int, data: bytes | int) -> bytes:
        """One request alone; OSError as answered."""
        number = self.ask(kind, at, data)
        answered, error, result = self.hear()
        assert answered == number
        if error:
            raise OSError(error, os.strerror(error))
        return result

    def _receive(self, length: int) -> bytes:
        got = bytearray()
        while len(got) < length:
            more = self._end.recv(length - len(got))
            assert more, "the device has gone"
            got += more
        return bytes(got)


@contextmanager
def device(server: Path, size: int, **fake: object) -> Iterator[tuple[Device, Callable[[], str]]]:
    """A device of `size` bytes, and a function that ends it and returns what it has said."""
    ours, its = socket.socketpair()
    ours.settimeout(20)
    environment = {**os.environ, **{f"FAKE_{name.upper()}": str(value) for name, value in fake.items()}}
    with subprocess.Popen([str(server), str(size)], stdin=its.fileno(), stdout=subprocess.PIPE, text=True,
                          env=environment) as process, ours:  # fmt: skip
        its.close()

        def end() -> str:
            ours.sendall(REQUEST.pack(REQUEST_MAGIC, GOODBYE, 0, 0, 0))
            said, _ = process.communicate(timeout=60)
            assert process.returncode == 0
            return said

        yield Device(ours), end


@pytest.mark.parametrize("seed", range(3))
def test_blocks_are_what_was_last_written(server: Path, seed: int) -> None:
    """Random requests, up to eight at a time on parts of their own, against an array."""
    chance = random.Random(seed)
    size = 5 * REGION
    oracle = bytearray(size)
    oracle[:5] = b"first"
    with device(server, size) as (disk, end):
        for _ in range(150):
            expected: dict[int, bytes] = {}
            edges = sorted(chance.sample(range(1, size // BLOCK), 9))
            for low, high in pairwise(edges):
                at, length = low * BLOCK, min(chance.choice((1, 1, 2, 5)), high - low) * BLOCK
                kind = chance.choice((READ, WRITE, WRITE, TRIM))
                if kind == READ:
                    expected[disk.ask(READ, at, length)] = bytes(oracle[at : at + length])
                elif kind == WRITE:
                    oracle[at : at + length] = data = chance.randbytes(BLOCK) * (length // BLOCK)
                    expected[disk.ask(WRITE, at, data)] = b""
                else:
                    length = chance.choice((length, (high - low) * BLOCK))
                    oracle[at : at + length] = bytes(length)
                    expected[disk.ask(TRIM, at, length)] = b""
            for _ in range(len(expected)):
                number, error, data = disk.hear()
                assert (error, data) == (0, expected.pop(number))
        for at in range(0, size, 32 * BLOCK):
            assert disk.do(READ, at, 32 * BLOCK) == oracle[at : at + 32 * BLOCK]
        assert end() == ""


def test_what_is_discarded_is_used_again(server: Path) -> None:
    """Three blades with room for one region each, and a device of ten."""
    with device(server, 10 * REGION, regions=1) as (disk, end):
        for region in range(1, 10):
            for at in range(0, REGION, 32 * BLOCK):
                disk.do(WRITE, region * REGION + at, bytes([region]) * 32 * BLOCK)
            assert disk.do(READ, (region + 1) * REGION - BLOCK, BLOCK) == bytes([region]) * BLOCK
            disk.do(TRIM, region * REGION, REGION)
            assert not any(disk.do(READ, region * REGION, 32 * BLOCK))
        assert end() == ""


def test_a_full_rack_is_no_space(server: Path) -> None:
    with device(server, 10 * REGION, regions=1) as (disk, end):
        for region in (1, 2, 3):
            disk.do(WRITE, region * REGION, b"x" * BLOCK)
        for _ in range(2):
            with pytest.raises(OSError, match="No space") as caught:
                disk.do(WRITE, 4 * REGION, b"x" * BLOCK)
            assert caught.value.errno == errno.ENOSPC
        assert disk.do(READ, 3 * REGION, BLOCK) == b"x" * BLOCK
        disk.do(TRIM, 2 * REGION, BLOCK)
        disk.do(WRITE, 4 * REGION, b"y" * BLOCK)
        assert end() == "full\nfull\n"


@pytest.mark.parametrize("how", ["1x200", "1s200", "1l200"], ids=["refused", "silent", "declared"])
def test_when_a_blade_dies_its_blocks_are_errors_and_the_others_go_on(server: Path, how: str) -> None:
    """Nothing hangs, no block has wrong contents, and those that are lost are told of."""
    regions = 6
    with device(server, (regions + 3) * REGION, events=how) as (disk, end):
        lost: set[int] = set()
        for round_ in range(60):
            for region in range(1, regions + 1):
                expected = bytes([region]) * 8 * BLOCK
                errors = []
                if round_ % 8 == 0:
                    disk.ask(WRITE, region * REGION, expected)
                    errors.append(disk.hear()[1])
                disk.ask(READ, region * REGION, len(expected))
                _, error, data = disk.hear()
                assert {*errors, error} <= {0, errno.EIO}
                if error:
                    lost.add(region)
                else:
                    assert (data, region in lost) == (expected, False)
        assert len(lost) == regions // 3
        disk.do(WRITE, (regions + 1) * REGION, b"z" * BLOCK)
        assert disk.do(READ, (regions + 1) * REGION, BLOCK) == b"z" * BLOCK
        assert end() == "lost mb1 16\n"


@pytest.mark.parametrize(
    ("at", "length"), [(10 * REGION, BLOCK), (10 * REGION - BLOCK, 2 * BLOCK), (512, BLOCK), (BLOCK, 512)]
)
def test_what_makes_no_sense_is_refused(server: Path, at: int, length: int) -> None:
    with device(server, 10 * REGION) as (disk, end):
        for kind, data in ((READ, length), (WRITE, b"x" * length)):
            with pytest.raises(OSError, match="Invalid"):
                disk.do(kind, at, data)
        assert end() == ""
