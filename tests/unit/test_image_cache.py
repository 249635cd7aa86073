"""The store of built things: damage is noticed, builders do not collide, an interrupted one leaves nothing built."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator import leftovers
from orchestrator.image import cache
from orchestrator.settings import Settings

ROOT = Path(__file__).parents[2]
NAME = "system-0123456789abcdef"
CONTENT = b"a blade's root" * 100

# A builder in a process of its own: writes half of an entry, says so, and goes on when it is told to.
BUILDER = """
import sys
from pathlib import Path
from orchestrator.image import cache

def build(work):
    (work / "data").write_bytes(b"half")
    with open(sys.argv[2], "a") as log:
        log.write("built\\n")
    print("building", flush=True)
    sys.stdin.read(1)
    (work / "data").write_bytes(b"whole")

print(cache.obtain(Path(sys.argv[1]), "thing-1", build).name, flush=True)
"""


class Builds:
    """Fills an entry, and counts how often."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, work: Path) -> None:
        self.count += 1
        (work / "folder").mkdir()
        (work / "folder/data").write_bytes(CONTENT)
        (work / "empty").write_bytes(b"")


@pytest.fixture
def builds() -> Builds:
    return Builds()


@pytest.fixture
def entry(tmp_path: Path, builds: Builds) -> Path:
    return cache.obtain(tmp_path, NAME, builds)


def _flip_a_byte(entry: Path) -> None:
    data = bytearray((entry / "folder/data").read_bytes())
    data[700] ^= 1
    (entry / "folder/data").write_bytes(data)


def _cut(file: str) -> Callable[[Path], None]:
    def damage(entry: Path) -> None:
        os.truncate(entry / file, (entry / file).stat().st_size // 2)

    return damage


def _unlink(file: str) -> Callable[[Path], None]:
    return lambda entry: (entry / file).unlink()


def _manifest(text: str) -> Callable[[Path], None]:
    def damage(entry: Path) -> None:
        (entry / cache.MANIFEST).write_text(text)

    return damage


DAMAGES = {
    "a byte of the same file": _flip_a_byte,
    "a truncated file": _cut("folder/data"),
    "a missing file": _unlink("folder/data"),
    "a missing empty file": _unlink("empty"),
    "half a manifest": _cut(cache.MANIFEST),
    "no manifest": _unlink(cache.MANIFEST),
    "an empty manifest": _manifest(""),
    "a manifest that is a list": _manifest("[]"),
    "a manifest of another shape": _manifest('{"files": {"empty": 0}}'),
}


def test_an_entry_is_built_once(tmp_path: Path, entry: Path, builds: Builds) -> None:
    assert cache.obtain(tmp_path, NAME, builds) == entry == tmp_path / NAME
    assert builds.count == 1
    assert (entry / "folder/data").read_bytes() == CONTENT
    manifest = json.loads((entry / cache.MANIFEST).read_text())
    assert sorted(manifest["files"]) == ["empty", "folder/data"]


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_entry_is_built_again(
    tmp_path: Path, entry: Path, builds: Builds, damage: Callable[[Path], None]
) -> None:
    damage(entry)
    assert not cache.verify(entry)
    assert cache.obtain(tmp_path, NAME, builds) == entry
    assert builds.count == 2
    assert cache.verify(entry, thorough=True)
    assert (entry / "folder/data").read_bytes() == CONTENT


def test_what_was_only_touched_is_accepted(tmp_path: Path, entry: Path, builds: Builds) -> None:
    os.utime(entry / "folder/data", ns=(1, 1))
    assert cache.verify(entry)
    cache.obtain(tmp_path, NAME, builds)
    assert builds.count == 1


def test_thorough_sees_damage_behind_an_unchanged_time(entry: Path) -> None:
    before = (entry / "folder/data").stat()
    _flip_a_byte(entry)
    os.utime(entry / "folder/data", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not cache.verify(entry, thorough=True)


@pytest.mark.parametrize("error", [RuntimeError("no mirror"), KeyboardInterrupt()])
def test_a_failing_build_leaves_nothing(tmp_path: Path, builds: Builds, error: BaseException) -> None:
    def fail(work: Path) -> None:
        (work / "half").write_bytes(CONTENT)
        raise error

    with pytest.raises(type(error)):
        cache.obtain(tmp_path, NAME, fail)
    assert [path.name for path in tmp_path.iterdir()] == [f".{NAME}.lock"]
    cache.obtain(tmp_path, NAME, builds)
    assert builds.count == 1


def test_a_failing_rebuild_does_not_bring_the_damaged_entry_back(tmp_path: Path, entry: Path) -> None:
    _flip_a_byte(entry)

    def fail(_work: Path) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        cache.obtain(tmp_path, NAME, fail)
    assert not entry.exists()


def _start_builder(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER, folder, folder.parent / "log"],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def _says(builder: subprocess.Popen[str]) -> str:
    assert builder.stdout is not None
    return builder.stdout.readline().strip()


def test_two_processes_build_once(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    first = _start_builder(folder)
    assert _says(first) == "building"
    second = _start_builder(folder)
    with pytest.raises(subprocess.TimeoutExpired):  # it waits for the first one
        second.wait(0.5)
    assert not (folder / "thing-1").exists()
    assert first.communicate("x", timeout=30)[0] == "thing-1\n"
    assert second.communicate("", timeout=30)[0] == "thing-1\n"
    assert (tmp_path / "log").read_text() == "built\n"
    assert (folder / "thing-1/data").read_bytes() == b"whole"


def test_a_killed_builder_leaves_nothing_that_looks_built(tmp_path: Path) -> None:
    settings = replace(Settings.from_environment({"HOME": str(tmp_path)}), cache_dir=tmp_path / "cache",
                       state_dir=tmp_path / "state", run_dir=tmp_path / "run")  # fmt: skip
    folder = settings.cache_dir / "images"
    killed = _start_builder(folder)
    assert _says(killed) == "building"
    assert leftovers.find(settings) == []  # it is at work
    killed.kill()
    assert killed.wait(10) == -signal.SIGKILL
    killed.communicate()
    (left,) = folder.glob(".*.tmp*")
    assert leftovers.find(settings) == [leftovers.Leftover("folder", str(left))]
    assert not (folder / "thing-1").exists()

    builds = Builds()
    cache.obtain(folder, "thing-1", builds)
    assert builds.count == 1
    assert list(folder.glob(".*.tmp*")) == []
    assert leftovers.find(settings) == []


def test_leftovers_of_killed_builders_can_be_removed(tmp_path: Path) -> None:
    settings = replace(Settings.from_environment({"HOME": str(tmp_path)}), cache_dir=tmp_path / "cache",
                       state_dir=tmp_path / "state", run_dir=tmp_path / "run")  # fmt: skip
    gone = subprocess.Popen(["true"])
    gone.wait()
    dead = settings.cache_dir / f"templates/.template-1.tmp{gone.pid}"
    alive = settings.cache_dir / f"templates/.template-2.tmp{os.getpid()}"
    for folder in (dead, alive):
        folder.mkdir(parents=True)
        (folder / "state.save").write_bytes(b"x")
    leftovers.remove(settings, leftovers.find(settings))
    assert not dead.exists()
    assert alive.exists()


def test_a_waiting_builder_does_not_hold_up_other_entries(tmp_path: Path, builds: Builds) -> None:
    with cache.locked(tmp_path / ".other.lock"):
        started = time.monotonic()
        cache.obtain(tmp_path, NAME, builds)
    assert time.monotonic() - started < 5
