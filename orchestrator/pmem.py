"""Persistent memory of a blade on the host: two files, and what is left of them when power fails.

The blade has two devices. *vol* is what its programs and RDMA touch. *media* is what survives; in the blade only an
explicit persist writes there (guest_agents/pmem.py). With one file alone nothing could ever be lost: the pages of a
killed blade stay in the host's cache, flushed or not.

    blades/mb1/pmem.raw    media; here also while the blade is off
    blades/mb1/pmem.vol    vol; made from media whenever the blade starts, and only there until it ends

So whatever ends a blade, it finds what media has. Who ends it can first move there what was not persisted: all of it
(`shut_down`), or what a crash happens to leave (`pull_power`).
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from orchestrator import sparse
from orchestrator.settings import BladePaths

LINE = 64
"""Bytes that survive together or not at all: a cache line."""
_PAGE = 4096
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Crash:
    """What a power failure found: lines stored but not persisted, and how many of them survived all the same."""

    unpersisted: int
    survived: int

    def __str__(self) -> str:
        return f"lines of its persistent memory that were not persisted: {self.unpersisted}, survived: {self.survived}"


def prepare(files: BladePaths, size: int) -> None:
    """Files for a blade that starts: media as it is if it has this size (bytes), else new and empty; vol like it."""
    if not files.pmem.exists() or files.pmem.stat().st_size != size:
        sparse.make(files.pmem, size)
    sparse.copy(files.pmem, files.pmem_vol)


def shut_down(files: BladePaths) -> None:
    """The blade has ended in order: all that was stored is kept, as when firmware writes the caches back."""
    if files.pmem_vol.exists():
        files.pmem_vol.replace(files.pmem)


def pull_power(files: BladePaths, survive: float = 0.0, seed: int = 0) -> Crash:
    """Its power is gone: each line that was stored and not persisted survives with the probability `survive`.

    Caches may have written any line back by themselves. Which ones did depends on `seed` and the line's place alone,
    not on what else was stored, so that a crash can be played again. The blade must have ended.
    """
    if not files.pmem_vol.exists():
        return Crash(0, 0)
    unpersisted = survived = 0
    with files.pmem_vol.open("rb") as vol, files.pmem.open("r+b") as media:
        for offset, stored, durable in _differing(vol, media):
            chance = random.Random(f"{seed} {offset}")
            for line in range(0, len(stored), LINE):
                lives = chance.random() < survive
                if stored[line : line + LINE] == durable[line : line + LINE]:
                    continue
                unpersisted += 1
                if lives:
                    survived += 1
                    media.seek(offset + line)
                    media.write(stored[line : line + LINE])
    files.pmem_vol.unlink()
    return Crash(unpersisted, survived)


def _differing(vol: BinaryIO, media: BinaryIO) -> Iterator[tuple[int, bytes, bytes]]:
    """Pages that are not the same: (offset, in vol, in media). Where both have a hole nothing was ever stored."""
    for begin, end in _data(vol, media):
        for chunk in range(begin, end, _CHUNK):
            length = min(_CHUNK, end - chunk)
            stored, durable = (os.pread(file.fileno(), length, chunk) for file in (vol, media))
            if stored == durable:
                continue
            for page in range(0, length, _PAGE):
                pair = stored[page : page + _PAGE], durable[page : page + _PAGE]
                if pair[0] != pair[1]:
                    yield chunk + page, *pair


def _data(*files: BinaryIO) -> Iterator[tuple[int, int]]:
    """Where any of some files has data: (begin, end)."""
    done = 0
    for begin, end in sorted(extent for file in files for extent in sparse.extents(file)):
        if end > done:
            yield max(begin, done), end
            done = end
