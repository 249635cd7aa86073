"""/vnode as programs see it: the real FUSE mount over the real file service, on this host. No VM."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from guest_agents.splitkernel.process import fuse
from tests.unit import fsx, vnode_mounts
from tests.unit.vnode_mounts import Mounts, mounted

pytestmark = [pytest.mark.long, pytest.mark.skipif(bool(vnode_mounts.missing()), reason=str(vnode_mounts.missing()))]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounts]:
    """Two processor blades with the files of one storage blade."""
    with mounted(tmp_path_factory.mktemp("two"), 2) as mounts:
        yield mounts


@pytest.fixture
def here(two: Mounts, request: pytest.FixtureRequest) -> Path:
    """A folder of this test's own on the first blade."""
    folder = two.blades[0] / str(request.node.name)
    folder.mkdir()
    return folder


@pytest.fixture
def there(two: Mounts, here: Path) -> Path:
    """The same folder on the second blade."""
    return two.blades[1] / here.name


# -- names --


def test_a_removed_file_lives_until_its_last_close(here: Path, two: Mounts) -> None:
    folder = here / "folder"
    folder.mkdir()
    with (folder / "f").open("w+") as file:
        file.write("still")
        file.flush()
        (folder / "f").unlink()
        folder.rmdir()  # it does not hide in there
        assert os.fstat(file.fileno()).st_nlink == 0
        file.write(" here")
        file.seek(0)
        assert file.read() == "still here"
        assert len(list(two.root.glob(".vnode-removed/pb0/*"))) == 1
    assert ".vnode-removed" not in os.listdir(two.blades[0])
    with pytest.raises(FileNotFoundError):
        (two.blades[0] / ".vnode-removed").stat()
    with pytest.raises(PermissionError):
        (two.blades[0] / ".vnode-removed").mkdir()
    _eventually(lambda: not list(two.root.glob(".vnode-removed/pb0/*")))  # the kernel says it after `close`


def test_a_failed_rename_leaves_the_open_target(here: Path) -> None:
    (here / "folder").mkdir()
    with (here / "target").open("w+") as file:
        with pytest.raises(NotADirectoryError):
            os.rename(here / "folder", here / "target")
        file.write("x")
    assert (here / "target").read_text() == "x"
    assert os.stat(here / "target").st_nlink == 1


def test_hard_links_are_one_file(here: Path) -> None:
    (here / "a").write_text("one")
    os.link(here / "a", here / "b")
    with (here / "a").open() as reader:
        assert reader.read() == "one"
        (here / "b").write_text("two!")
        reader.seek(0)
        assert reader.read() == "two!"
    assert os.path.samefile(here / "a", here / "b")
    (here / "a").unlink()
    assert os.stat(here / "b").st_nlink == 1


