"""Forked children of a program that pages: they go on when it is killed.

Such a child has no pager. What it did not have in the blade when it was forked, its parent's pager gives it when it is
touched (native/family.h). For each child the pager sends the process monitor its userfaultfd, a shared file that says
which pages it still needs, and one that says where they are. When the parent has gone, however it went, what is still
needed is read from the memory blades, once and for all; then the child depends on nobody any more. Until then its
faults wait, for as long as somebody holds that userfaultfd. The remote memory is given back afterwards.

What cannot be read (a blade has died; the parent was killed a moment after the fork) is poisoned: the child gets
SIGBUS if it ever touches that, and never another page's bytes or zeros.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from guest_agents.control import ControlError

log = logging.getLogger("rackless.process")

PAGE = mmap.PAGESIZE
REGION_PAGES = 1024
RUN_PAGES = 32
"""Pages read at a time."""
FILES = 3
"""Descriptors that come with a child: userfaultfd, needs, regions."""

_HEIR = struct.Struct("<QQQQ")
"""native/family.h: struct heir. settled, base, pages, words; then words of bits."""
_REGION = struct.Struct("<IIQIIQI4x")
"""native/monitor.h: struct region. Two places (blade, rkey, address); pages that the second has."""
_NO_BLADE = 0xFFFFFFFF

# linux/userfaultfd.h
_COPY, _UNREGISTER, _POISON = 0xC028AA03, 0x8010AA01, 0xC020AA08
_ARGUMENT = {_COPY: struct.Struct("<QQQQq"), _UNREGISTER: struct.Struct("<QQ"), _POISON: struct.Struct("<QQQq")}
_MESSAGE = struct.Struct("<B7xI20x")
_FORK = 0x13

Read = Callable[[int, int, int, int], bytes]
"""(number of the memory blade, address, rkey, bytes) -> contents; ControlError or OSError if it cannot be read."""


class GoneError(Exception):
    """The child's memory is no more: it has ended, or called exec."""


