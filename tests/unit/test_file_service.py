"""The storage blade's file service, called directly: every request, confinement, malformed input. No VM."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from guest_agents.splitkernel.storage import wire
from guest_agents.splitkernel.storage.confine import open_beneath
from guest_agents.splitkernel.storage.files import Files
from guest_agents.splitkernel.storage.kept import KEPT_OPEN, Kept
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

    def read(self, path: str, **numbers: Any) -> bytes:
        """The data of a READ."""
        return self(Op.READ, path, **numbers)[wire.VERSION_BYTES :]


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
    made = wire.unpack_attributes(service(Op.CREATE, "a", a=stat.S_IFREG | 0o666, **_own()))
    assert stat.S_IMODE(made.mode) == 0o666  # the client's kernel has applied the program's umask, not the agent's
    assert _errno(service, Op.CREATE, "a", a=stat.S_IFREG | 0o666, **_own()) == errno.EEXIST
    assert wire.WRITTEN.unpack_from(service(Op.WRITE, "a", a=3, data=b"hello")) == (5, 3, 0)
    assert (root / "a").read_bytes() == b"\0\0\0hello"
    assert service.read("a", a=4, b=100) == b"ello"
    assert wire.unpack_attributes(service(Op.TRUNCATE, "a", a=5)).size == 5
    service(Op.FSYNC, "a")
    service(Op.FSYNC, "a", flags=1)
    service(Op.FSYNC, "")
    both = wire.SET_ATIME | wire.SET_MTIME
    touched = wire.unpack_attributes(service(Op.UTIMENS, "a", a=-1_000_000_001, b=2_000_000_002, flags=both))
    assert (touched.atime, touched.mtime) == (-1_000_000_001, 2_000_000_002)
    touched = wire.unpack_attributes(service(Op.UTIMENS, "a", flags=wire.SET_MTIME_NOW))
    assert touched.atime == -1_000_000_001
    assert touched.mtime > 10**18
    assert stat.S_IMODE(wire.unpack_attributes(service(Op.CHMOD, "a", a=0o600)).mode) == 0o600
    assert wire.unpack_attributes(service(Op.OPEN, "a", flags=os.O_TRUNC)).size == 0
    service(Op.UNLINK, "a")
    assert _errno(service, Op.GETATTR, "a") == errno.ENOENT


def test_directories_and_links(service: Service, root: Path) -> None:
    service(Op.MKDIR, "d", a=0o755, **_own())
    service(Op.CREATE, "d/f", a=stat.S_IFREG | 0o644, **_own())
    service(Op.SYMLINK, "s", "d/f", **_own())
    service(Op.LINK, "d/f", "hard")
    assert service(Op.READLINK, "s") == b"d/f"
    names = [name for _, _, name in wire.unpack_entries(service(Op.READDIR, ""))]
    assert names == [b"d", b"hard", b"s"]
    assert [k for _, k, _ in wire.unpack_entries(service(Op.READDIR, ""))] == [4, 8, 10]
    assert [n for _, _, n in wire.unpack_entries(service(Op.READDIR, "", "hard"))] == [b"s"]
    assert _errno(service, Op.RMDIR, "d") == errno.ENOTEMPTY
    service(Op.RENAME, "d/f", "g")
    assert _errno(service, Op.RENAME, "g", "hard", flags=1) == errno.EEXIST  # RENAME_NOREPLACE
    service(Op.RMDIR, "d")
    assert wire.STATFS.unpack(service(Op.STATFS, ""))[0] > 0


def test_a_renamed_or_replaced_file_is_not_the_one_kept_open(service: Service, root: Path) -> None:
    (root / "a").write_text("old")
    assert service.read("a", b=9) == b"old"
    (root / "b").write_text("new")
    os.rename(root / "b", root / "a")  # behind the service's back
    assert service.read("a", b=9) == b"new"
    service(Op.RENAME, "a", "c")
    assert _errno(service, Op.READ, "a", b=9) == errno.ENOENT
    assert service.read("c", b=9) == b"new"


def test_few_files_stay_open(service: Service, root: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for number in range(3 * KEPT_OPEN):
        (root / f"f{number}").write_text(str(number))
        assert service.read(f"f{number}", b=9) == str(number).encode()
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
    reads_a_link_itself = {Op.GETATTR, Op.UNLINK}
    if op is Op.CHMOD and path in ("up", "abs", "proc"):
        assert _errno(service, op, path, a=0o777) == errno.EOPNOTSUPP
    elif op in reads_a_link_itself and path in ("up", "abs", "proc"):
        service(op, path)
    else:
        with pytest.raises(OSError):
            service(op, path, a=stat.S_IFREG if op is Op.CREATE else 0, b=100, data=b"x" if op == Op.WRITE else b"")
    assert (root.parent / "outside").read_text() == "secret"
    assert stat.S_IMODE((root.parent / "outside").stat().st_mode) != 0o777


@pytest.mark.long
def test_races_lead_nowhere(root: Path) -> None:
    """Folders and symbolic links change places all the time, as fast as one program can, while others use them."""
    inside, outside = root / "inside", root.parent
    (outside / "d").mkdir()
    (outside / "d" / "f").write_text("secret")
    (outside / "d" / "f").chmod(0o600)
    before = _everything(outside, but=root)
    inside.mkdir()
    (inside / "d").mkdir()
    (inside / "d" / "f").write_text("public")
    (inside / "link").symlink_to("../../d")  # to a folder outside
    (inside / "far").symlink_to(outside / "d")
    (inside / "chain").symlink_to("link")
    (inside / "f").write_text("public")
    (inside / "to").symlink_to("../../outside")
    pairs = [("d", "link"), ("d", "far"), ("d", "chain"), ("f", "to")]
    stop = threading.Event()
    swaps = [0]

    def swap() -> None:
        libc, fd = ctypes.CDLL(None), os.open(inside, os.O_RDONLY)
        while not stop.is_set():
            one, other = pairs[swaps[0] // 2 % len(pairs)]
            libc.renameat2(fd, one.encode(), fd, other.encode(), 2)
            swaps[0] += 1
        os.close(fd)

    steps: list[tuple[Op, str, str, bytes, dict[str, int]]] = [
        (Op.READ, "inside/d/f", "", b"", {"b": 100}),
        (Op.WRITE, "inside/d/f", "", b"public", {}),
        (Op.READ, "inside/f", "", b"", {"b": 100}),
        (Op.WRITE, "inside/f", "", b"public", {}),
        (Op.OPEN, "inside/f", "", b"", {}),
        (Op.TRUNCATE, "inside/d/f", "", b"", {"a": 6}),
        (Op.CHMOD, "inside/d/f", "", b"", {"a": 0o644}),
        (Op.CHOWN, "inside/d/f", "", b"", {"a": os.getuid(), "b": os.getgid()}),
        (Op.UTIMENS, "inside/d/f", "", b"", {"flags": wire.SET_ATIME_NOW | wire.SET_MTIME_NOW}),
        (Op.READDIR, "inside/d", "", b"", {}),
        (Op.LOOK, "inside/d", "", b"f\0../f\0", {}),
        (Op.CREATE, "inside/d/g", "", b"", {"a": stat.S_IFREG | 0o600, **_own()}),
        (Op.MKDIR, "inside/d/h", "", b"", {"a": 0o700, **_own()}),
        (Op.SYMLINK, "inside/d/s", "f", b"", _own()),
        (Op.LINK, "inside/d/f", "inside/d/l", b"", {}),
        (Op.RENAME, "inside/d/l", "inside/d/m", b"", {}),
        (Op.FSYNC, "inside/d/f", "", b"", {}),
        *((Op.UNLINK, f"inside/d/{name}", "", b"", {}) for name in "gslm"),
        (Op.RMDIR, "inside/d/h", "", b"", {}),
    ]  # fmt: skip
    service, done, refused = Service(root), 0, 0
    mover = threading.Thread(target=swap)
    mover.start()
    try:
        for number in range(8000):
            op, path, second, data, numbers = steps[number % len(steps)]
            try:
                reply = service(op, path, second, data, **numbers)
            except OSError:
                refused += 1
            else:
                done += 1
                assert b"secret" not in reply
    finally:
        stop.set()
        mover.join()
    assert _everything(outside, but=root) == before
    assert done > 100  # both happened, many times
    assert refused > 100
    assert swaps[0] > 1000


def _everything(folder: Path, but: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        if path == folder or but in (path, *path.parents):
            continue
        status = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        found[str(path)] = content, status.st_mode, status.st_nlink, status.st_uid, status.st_mtime_ns
    return found


def test_a_request_says_which_file_it_means(service: Service, root: Path) -> None:
    (root / "a").write_text("a")
    (root / "b").write_text("b")
    meant = wire.unpack_attributes(service(Op.GETATTR, "a")).identity
    assert service.read("a", b=9, identity=meant) == b"a"
    os.rename(root / "b", root / "a")
    for op in (Op.READ, Op.WRITE, Op.GETATTR, Op.OPEN, Op.TRUNCATE, Op.FSYNC, Op.CHMOD, Op.CHOWN, Op.UTIMENS, Op.SEEK,
               Op.FALLOCATE, Op.READLINK):  # fmt: skip
        flags = {Op.SEEK: os.SEEK_DATA}.get(op, 0)
        assert _errno(service, op, "a", identity=meant, flags=flags, b=1) == errno.ESTALE
    assert (root / "a").read_text() == "b"


def test_no_two_files_are_the_same_one_after_the_other(service: Service, root: Path) -> None:
    seen = set()
    for _ in range(50):  # most file systems give the inode number away again at once
        (root / "f").write_text("x")
        seen.add(wire.unpack_attributes(service(Op.GETATTR, "f")).identity)
        (root / "f").unlink()
    assert len(seen) == 50


def test_every_change_has_another_time(service: Service, root: Path) -> None:
    (root / "f").touch()
    times = []
    for number in range(200):
        service(Op.WRITE, "f", data=bytes([number]))
        times.append((root / "f").stat().st_mtime_ns)
    assert sorted(set(times)) == times
    fd = os.open(root / "f", os.O_RDWR)
    with Kept(fd, (0, 0), 0).changing():
        os.utime(fd, ns=(times[-1], times[-1]))  # as a write in the same tick would leave it
    assert os.fstat(fd).st_mtime_ns > times[-1]
    os.close(fd)
    os.utime(root / "f", ns=(10**18 * 4, 10**18 * 4))  # in the year 2096
    service(Op.WRITE, "f", data=b"x")
    assert (root / "f").stat().st_mtime_ns < 10**18 * 3


def test_what_is_read_in_the_middle_of_a_change_is_not_said_to_be_of_after(service: Service, root: Path) -> None:
    """Its version would be that of after the change, and its data might be of before."""
    (root / "f").write_bytes(b"old")
    seen: list[bytes] = []
    reading = threading.Thread(target=lambda: seen.append(service(Op.READ, "f", b=3)))
    with service.files._kept.file("f") as file:
        with file.changing():
            reading.start()
            reading.join(0.1)  # it waits
            os.pwrite(file.fd, b"new", 0)
        reading.join()
        after = wire.version_of(os.fstat(file.fd)).pack()
    assert seen == [after + b"new"]


def test_a_new_file_gets_the_group_of_a_set_group_id_folder(service: Service, root: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("giving files away needs root")
    (root / "d").mkdir()
    os.chown(root / "d", 0, 4321)
    (root / "d").chmod(0o2775)
    made = wire.unpack_attributes(service(Op.CREATE, "d/f", a=stat.S_IFREG | 0o4755, b=1234, c=1234))
    assert (made.uid, made.gid, stat.S_IMODE(made.mode)) == (1234, 4321, 0o4755)
    made = wire.unpack_attributes(service(Op.MKDIR, "d/e", a=0o755, b=1234, c=1234))
    assert (made.uid, made.gid, stat.S_IMODE(made.mode)) == (1234, 4321, 0o2755)


@pytest.mark.parametrize("name", ["..", ".", "d/..", "d/.", "", "d/"])
def test_names_that_are_none(service: Service, root: Path, name: str) -> None:
    (root / "d").mkdir()
    for op in (Op.UNLINK, Op.RMDIR, Op.MKDIR, Op.SYMLINK, Op.RENAME):
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
