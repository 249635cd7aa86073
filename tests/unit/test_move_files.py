"""Files move from one storage blade to another: the copies, the end of it, and what ends it early. No VM, no RDMA."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from guest_agents.splitkernel.storage import arrival, wire
from guest_agents.splitkernel.storage.arrival import Arrival, LateError
from guest_agents.splitkernel.storage.files import Files
from guest_agents.splitkernel.storage.hold import Hold
from guest_agents.splitkernel.storage.wire import Op

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="owners and identities are set by root")


class Service:
    """A caller of the files below a directory; `before` is called with each opcode and path."""

    def __init__(self, root: Path) -> None:
        self.files = Files(root)
        self.before: Callable[[int, str], None] = lambda _op, _path: None

    def call(
        self, opcode: int, first: bytes, second: bytes | memoryview = b"", into: Callable[..., Any] | None = None
    ) -> Any:
        self.before(opcode, wire.decode(first).path)
        out = memoryview(bytearray((1 << 20) + (8 << 10)))
        head, data = self.files.handle(opcode, memoryview(first), memoryview(second), out)
        return into(out[:head], out[head : head + data]) if into else None

    def identity(self, path: str) -> int:
        got: list[bytes] = []
        self.call(Op.GETATTR, wire.encode(path), b"", lambda head, _data: got.append(bytes(head)))
        return wire.unpack_attributes(got[0]).identity


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Of everything something."""
    root = tmp_path / "old"
    (root / "web/deep/er").mkdir(parents=True)
    (root / "lost+found").mkdir()
    (root / "web/text").write_text("hello\n" * 1000)
    (root / "web/deep/er/empty").touch()
    os.link(root / "web/text", root / "web/deep/twin")
    os.symlink("../nowhere", root / "web/link")
    os.mkfifo(root / "web/fifo")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(root / "web/sock"))
    with (root / "web/holes").open("wb") as out:
        out.seek(3 << 20)
        out.write(os.urandom((1 << 20) + 17))
        out.truncate(9 << 20)
    os.chown(root / "web/text", 1234, 4321)
    os.chmod(root / "web/text", 0o4750)
    os.chmod(root / "web/deep", 0o2711)
    os.utime(root / "web/text", ns=(1_000_000_001, 2_000_000_002))
    os.utime(root / "web/deep", ns=(3, 4))
    os.utime(root / "web/link", ns=(5, 6), follow_symlinks=False)
    (root / os.fsdecode(b"web/\xff name")).write_bytes(b"x")
    kept = root / wire.ATTIC / "pb0/0123"  # removed by a program that has it open
    kept.parent.mkdir(parents=True)
    kept.write_text("open")
    (root / wire.ATTIC / "pb1").mkdir()
    return root


@pytest.fixture
def new(tmp_path: Path) -> Path:
    root = tmp_path / "new"
    root.mkdir()
    return root


