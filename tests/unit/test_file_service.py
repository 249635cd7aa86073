"""The storage blade's file service, called directly: every request, confinement, malformed input. No VM."""

from __future__ import annotations

import errno
import os
import random
import stat
from pathlib import Path
from typing import Any

import pytest

from guest_agents.splitkernel.storage import wire
from guest_agents.splitkernel.storage.confine import open_beneath
from guest_agents.splitkernel.storage.files import KEPT_OPEN, Files
from guest_agents.splitkernel.storage.wire import Op


class Service:
    """Calls the service as the RPC layer does."""

    def __init__(self, root: Path) -> None:
        self.files = Files(root)

    def raw(self, opcode: int, first: bytes, second: bytes = b"") -> bytes:
        out = memoryview(bytearray(2 << 20))
        head, data = self.files.handle(opcode, memoryview(first), memoryview(second), out)
        return bytes(out[: head + data])

    def __call__(self, op: Op, path: str, second: str = "", data: bytes = b"", **numbers: int) -> bytes:
        return self.raw(op, wire.encode(path, second, **numbers), data)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "outside").write_text("secret")
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def service(root: Path) -> Service:
    return Service(root)


def _own() -> Any:
    return {"b": os.getuid(), "c": os.getgid()}


def test_a_file_lives(service: Service, root: Path) -> None:
    made = wire.unpack_attributes(service(Op.CREATE, "a", a=0o640, **_own()))
    assert stat.S_IMODE(made.mode) == 0o640 & ~_umask()
    service(Op.WRITE, "a", a=3, data=b"hello")
    assert (root / "a").read_bytes() == b"\0\0\0hello"
    assert service(Op.READ, "a", a=4, b=100) == b"ello"
    assert wire.unpack_attributes(service(Op.TRUNCATE, "a", a=5)).size == 5
    service(Op.FSYNC, "a")
    service(Op.FSYNC, "a", flags=1)
    service(Op.FSYNC, "")
    touched = wire.unpack_attributes(service(Op.UTIMENS, "a", a=1_000_000_001, b=2_000_000_002))
    assert (touched.atime, touched.mtime) == (1_000_000_001, 2_000_000_002)
    assert stat.S_IMODE(wire.unpack_attributes(service(Op.CHMOD, "a", a=0o600)).mode) == 0o600
    assert wire.unpack_attributes(service(Op.OPEN, "a", flags=os.O_TRUNC)).size == 0
    service(Op.UNLINK, "a")
    assert _errno(service, Op.GETATTR, "a") == errno.ENOENT


def test_directories_and_links(service: Service, root: Path) -> None:
    service(Op.MKDIR, "d", a=0o755, **_own())
    service(Op.CREATE, "d/f", a=0o644, **_own())
    service(Op.SYMLINK, "s", "d/f", **_own())
    service(Op.LINK, "d/f", "hard")
    assert service(Op.READLINK, "s") == b"d/f"
    names = [name for _, _, name in wire.unpack_entries(service(Op.READDIR, ""))]
    assert names == [b"d", b"hard", b"s"]
    assert [k for _, k, _ in wire.unpack_entries(service(Op.READDIR, ""))] == [4, 8, 10]
    assert [n for _, _, n in wire.unpack_entries(service(Op.READDIR, "", a=2))] == [b"s"]
    assert _errno(service, Op.RMDIR, "d") == errno.ENOTEMPTY
    service(Op.RENAME, "d/f", "g")
    assert _errno(service, Op.RENAME, "g", "hard", flags=1) == errno.EEXIST  # RENAME_NOREPLACE
    service(Op.RMDIR, "d")
    assert wire.STATFS.unpack(service(Op.STATFS, ""))[0] > 0


def test_a_renamed_or_replaced_file_is_not_the_one_kept_open(service: Service, root: Path) -> None:
    (root / "a").write_text("old")
    assert service(Op.READ, "a", b=9) == b"old"
    (root / "b").write_text("new")
    os.rename(root / "b", root / "a")  # behind the service's back
    assert service(Op.READ, "a", b=9) == b"new"
    service(Op.RENAME, "a", "c")
    assert _errno(service, Op.READ, "a", b=9) == errno.ENOENT
    assert service(Op.READ, "c", b=9) == b"new"