def test_exclusive_creation_has_one_winner(here: Path, there: Path) -> None:
    def make(folder: Path, number: int) -> bool:
        try:
            os.close(os.open(folder / f"lock{number}", os.O_CREAT | os.O_EXCL))
            return True
        except FileExistsError:
            return False

    with ThreadPoolExecutor(8) as threads:
        wins = list(threads.map(lambda n: make((here, there)[n % 2], n // 4), range(400)))
    assert sum(wins) == 100


def test_a_file_made_elsewhere_keeps_its_owner(here: Path, there: Path) -> None:
    def make(folder: Path, number: int) -> None:
        os.close(os.open(folder / f"f{number}", os.O_CREAT | os.O_WRONLY, 0o600))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda n: make((here, there)[n % 2], n // 4), range(400)))
    assert len(os.listdir(here)) == 100


def test_what_another_blade_replaces_is_another_file(here: Path, there: Path) -> None:
    (here / "f").write_text("old")
    with (here / "f").open("rb", buffering=0) as reader:
        (there / "new").write_text("new")
        os.rename(there / "new", there / "f")
        time.sleep(fuse.VALID_SECONDS)  # until then buffers may still know what it was
        with pytest.raises(OSError) as caught:
            reader.read()
        assert caught.value.errno == errno.ESTALE
    assert (here / "f").read_text() == "new"


def test_a_folder_moved_by_another_blade_is_followed(here: Path, there: Path) -> None:
    (here / "a").mkdir()
    with (here / "a" / "f").open("w+") as file:
        os.rename(there / "a", there / "b")
        assert (here / "b" / "f").exists()  # found again: with all that is open in it
        file.write("x")
        file.flush()
    assert (there / "b" / "f").read_text() == "x"


def test_renames_while_files_are_used(here: Path, two: Mounts) -> None:
    for name in "ab":
        (here / name).mkdir()
        (here / name / "f").write_text(name)
    stop = threading.Event()

    def exchange() -> None:
        side = fsx.Side(here)
        while not stop.is_set():
            side.rename("a", "b", fsx.RENAME_EXCHANGE)
        side.close()

    mover = threading.Thread(target=exchange)
    mover.start()
    two.tell("drag 0.001")  # what has happened at the storage blade is known here only after that
    try:
        with (here / "a" / "f").open("r+") as file:
            first = os.pread(file.fileno(), 1, 0)
            for number in range(150):
                os.pwrite(file.fileno(), first * 10, number)
                assert set(os.pread(file.fileno(), 10, number)) == set(first)
                assert os.fstat(file.fileno()).st_size == number + 10
    finally:
        two.tell("drag 0")
        stop.set()
        mover.join()


# -- folders --


def test_a_large_folder_is_listed_while_it_empties(here: Path) -> None:
    names = {f"{number:05}-{'x' * 40}" for number in range(3000)}
    for name in names:
        (here / name).touch()
    seen = set()
    with os.scandir(here) as entries:
        for entry in entries:
            seen.add(entry.name)
            os.unlink(entry)
    assert seen == names
    assert os.listdir(here) == []


def test_listings_tell_kinds_and_dots(here: Path) -> None:
    (here / "d").mkdir()
    (here / "f").touch()
    (here / "l").symlink_to("f")
    os.mkfifo(here / "p")
    with os.scandir(here) as entries:
        kinds = {e.name: (e.is_dir(follow_symlinks=False), e.is_file(follow_symlinks=False), e.is_symlink())
                 for e in entries}  # fmt: skip
    assert kinds == {"d": (True, False, False), "f": (False, True, False), "l": (False, False, True),
                     "p": (False, False, False)}  # fmt: skip
    assert subprocess.check_output(["ls", "-a", here], text=True).split() == [".", "..", "d", "f", "l", "p"]


def test_many_small_files(here: Path, there: Path) -> None:
    for number in range(1000):
        (here / str(number)).write_text(str(number))
    assert sorted(int((there / name).read_text()) for name in os.listdir(there)) == list(range(1000))
    subprocess.run(["rm", "-r", here], check=True)


# -- contents --


def test_appends_of_two_blades_are_all_there(here: Path, there: Path) -> None:
    (here / "log").touch()

    def append(folder: Path, who: str) -> None:
        with (folder / "log").open("a") as file:
            for number in range(300):
                file.write(f"{who} {number} {'.' * (number % 70)}\n")
                file.flush()

    with ThreadPoolExecutor(4) as threads:
        for folder, who in ((here, "a"), (there, "b"), (here, "c"), (there, "d")):
            threads.submit(append, folder, who)
    lines = (here / "log").read_text().splitlines()
    assert sorted(lines) == sorted(f"{who} {n} {'.' * (n % 70)}" for who in "abcd" for n in range(300))
    assert (there / "log").read_text().splitlines() == lines


def test_writers_at_places_of_their_own(here: Path, there: Path) -> None:
    def write(folder: Path, first: int) -> None:
        with (folder / "f").open("r+b", buffering=0) as file:
            for number in range(first, 400, 4):
                os.pwrite(file.fileno(), bytes([number % 251]) * 1000, number * 1000)

    (here / "f").touch()
    with ThreadPoolExecutor(4) as threads:
        for first in range(4):
            threads.submit(write, (here, there)[first % 2], first)
    wanted = b"".join(bytes([number % 251]) * 1000 for number in range(400))
    assert (here / "f").read_bytes() == (there / "f").read_bytes() == wanted


def test_a_reader_sees_each_write_of_another_blade_at_open(here: Path, there: Path) -> None:
    for number in range(300):  # of one size, and many within one tick of the clock that stamps them
        (here / "f").open("r+" if number else "w").write(f"{number:04}")
        assert (there / "f").read_text() == f"{number:04}"


def test_large_files_with_holes(here: Path) -> None:
    with (here / "f").open("w+b") as file:
        for place in (5 << 30, (1 << 40) - 10):
            os.pwrite(file.fileno(), b"far", place)
            assert os.pread(file.fileno(), 10, place) == b"far"
        assert os.pread(file.fileno(), 10, 3 << 30) == bytes(10)
        status = os.fstat(file.fileno())
        assert status.st_size == (1 << 40) - 7
        assert status.st_blocks < 1000
        assert os.lseek(file.fileno(), 0, os.SEEK_DATA) == 5 << 30
        file.truncate(6 << 30)
        assert os.lseek(file.fileno(), 5 << 30, os.SEEK_HOLE) <= (5 << 30) + 4096
        with pytest.raises(OSError) as caught:
            os.lseek(file.fileno(), 6 << 30, os.SEEK_DATA)
        assert caught.value.errno == errno.ENXIO


def test_mapped_files(here: Path, there: Path) -> None:
    data = random.Random(1).randbytes(100_000)
    (here / "f").write_bytes(data)
    with (here / "f").open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        assert mapped[:] == data
        mapped[50_000:50_005] = b"hello"
        assert os.pread(file.fileno(), 5, 50_000) == b"hello"
        mapped.flush()
        assert (there / "f").read_bytes()[50_000:50_005] == b"hello"
        os.pwrite(file.fileno(), b"world", 4096)
        assert mapped[4096:4101] == b"world"
    with (here / "f").open("a+b", buffering=0) as end:  # bypasses the page cache, and can be mapped all the same
        end.write(b"end")
        with mmap.mmap(end.fileno(), 0) as mapped:
            assert mapped[-3:] == b"end"
            mapped[0:5] = b"begin"
        assert os.pread(end.fileno(), 5, 0) == b"begin"


def test_locks_hold_among_the_programs_of_a_blade(here: Path, there: Path) -> None:
    take = "import fcntl, sys; fcntl.{}(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    (here / "f").touch()
    for kind in ("flock", "lockf"):
        with (here / "f").open("r+") as file:
            getattr(fcntl, kind)(file, fcntl.LOCK_EX)
            taking = [sys.executable, "-c", take.format(kind)]
            assert b"BlockingIOError" in subprocess.run([*taking, here / "f"], capture_output=True).stderr
            assert subprocess.run([*taking, there / "f"]).returncode == 0  # not on another blade: documented
        assert subprocess.run([*taking, here / "f"]).returncode == 0


def test_fifos_work_on_a_blade(here: Path) -> None:
    os.mkfifo(here / "pipe")
    with ThreadPoolExecutor(1) as threads:
        said = threads.submit((here / "pipe").read_text)
        (here / "pipe").write_text("through")
        assert said.result() == "through"


def test_what_is_not_supported_says_so(here: Path) -> None:
    (here / "f").touch()
    attempts: list[tuple[Callable[[], object], int]] = [
        (lambda: os.setxattr(here / "f", "user.x", b"1"), errno.EOPNOTSUPP),
        (lambda: os.mknod(here / "disk", stat.S_IFBLK | 0o600, os.makedev(8, 0)), errno.EPERM),
        (lambda: os.mkdir(here / ("x" * 256)), errno.ENAMETOOLONG),
    ]
    for attempt, number in attempts:
        with pytest.raises(OSError) as caught:
            attempt()
        assert caught.value.errno == number
    os.chdir(here)
    try:
        with pytest.raises(OSError) as caught:
            _until_it_fails(lambda _: _go_down("x" * 200))
        assert caught.value.errno == errno.ENAMETOOLONG  # 4095 bytes below /vnode
    finally:
        os.chdir("/")


# -- what goes wrong --


def test_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "storage").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=20", "small", tmp_path / "storage"], check=True)
    try:
        with mounted(tmp_path) as mounts:
            vnode = mounts.blades[0]
            with (vnode / "f").open("wb", buffering=0) as file, pytest.raises(OSError) as caught:
                _until_it_fails(lambda _: file.write(b"x" * 30_000))
            assert caught.value.errno == errno.ENOSPC
            assert (vnode / "f").read_bytes() == b"x" * (1 << 20)  # what fitted, and no more
            (vnode / "f").unlink()
            (vnode / "f").write_text("room again")
            with pytest.raises(OSError) as caught:
                _until_it_fails(lambda number: (vnode / f"d{number}").mkdir(mode=0o751))
            assert caught.value.errno == errno.ENOSPC
            made = set(vnode.glob("d*"))
            assert made == {vnode / f"d{number}" for number in range(len(made))}
            assert all(stat.S_IMODE(folder.stat().st_mode) == 0o751 for folder in made)
    finally:
        subprocess.run(["umount", "-l", tmp_path / "storage"], check=True)


def test_a_storage_blade_that_restarts_is_waited_for(here: Path, two: Mounts) -> None:
    with (here / "f").open("w+") as file, ThreadPoolExecutor(1) as threads:
        file.write("before ")
        file.flush()
        two.tell("down")

        def go_on() -> None:
            file.write("after")
            file.flush()
            os.fsync(file.fileno())
            (here / "g").touch()

        writing = threads.submit(go_on)
        two.tell("restart")
        two.tell("up")
        writing.result()
    assert (here / "f").read_text() == "before after"
    assert (here / "g").exists()


def test_answers_that_are_lost(here: Path, two: Mounts) -> None:
    (here / "f").write_text("f")
    (here / "d").mkdir()
    steps: list[tuple[str, Callable[[], object]]] = [
        ("GETATTR", lambda: (here / "new").exists()),
        ("OPEN", lambda: (here / "f").read_text()),
        ("WRITE", lambda: (here / "f").write_text("g")),
        ("RENAME", lambda: os.rename(here / "f", here / "g")),
        ("LINK", lambda: _unsure(lambda: os.link(here / "g", here / "h"))),
        ("UNLINK", lambda: (here / "h").unlink()),
        ("CHMOD", lambda: os.chmod(here / "g", 0o600)),
        ("TRUNCATE", lambda: os.truncate(here / "g", 1)),
        ("RMDIR", lambda: os.rmdir(here / "d")),
        ("UNLINK", lambda: (here / "g").unlink()),
        ("MKDIR", lambda: _unsure(lambda: os.mkdir(here / "e"))),
        ("CREATE", lambda: _unsure(lambda: os.open(here / "i", os.O_CREAT | os.O_EXCL))),
        ("WRITE", lambda: _unsure(lambda: _append(here / "i", b"once"))),
    ]
    for op, step in steps:
        two.tell(f"deaf {op}")
        step()
    assert sorted(os.listdir(here)) == ["e", "i"]
    assert (here / "i").read_bytes() == b"once"


def _unsure(step: Callable[[], object]) -> None:
    """Not EEXIST, which would say that somebody else was first, and not done twice."""
    with pytest.raises(OSError) as caught:
        step()
    assert caught.value.errno == errno.EIO


def _append(file: Path, data: bytes) -> None:
    with file.open("ab", buffering=0) as end:
        end.write(data)


def test_a_storage_blade_that_stays_away_is_an_error(tmp_path: Path) -> None:
    with mounted(tmp_path, patience=0.5) as mounts:
        file = mounts.blades[0] / "f"
        file.write_text("x")
        mounts.tell("down")
        for _ in range(3):
            with pytest.raises(OSError) as caught:
                file.read_text()
            assert caught.value.errno == errno.EIO
        mounts.tell("up")
        _eventually(lambda: _reads(file) == "x")


def test_an_agent_that_dies_leaves_nothing_behind(tmp_path: Path) -> None:
    with mounted(tmp_path) as mounts:
        file = (mounts.blades[0] / "f").open("w")
        file.write("x")
        file.flush()
        (mounts.blades[0] / "f").unlink()
        assert len(list(mounts.root.glob(".vnode-removed/pb0/*"))) == 1
        mounts.process.kill()
        mounts.process.wait()
        with pytest.raises(OSError) as caught:
            os.fsync(file.fileno())
        assert caught.value.errno == errno.ENOTCONN
        with pytest.raises(OSError):
            file.close()
    with mounted(tmp_path) as mounts, (mounts.blades[0] / "g").open("w"):
        (mounts.blades[0] / "g").unlink()
        assert len(list(mounts.root.glob(".vnode-removed/pb0/*"))) == 1  # this one


def test_a_subtree(tmp_path: Path) -> None:
    with mounted(tmp_path, top="vnodes/web") as mounts:
        vnode = mounts.blades[0]
        (vnode / "d").mkdir()
        with (vnode / "d" / "f").open("w+") as file:
            (vnode / "d" / "f").unlink()
            (vnode / "d").rmdir()
            file.write("x")
        (vnode / "f").write_text("mine")
        assert (mounts.root / "vnodes/web/f").read_text() == "mine"
        assert os.listdir(vnode) == ["f"]


def _until_it_fails(step: Callable[[int], object]) -> None:
    for number in range(1000):
        step(number)


def _go_down(name: str) -> None:
    os.mkdir(name)
    os.chdir(name)


def _reads(file: Path) -> str | None:
    try:
        return file.read_text()
    except OSError:
        return None


def _eventually(condition: Callable[[], bool]) -> None:
    """Wait until it holds; the test's time limit ends it if it never does."""
    pause = threading.Event()
    while not condition():
        pause.wait(0.05)
