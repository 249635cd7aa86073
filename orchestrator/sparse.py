"""Copies of files that keep their holes, and share blocks with the original where the file system can."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_PAGE = 4096
_NOT_THERE = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""What copy_file_range(2) says where file systems, or two together, cannot; some say that 0 bytes were copied."""


def copy(source: Path, target: Path) -> None:
    """Copy a file with its holes; the target gets its name when it is whole. Of one that fails nothing stays."""
    fresh = target.with_suffix(".new")
    try:
        with source.open("rb") as old, fresh.open("wb") as new:
            new.truncate(os.fstat(old.fileno()).st_size)
            for begin, end in extents(old):
                _copy_extent(old.fileno(), new.fileno(), begin, end)
        fresh.replace(target)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def _copy_extent(old: int, new: int, offset: int, end: int) -> None:
    while offset < end:  # copy_file_range(2) makes reflinks where it can
        try:
            done = os.copy_file_range(old, new, end - offset, offset, offset)
        except OSError as failure:
            if failure.errno not in _NOT_THERE:
                raise
            done = 0
        if not done:
            os.lseek(new, offset, os.SEEK_SET)
            done = os.sendfile(new, old, offset, end - offset)
        if not done:
            raise OSError(errno.EIO, "the file became shorter while it was copied")
        offset += done


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
