"""What the process monitor gives the children of a program that has gone, and gives back: real desk, memory monitors,
userfaultfd; only RDMA is stood in for."""

from __future__ import annotations

import ctypes
import hashlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.unit.paging_stage import missing
from tests.unit.split_blades import Rack, eventually

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")
PAGE = 4096
REGION = 4 << 20
NEEDED = [*range(3, 70), 500, *range(1000, 1060), 2047]
"""Pages that are at memory blades, across regions."""

PROGRAM = f"""
import ctypes, fcntl, hashlib, mmap, os, signal, socket, struct, sys
REGION, NEEDED = {REGION}, {NEEDED}
ask = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
ask.connect(sys.argv[1])
def call(text):
    ask.send(text.encode())
    status, *words = ask.recv(4096).decode().split()
    assert status == "ok", words
    return words
blades = call(f"attach {{os.getpid()}} /none")
for blade in blades:
    call(f"connect {{blade}} 1 2 " + socket.inet_pton(socket.AF_INET6, "::ffff:10.77.0.2").hex())
regions = b""
for _ in range(2):
    blade, address, rkey = map(int, call(f"region {{REGION}} 1"))
    print(address, flush=True)
    regions += struct.pack("<IIQIIQI4x", blade, rkey, address, 0xffffffff, 0, 0, 1024)
input()

libc = ctypes.CDLL(None, use_errno=True)
uffd = libc.syscall(323, os.O_CLOEXEC | os.O_NONBLOCK)
fcntl.ioctl(uffd, 0xc018aa3f, bytearray(struct.pack("<QQQ", 0xaa, 0, 0)))
memory = mmap.mmap(-1, 2 * REGION, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
fcntl.ioctl(uffd, 0xc020aa00, bytearray(struct.pack("<QQQQ", base, 2 * REGION, 1, 0)))
def file(contents):
    made = os.memfd_create("")
    os.write(made, contents)
    return made
bits = bytearray(256)
for page in NEEDED:
    bits[page // 8] |= 1 << page % 8
heir = struct.pack("<QQQQ", int(sys.argv[2]), base, 2048, 32) + bits
for number in ("1", "2"):
    socket.send_fds(ask, [f"heir {{number}}".encode()], [uffd, file(heir), file(regions)])
ask.send(b"forgo 1")
ask.close()  # as if it were killed; its child has this memory
print(hashlib.md5(memory[:]).hexdigest())
"""


@pytest.fixture(scope="module")
def rack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rack]:
    made = Rack(tmp_path_factory.mktemp("heirs"), ("gm0", "pb0", "mb0", "mb1"))
    yield made
    made.close()


def start(rack: Rack, settled: int) -> tuple[subprocess.Popen[str], bytes]:
    """The program, that has its regions filled; and what its child must see."""
    command = [sys.executable, "-c", PROGRAM, str(rack["pb0"].desk_path), str(settled)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    expected = bytearray(2 * REGION)
    for index in range(2):
        address = int(process.stdout.readline())
        contents = random.Random(index).randbytes(REGION)
        ctypes.memmove(address, contents, REGION)
        for page in NEEDED:
            if page // 1024 == index:
                there = page % 1024 * PAGE
                expected[page * PAGE : (page + 1) * PAGE] = contents[there : there + PAGE]
    return process, bytes(expected)


def nothing_is_held(rack: Rack) -> bool:
    return all(rack[name].monitor.stats({})["connections"] == 0 for name in ("mb0", "mb1"))


def childrens_files() -> list[str]:
    """Descriptors that came with children."""
    links = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            links.append(os.readlink(f"/proc/self/fd/{name}"))
    return [link for link in links if "userfaultfd" in link or "memfd" in link]


def test_a_child_gets_what_its_parent_left_and_all_goes_back(rack: Rack) -> None:
    process, expected = start(rack, 1)
    assert not nothing_is_held(rack)
    printed, _ = process.communicate("go\n", timeout=60)
    assert (process.returncode, printed.strip()) == (0, hashlib.md5(expected).hexdigest())
    eventually(lambda: nothing_is_held(rack))
    eventually(lambda: not rack["mb0"].node._accepted and not rack["mb1"].node._accepted)
    eventually(lambda: not childrens_files())


def test_what_had_not_been_stored_is_sigbus(rack: Rack) -> None:
    process, _ = start(rack, 0)
    assert (process.communicate("go\n", timeout=60)[0], process.returncode) == ("", -7)
    eventually(lambda: nothing_is_held(rack))


@pytest.mark.long
def test_a_child_whose_memory_blade_has_died_is_not_given_zeros(rack: Rack, tmp_path: Path) -> None:
    own = Rack(tmp_path, ("gm0", "pb0", "mb0"))
    process, _ = start(own, 1)
    own["mb0"].kill()
    eventually(lambda: own["pb0"].lender.life("mb0") is None)
    assert (process.communicate("go\n", timeout=60)[0], process.returncode) == ("", -7)
    own.close()
