"""Copies of files that keep their holes, and share blocks with the original where the file system can."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_PAGE = 4096


def copy(source: Path, target: Path) -> None:
    """Copy a file with its holes; the target gets its name when it is whole."""
    fresh = target.with_suffix(".new")
    with source.open("rb") as old, fresh.open("wb") as new:
        new.truncate(os.fstat(old.fileno()).st_size)
        for offset, end in extents(old):
            while offset < end:  # copy_file_range(2) makes reflinks where it can
                offset += os.copy_file_range(old.fileno(), new.fileno(), end - offset, offset, offset)
    fresh.replace(target)


def make(path: Path, size: int) -> None:
    """A file of ``size`` bytes that is one hole; what was there under its name is gone."""
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(size)


def used(path: Path) -> int:
    """Bytes that a file takes on its disk; 0 when there is none."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def extents(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Where a file has data, page by page: (begin, end)."""
    end, size = 0, os.fstat(file.fileno()).st_size
    while end < size:
        try:
            begin = os.lseek(file.fileno(), end, os.SEEK_DATA)
        except OSError as failure:
            if failure.errno != errno.ENXIO:  # lseek(2): no data any more
                raise
            return
        end = os.lseek(file.fileno(), begin, os.SEEK_HOLE)
        begin = begin // _PAGE * _PAGE
        yield begin, end
