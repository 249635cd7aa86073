"""Copies of files with holes, on file systems that can share blocks and on ones that cannot."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from orchestrator import sparse


def test_a_copy_keeps_its_holes(tmp_path: Path) -> None:
    source, target = tmp_path / "a.raw", tmp_path / "b.raw"
    sparse.make(source, 64 << 20)
    with source.open("r+b") as file:
        file.seek(32 << 20)
        file.write(b"here")
    sparse.copy(source, target)
    assert target.read_bytes() == source.read_bytes()
    assert sparse.used(target) <= sparse.used(source) < 1 << 20
    assert sparse.used(tmp_path / "none") == 0


@pytest.mark.parametrize("failure", [errno.EXDEV, errno.EOPNOTSUPP, None])
def test_a_copy_where_the_kernel_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: int | None) -> None:
    def cannot(*_: object) -> int:
        if failure:
            raise OSError(failure, os.strerror(failure))
        return 0

    monkeypatch.setattr(os, "copy_file_range", cannot)
    test_a_copy_keeps_its_holes(tmp_path)


def test_a_copy_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"data")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(OSError, match="No space left"):
        sparse.copy(tmp_path / "a", tmp_path / "b.raw")
    monkeypatch.setattr(os, "copy_file_range", lambda *_: 0)
    monkeypatch.setattr(os, "sendfile", lambda *_: 0)
    with pytest.raises(OSError, match="became shorter"):
        sparse.copy(tmp_path / "a", tmp_path / "b.raw")
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