@dataclass
class Heir:
    """One child that depends on its parent."""

    uffd: int
    needs: bytes
    settled: bool
    base: int
    pages: int

    def needed(self) -> Iterator[tuple[int, int]]:
        """Runs (first page, count) of what it needs, none across regions."""
        page, end = 0, len(self.needs) * 8
        while page < end:
            run = 0
            while page + run < end and run < RUN_PAGES and self._needs(page + run):
                run += 1
                if (page + run) % REGION_PAGES == 0:
                    break
            if run:
                yield page, run
            page += run or 1

    def _needs(self, page: int) -> bool:
        return bool(self.needs[page // 8] >> page % 8 & 1)


class Heirs:
    """The children of one program."""

    def __init__(self) -> None:
        self._files: dict[str, list[int]] = {}

    def __bool__(self) -> bool:
        return bool(self._files)

    def add(self, number: str, files: list[int]) -> None:
        """A child has been forked; the descriptors are ours from now on."""
        self.forget(number)
        self._files[number] = files
        if len(files) != FILES:  # we have too many open
            log.error("a forked child will wait for ever if its parent is killed: it came without its descriptors")
            self.forget(number)

    def forget(self, number: str) -> None:
        """A child depends on nobody any more."""
        for file in self._files.pop(number, []):
            os.close(file)

    def inherit(self, read: Read) -> None:
        """The parent has gone: give every child all that it still needs."""
        for number in list(self._files):
            uffd, needs, regions = self._files[number]
            try:
                _Bequest(_contents(regions), read).settle(_heir(os.dup(uffd), _contents(needs)))
            except (OSError, struct.error):  # a bug, or not what a pager sends
                log.exception("a forked child's memory cannot be given to it")
            finally:
                self.forget(number)


def _contents(file: int) -> bytes:
    return os.pread(file, os.fstat(file).st_size, 0)


def _heir(uffd: int, file: bytes) -> Heir:
    settled, base, pages, words = _HEIR.unpack_from(file)
    return Heir(uffd, file[_HEIR.size : _HEIR.size + words * 8], bool(settled), base, pages)


class _Bequest:
    """What a parent leaves: the pages at memory blades, to one child and those that it forks meanwhile."""

    def __init__(self, regions: bytes, read: Read) -> None:
        self._regions = regions
        self._read = read
        self._buffer = ctypes.create_string_buffer(RUN_PAGES * PAGE)
        self._waiting: list[Heir] = []

    def settle(self, heir: Heir) -> None:
        """Give a child all it needs, and then its children, too."""
        self._waiting.append(heir)
        while self._waiting:
            one = self._waiting.pop()
            try:
                self._give_all(one)
            except GoneError:
                pass
            finally:
                os.close(one.uffd)

    def _give_all(self, heir: Heir) -> None:
        lost = 0
        for page, count in heir.needed():
            if heir.settled and self._fetch(page, count):
                self._give(heir, page, count)
            else:
                lost += count
                self._poison(heir, page, count)
        if lost:
            log.warning("%d pages of a forked child are lost with its parent: it gets SIGBUS if it uses them", lost)
        self._events(heir)
        self._ask(heir, _UNREGISTER, heir.base, heir.pages * PAGE)
        self._events(heir)  # a fork that came before

    def _fetch(self, page: int, count: int) -> bool:
        """Read pages into the buffer, from whoever has them."""
        offset = page % REGION_PAGES * PAGE
        for blade, rkey, address in self._places(page):
            if blade == _NO_BLADE:
                continue
            try:
                data = self._read(blade, address + offset, rkey, count * PAGE)
            except (ControlError, OSError) as failure:
                log.warning("a forked child's memory cannot be read: %s", failure)
                continue
            ctypes.memmove(self._buffer, data, count * PAGE)
            return True
        return False

    def _places(self, page: int) -> list[tuple[int, int, int]]:
        at = page // REGION_PAGES * _REGION.size
        if at + _REGION.size > len(self._regions):
            return []
        blade, rkey, address, *second, copied = _REGION.unpack_from(self._regions, at)
        whole = copied == REGION_PAGES
        return [(blade, rkey, address), (second[0], second[1], second[2]) if whole else (_NO_BLADE, 0, 0)]

    def _give(self, heir: Heir, page: int, count: int) -> None:
        address, source = heir.base + page * PAGE, ctypes.addressof(self._buffer)
        if not self._ask(heir, _COPY, address, source, count * PAGE, 0, 0):
            for i in range(count):  # one of them is there already: it stays as it is
                self._ask(heir, _COPY, address + i * PAGE, source + i * PAGE, PAGE, 0, 0)

    def _poison(self, heir: Heir, page: int, count: int) -> None:
        address = heir.base + page * PAGE
        if not self._ask(heir, _POISON, address, count * PAGE, 0, 0):
            for i in range(count):
                self._ask(heir, _POISON, address + i * PAGE, PAGE, 0, 0)

    def _events(self, heir: Heir) -> None:
        """Its faults are answered by what is given anyway; but whoever it forks needs what it needs."""
        while True:
            try:
                event, descriptor = _MESSAGE.unpack(os.read(heir.uffd, _MESSAGE.size))
            except (BlockingIOError, struct.error):
                return
            if event == _FORK:
                self._waiting.append(Heir(descriptor, heir.needs, heir.settled, heir.base, heir.pages))

    def _ask(self, heir: Heir, request: int, *values: int) -> bool:
        """A request to userfaultfd, repeated while a fork is under way. False if a page is there already, and for what
        the child has meanwhile unmapped or mapped otherwise; GoneError if all of its memory has gone."""
        argument = _ARGUMENT[request].pack(*values)
        while True:
            try:
                fcntl.ioctl(heir.uffd, request, bytearray(argument))
            except OSError as failure:
                if failure.errno == errno.ESRCH:
                    raise GoneError from failure
                if failure.errno == errno.EAGAIN:
                    self._events(heir)
                    continue
                if failure.errno in (errno.EEXIST, errno.ENOENT, errno.EINVAL):
                    return False
                raise
            return True
