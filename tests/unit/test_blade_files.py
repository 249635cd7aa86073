"""A blade's disk and persistent memory on the host, and what a failing build of an image says."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator import blade_files
from orchestrator.errors import RacklessError
from orchestrator.events import ignore
from orchestrator.image import build
from orchestrator.rackfile import validate
from orchestrator.settings import RackPaths, Settings
from orchestrator.spec import BladeSpec, make_spec


@pytest.fixture
def paths(tmp_path: Path) -> RackPaths:
    return RackPaths(Settings.from_environment({"HOME": str(tmp_path), "RACKLESS_STATE": str(tmp_path)}), "t1")


@pytest.fixture
def spec() -> BladeSpec:
    rack = validate({
        "name": "t1",
        "blades": {
            "gm0": {"kind": "manager", "memory": "256 MiB"},
            "sb0": {"kind": "storage", "memory": "256 MiB", "disk": {"size": "64 MiB"}},
        },
    })  # fmt: skip
    return replace(make_spec(rack, "sb0", 1, "key"), pmem=2 << 20)


def test_a_disk_has_a_file_system_and_takes_no_room(paths: RackPaths, spec: BladeSpec) -> None:
    blade_files.make(paths, spec)
    files = paths.blade("sb0")
    assert files.root.stat().st_mode & 0o777 == 0o700
    assert (files.disk.stat().st_size, files.pmem.stat().st_size) == (64 << 20, 2 << 20)
    assert files.disk.stat().st_blocks * 512 < 8 << 20
    assert files.disk.read_bytes()[0x438:0x43A] == b"\x53\xef"  # ext4's magic
    assert subprocess.run(["e2fsck", "-fn", files.disk], capture_output=True, check=False).returncode == 0


def test_what_is_there_is_kept(paths: RackPaths, spec: BladeSpec) -> None:
    blade_files.make(paths, spec)
    files = paths.blade("sb0")
    for file in (files.disk, files.pmem):
        with file.open("r+b") as opened:
            opened.seek(1 << 20)
            opened.write(b"precious")
    before = (files.disk.read_bytes(), files.pmem.read_bytes())
    blade_files.make(paths, spec)
    assert (files.disk.read_bytes(), files.pmem.read_bytes()) == before
    blade_files.make(paths, replace(spec, pmem=4 << 20))
    assert files.pmem.read_bytes() == files.pmem_vol.read_bytes() == bytes(4 << 20)
    assert files.disk.read_bytes() == before[0]


def test_the_persistent_memory_of_a_rack_of_before_is_what_survived(paths: RackPaths, spec: BladeSpec) -> None:
    """It had one file, of which nothing could be lost."""
    files = paths.blade("sb0")
    files.root.mkdir(parents=True)
    files.pmem.write_bytes(b"old" + bytes((2 << 20) - 3))
    blade_files.make(paths, spec)
    assert files.pmem.read_bytes() == files.pmem_vol.read_bytes() == b"old" + bytes((2 << 20) - 3)


def test_a_disk_half_made_by_a_killed_command_is_made_again(
    paths: RackPaths, spec: BladeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("subprocess.run", killed)
        with pytest.raises(KeyboardInterrupt):
            blade_files.make(paths, spec)
    assert not paths.blade("sb0").disk.exists()
    blade_files.make(paths, spec)
    assert paths.blade("sb0").disk.read_bytes()[0x438:0x43A] == b"\x53\xef"
    assert sorted(file.name for file in paths.blade("sb0").root.iterdir()) == ["disk.raw", "pmem.raw", "pmem.vol"]


def _no_tool(_work: Path, _report: object) -> None:
    subprocess.run(["rackless-no-such-tool"], check=True)


def _failing_tool(_work: Path, _report: object) -> None:
    subprocess.run(
        ["sh", "-c", "echo first >&2; echo disk quota exceeded >&2; exit 3"], check=True, capture_output=True
    )


def _full_disk(_work: Path, _report: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("make", "message", "hint"),
    [
        (_no_tool, "cannot build the agents: there is no rackless-no-such-tool", "run `make setup`"),
        (_failing_tool, "ended with code 3", "disk quota exceeded"),
        (_full_disk, "No space left on device", "free some disk"),
    ],
)
def test_a_failing_build_is_one_line(
    tmp_path: Path, make: Callable[[Path, object], None], message: str, hint: str
) -> None:
    with pytest.raises(RacklessError) as caught:
        build._entry(ignore, "agents", tmp_path, "agents-1", make)
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")
    assert not (tmp_path / "agents-1").exists()