def told(root: Path) -> dict[str, Any]:
    """All that a program can see of a tree, but for inode numbers, ctime, and atime, which reading sets here."""
    seen: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if name in ("lost+found", wire.ATTIC) or name.startswith(f"{wire.ATTIC}/."):
            continue
        if path.parent.name == wire.ATTIC:
            continue  # each blade's own
        status = path.lstat()
        what: Any = None
        if stat.S_ISREG(status.st_mode):
            what = path.read_bytes()
        elif stat.S_ISLNK(status.st_mode):
            what = os.readlink(path)
        links = status.st_nlink if not path.is_dir() else 0
        seen[name] = (oct(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns, links, what)
    return seen


def test_everything_comes_as_it_was(old: Path, new: Path) -> None:
    service = Service(old)
    before = told(old)
    known = {name: service.identity(name) for name in before}
    made = Arrival(new, "sb1", service)
    assert made.fetch(60)
    assert told(new) == {}, "nobody sees it yet"
    made.publish("t", 60)
    after = told(new)
    assert after == before
    assert (new / "web/holes").stat().st_blocks * 512 < 3 << 20, "holes are holes"
    there = Service(new)
    assert {name: there.identity(name) for name in known} == known
    arrival.forget(made.stage)
    assert told(new) == before
    assert not list((new / wire.ATTIC).glob(".*"))
    assert (new / wire.ATTIC / "pb1").is_dir(), "pb1 will not make it again"


def test_what_changes_meanwhile_comes_too(old: Path, new: Path) -> None:
    made = Arrival(new, "sb1", Service(old))
    assert made.fetch(60)
    (old / "web/text").write_text("other")
    os.rename(old / "web/holes", old / "web/deep/moved")
    os.unlink(old / "web/fifo")
    os.rename(old / "web/deep/er", old / "upper")
    (old / "upper/late").write_text("late")
    os.chmod(old / "upper", 0o700)
    with (old / "upper/empty").open("w") as out:  # size and times are as before, contents are not
        out.write("")
    same = (old / "web/deep/twin").stat()
    (old / "web/deep/twin").write_text("OTHER")
    os.utime(old / "web/deep/twin", ns=(same.st_atime_ns, same.st_mtime_ns))
    made.publish("t", 60)
    assert told(new) == told(old)


def test_a_file_that_is_written_while_it_is_copied_is_never_torn(
    old: Path, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrival, "QUIET_SECONDS", 0.0)  # so that it looks again and again
    service = Service(old)
    big = old / "web/big"
    big.write_bytes(b"a" * (3 << 20))
    writes: list[int] = []

    def write(op: int, path: str) -> None:
        if op == Op.READ and path == "web/big" and len(writes) < 3:
            writes.append(op)
            letter = b"bcd"[len(writes) - 1 : len(writes)]
            Service(old).call(Op.WRITE, wire.encode(path, a=(len(writes) - 1) << 20), letter * (1 << 20))

    service.before = write
    made = Arrival(new, "sb1", service)
    made.fetch(60)
    made.publish("t", 60)
    assert (new / "web/big").read_bytes() == big.read_bytes()
    assert len(writes) == 3


def test_withdrawn_files_leave_nothing(old: Path, new: Path) -> None:
    (new / "db").mkdir()
    before = told(new)
    made = Arrival(new, "sb1", Service(old))
    made.fetch(60)
    made.publish("t", 60)
    assert arrival.published(made.stage) == "t"
    arrival.withdraw(made.stage)
    assert told(new) == before
    assert arrival.stages(new) == []
    again = Arrival(new, "sb1", Service(old))
    again.fetch(60)
    again.publish("t2", 60)
    assert (new / "web/text").read_bytes() == (old / "web/text").read_bytes()


def test_a_name_that_is_taken_stays_what_it_is(old: Path, new: Path) -> None:
    made = Arrival(new, "sb1", Service(old))
    made.fetch(60)
    (new / "web").write_text("mine")
    with pytest.raises(FileExistsError):
        made.publish("t", 60)
    arrival.withdraw(made.stage)
    assert (new / "web").read_text() == "mine"
    assert sorted(os.listdir(new)) == [wire.ATTIC, "web"]


def test_the_last_look_has_an_end(old: Path, new: Path) -> None:
    made = Arrival(new, "sb1", Service(old))
    made.fetch(60)
    with pytest.raises(LateError):
        made.publish("t", -1)
    arrival.withdraw(made.stage)
    assert os.listdir(new / wire.ATTIC) == []


def test_a_failing_disk_is_no_move(old: Path, new: Path) -> None:
    service = Service(old)

    def fail(op: int, path: str) -> None:
        if op == Op.READ and path == "web/text":
            raise OSError(errno.EIO, "broken")

    service.before = fail
    with pytest.raises(OSError, match="broken"):
        Arrival(new, "sb1", service).fetch(60)


def test_a_blade_that_is_held_answers_nobody_also_after_a_restart(old: Path) -> None:
    hold = Hold(old)
    with hold.passing():
        pass
    hold.hold("t")
    for held in (hold, Hold(old)):
        assert held.token == "t"
        with pytest.raises(OSError, match="moving") as refused, held.passing():
            pass
        assert refused.value.errno == wire.NOT_NOW
    with pytest.raises(OSError, match="not over"):
        hold.hold("other")
    hold.release()
    with Hold(old).passing():
        pass