def test_few_files_stay_open(service: Service, root: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for number in range(3 * KEPT_OPEN):
        (root / f"f{number}").write_text(str(number))
        assert service(Op.READ, f"f{number}", b=9) == str(number).encode()
    assert len(os.listdir("/proc/self/fd")) <= before + KEPT_OPEN


@pytest.mark.parametrize(
    "path",
    ["..", "../outside", "d/../../outside", "/etc/passwd", "link/x", "up", "abs", "d/up/x", "/", "//etc", "proc"],
)
@pytest.mark.parametrize("op", [Op.GETATTR, Op.READ, Op.WRITE, Op.TRUNCATE, Op.OPEN, Op.UNLINK, Op.CREATE, Op.CHMOD])
def test_nothing_outside_is_reached(service: Service, root: Path, path: str, op: Op) -> None:
    (root / "d").mkdir()
    (root / "link").symlink_to("..")
    (root / "up").symlink_to("../outside")
    (root / "abs").symlink_to("/etc/passwd")
    (root / "d" / "up").symlink_to("../..")
    (root / "proc").symlink_to("/proc/self/root/etc/passwd")
    reads_a_link_itself = {Op.GETATTR, Op.UNLINK, Op.CHMOD}
    if op in reads_a_link_itself and path in ("up", "abs", "proc"):
        service(op, path, a=0o777)
    else:
        with pytest.raises(OSError):
            service(op, path, a=0, b=100, data=b"x" if op == Op.WRITE else b"")
    assert (root.parent / "outside").read_text() == "secret"
    assert stat.S_IMODE((root.parent / "outside").stat().st_mode) != 0o777


@pytest.mark.parametrize("name", ["..", ".", "d/..", "d/.", "", "d/"])
def test_names_that_are_none(service: Service, root: Path, name: str) -> None:
    (root / "d").mkdir()
    for op in (Op.UNLINK, Op.RMDIR, Op.MKDIR, Op.SYMLINK, Op.READLINK):
        assert _errno(service, op, name) == errno.EINVAL
    assert (root / "d").is_dir()


def test_special_files_are_refused(service: Service, root: Path) -> None:
    os.mkfifo(root / "fifo")
    assert _errno(service, Op.READ, "fifo", b=1) == errno.EINVAL  # and does not block
    assert _errno(service, Op.READ, "", b=1) == errno.EISDIR


def test_random_messages_never_do_more_than_fail(service: Service, root: Path) -> None:
    (root / "a").write_text("x")
    numbers = random.Random(7)
    good = wire.encode("a", "b", 1, 2, 3, 4)
    for _ in range(3000):
        message = bytearray(good if numbers.random() < 0.7 else numbers.randbytes(numbers.randrange(80)))
        for _ in range(numbers.randrange(4)):
            if message:
                message[numbers.randrange(len(message))] = numbers.randrange(256)
        del message[numbers.randrange(len(message) + 1) if numbers.random() < 0.2 else len(message) :]
        try:
            service.raw(numbers.randrange(25), bytes(message), numbers.randbytes(numbers.randrange(20)))
        except (OSError, OverflowError):
            continue
    assert (root.parent / "outside").read_text() == "secret"


def test_long_paths() -> None:
    with pytest.raises(OSError):
        wire.encode("x" * 5000)


def test_open_beneath_says_where_it_would_have_gone(root: Path) -> None:
    fd = os.open(root, os.O_PATH)
    with pytest.raises(OSError) as caught:
        open_beneath(fd, "../outside", os.O_RDONLY)
    assert caught.value.errno == errno.EXDEV
    os.close(fd)


def _errno(service: Service, op: Op, *args: Any, **numbers: Any) -> int | None:
    with pytest.raises(OSError) as caught:
        service(op, *args, **numbers)
    return caught.value.errno


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
