"""The buffer cache of memory blades: its blocks against a plain model, and data over the real file service."""

from __future__ import annotations

import errno
import itertools
import os
import random
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from guest_agents.budget import Budget
from guest_agents.splitkernel.managers.storage import buffers as home_of
from guest_agents.splitkernel.managers.vnode import VNode
from guest_agents.splitkernel.memory.blocks import BLOCK, SLAB, USER, Blocks
from guest_agents.splitkernel.memory.buffers import Buffers
from guest_agents.splitkernel.process.buffers import Buffered
from guest_agents.splitkernel.storage import wire
from guest_agents.splitkernel.storage.files import Files
from guest_agents.splitkernel.storage.wire import Op, Version, version_of
from guest_agents.verbs.lost import LostError
from tests.unit import vnode_mounts
from tests.unit.vnode_mounts import mounted

_sizes = st.integers(1, 3 * BLOCK)
_offsets = st.integers(0, 4 * BLOCK)


class Model(RuleBasedStateMachine):
    """Every version of a file that there ever was, whole. What is kept must be a part of the version it is said to be.

    Kept are three blocks at most, so that blocks leave all the time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clock = itertools.count(1)
        self.budget = Budget(SLAB)
        self.blocks = Blocks(self.budget, SLAB)
        self.contents: dict[Version, bytes] = {}
        self.now = self._version(b"")
        self.filler = itertools.count(1)
        self.blocks.keep("ballast", Version(SLAB, 0, 0), 0, memoryview(bytes(SLAB - 3 * BLOCK)))

    def _version(self, contents: bytes) -> Version:
        version = Version(len(contents), next(self.clock), 0)
        self.contents[version] = contents
        return version

    def _data(self, size: int) -> bytes:
        return bytes([next(self.filler) % 255 + 1]) * size

    @rule(offset=_offsets, size=_sizes, told=st.booleans())
    def write(self, offset: int, size: int, told: bool) -> None:
        """By this memory blade, or by another way."""
        data, old = self._data(size), self.contents[self.now]
        before = self.now
        self.now = self._version(old[:offset].ljust(offset, b"\0") + data + old[offset + size :])
        if told:
            self.blocks.written("f", before, self.now, offset, memoryview(data))

    @rule(size=_sizes)
    def truncate(self, size: int) -> None:
        self.now = self._version(self.contents[self.now][:size].ljust(size, b"\0"))

    @rule(first=st.integers(0, 4), blocks=st.integers(1, 3), back=st.integers(0, 2))
    def keep(self, first: int, blocks: int, back: int) -> None:
        """What somebody has read, perhaps some versions ago."""
        version = sorted(self.contents, key=lambda one: one.moment)[max(-1 - back, -len(self.contents))]
        start = first * BLOCK
        self.blocks.keep("f", version, start, memoryview(self.contents[version][start : start + blocks * BLOCK]))

    @rule(offset=_offsets, size=_sizes, back=st.integers(0, 1))
    def read(self, offset: int, size: int, back: int) -> None:
        version = sorted(self.contents, key=lambda one: one.moment)[max(-1 - back, -len(self.contents))]
        want = self.contents[version][offset : offset + size]
        out = bytearray(b"\xff" * len(want))
        missing = self.blocks.read("f", version, offset, memoryview(out))
        if missing is None:
            return
        for first, past in missing:
            assert first % BLOCK == 0
            assert past % BLOCK == 0 or past == version.size
            low, high = max(first, offset), min(past, offset + len(want))
            assert low < high
            out[low - offset : high - offset] = want[low - offset : high - offset]
        assert bytes(out) == want

    @rule()
    def shrink(self) -> None:
        self.blocks.shrink(1)
        assert self.budget.taken() == {}

    @invariant()
    def bounded(self) -> None:
        assert self.blocks.counts()["bytes"] <= SLAB
        assert self.blocks.size == self.budget.taken().get(USER, 0) <= SLAB


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_who_was_not_used_for_longest_leaves() -> None:
    blocks = Blocks(Budget(SLAB), SLAB)
    version = Version(BLOCK, 1, 1)
    for number in range(SLAB // BLOCK):
        blocks.keep(number, version, 0, memoryview(bytes(BLOCK)))
    out = memoryview(bytearray(1))
    assert blocks.read(0, version, 0, out) == []
    blocks.keep("one more", version, 0, memoryview(bytes(BLOCK)))
    assert blocks.read(0, version, 0, out) == []
    assert blocks.read(1, version, 0, out) is None
    assert blocks.counts()["files"] == SLAB // BLOCK


def test_a_late_answer_does_not_bring_an_old_version_back() -> None:
    blocks = Blocks(Budget(SLAB), SLAB)
    old, new = Version(1, 1, 1), Version(1, 2, 1)
    for late in (blocks.keep, lambda key, version, offset, data: blocks.written(key, old, version, offset, data)):
        blocks.keep("f", new, 0, memoryview(b"n"))
        late("f", old, 0, memoryview(b"o"))
        assert blocks.read("f", old, 0, memoryview(bytearray(1))) is None


def test_buffers_give_way_to_others() -> None:
    budget = Budget(4 * SLAB)
    buffers = Buffers(budget, lambda _blade: pytest.fail("nothing is asked"))
    buffers.blocks.keep("f", Version(SLAB, 1, 1), 0, memoryview(bytes(SLAB)))
    assert budget.taken() == {USER: SLAB}
    assert budget.take("programs", 4 * SLAB)
    assert budget.taken() == {"programs": 4 * SLAB}
    buffers.blocks.keep("f", Version(SLAB, 1, 1), 0, memoryview(bytes(SLAB)))  # no room: nothing is kept, no error
    assert buffers.stats()["bytes"] == 0


class Blade:
    """A processor blade's way to the files: by one of some memory blades, or none."""

    def __init__(self, root: Path, memory: int = 1) -> None:
        self.files = Files(root)
        self.lose: set[str] = set()
        self.buffers = {f"mb{n}": Buffers(Budget(64 << 20), lambda _blade: _Caller(self, "sb0")) for n in range(memory)}
        self.home: str | None = "mb0"
        self.data = Buffered(_Caller(self, "sb0"), lambda _path: ("sb0", self.home) if self.home else None,
                             lambda name: _Caller(self, name))  # fmt: skip
        self.identity = 0

    def ask(self, op: Op, path: str, data: bytes = b"", **numbers: Any) -> bytes:
        request = wire.encode(path, identity=self.identity, **numbers)
        return bytes(self.data.call(op, request, data, lambda first, second: bytes(first) + bytes(second)))

    def make(self, path: str, contents: bytes = b"") -> None:
        made = self.ask(Op.CREATE, path, a=stat.S_IFREG | 0o600, b=os.getuid(), c=os.getgid())
        self.identity = wire.unpack_attributes(made).identity
        self.write(path, 0, contents)

    def write(self, path: str, offset: int, data: bytes, flags: int = 0) -> None:
        assert wire.WRITTEN.unpack_from(self.ask(Op.WRITE, path, data, a=offset, flags=flags))[0] == len(data)

    def version(self, path: str) -> bytes:
        return version_of(wire.unpack_attributes(self.ask(Op.GETATTR, path))).pack()

    def read(self, path: str, offset: int = 0, size: int = 1 << 20, known: bytes | None = None) -> bytes:
        request = wire.encode(path, a=offset, b=size, identity=self.identity)
        return bytes(self.data.call(Op.READ, request, self.version(path) if known is None else known,
                                    lambda _first, data: bytes(data)))  # fmt: skip

    def disk_reads(self) -> int:
        return self.files.tally.counts().get("M2S_READ", 0)


class _Caller:
    def __init__(self, blade: Blade, name: str) -> None:
        self.blade, self.name = blade, name

    def call(
        self, opcode: int, first: bytes, second: bytes | memoryview = b"", into: Callable[..., Any] | None = None
    ) -> Any:
        if self.name in self.blade.lose:
            raise LostError("away", sent=True)
        out = memoryview(bytearray((1 << 20) + (12 << 10)))
        handle = self.blade.files.handle if self.name == "sb0" else self.blade.buffers[self.name].handle
        head, data = handle(opcode, memoryview(first), memoryview(second), out)
        return into(out[:head], out[head : head + data]) if into else None


@pytest.fixture
def blade(tmp_path: Path) -> Blade:
    return Blade(tmp_path)


def test_what_was_read_or_written_is_not_asked_of_the_disk_again(blade: Blade) -> None:
    contents = random.Random(1).randbytes(3 * BLOCK + 77)
    blade.make("f", contents)
    assert blade.read("f") == contents
    assert blade.disk_reads() == 0  # written through, and kept
    other = Blade.__new__(Blade)
    other.__dict__.update(blade.__dict__)
    assert other.read("f", BLOCK - 5, 10) == contents[BLOCK - 5 : BLOCK + 5]
    blade.write("f", 10, b"hello")
    assert blade.read("f", 0, 20) == contents[:10] + b"hello" + contents[15:20]
    assert blade.disk_reads() == 0
    blade.ask(Op.TRUNCATE, "f", a=BLOCK + 1)  # not told to the memory blade
    assert blade.read("f") == contents[:10] + b"hello" + contents[15 : BLOCK + 1]
    assert blade.disk_reads() == 1
    assert blade.read("f") == contents[:10] + b"hello" + contents[15 : BLOCK + 1]
    assert blade.disk_reads() == 1
    assert blade.data.counts == {"buffer_hits": 4, "buffer_misses": 1}


def test_the_largest_read_is_whole_wherever_it_begins(blade: Blade) -> None:
    contents = random.Random(2).randbytes(3 << 20)
    blade.make("f")
    for at in range(0, len(contents), 1 << 20):
        blade.write("f", at, contents[at : at + (1 << 20)])
    for home in ("mb0", None):
        blade.home = home
        for offset in (0, 4096, BLOCK - 1, (1 << 20) + 1, (2 << 20) + 5):
            for known in (b"", None):
                blade.buffers["mb0"].blocks.shrink(1 << 30)
                assert blade.read("f", offset, 1 << 20, known) == contents[offset : offset + (1 << 20)]


def test_a_write_by_another_way_is_seen_with_the_next_attributes(blade: Blade) -> None:
    blade.make("f", b"a" * BLOCK)
    old = blade.version("f")
    blade.home = None
    blade.write("f", 0, b"b" * BLOCK)
    blade.home = "mb0"
    assert blade.read("f", 0, 1, old) == b"a"  # what the asker believes there is
    assert blade.read("f", 0, 1) == b"b"
    assert blade.read("f", 0, 1, old) == b"b"  # and no way back


def test_times_that_are_set_back_do_not_bring_old_contents_back(blade: Blade) -> None:
    blade.make("f", b"a" * BLOCK)
    first = wire.unpack_attributes(blade.ask(Op.GETATTR, "f"))
    blade.home = None
    blade.write("f", 0, b"b" * BLOCK)
    blade.ask(Op.UTIMENS, "f", a=first.mtime, b=first.mtime, flags=wire.SET_ATIME | wire.SET_MTIME)
    blade.home = "mb0"
    assert wire.unpack_attributes(blade.ask(Op.GETATTR, "f")).mtime == first.mtime
    assert blade.read("f", 0, 1) == b"b"


def test_data_goes_directly_while_a_memory_blade_is_silent(blade: Blade) -> None:
    blade.make("f", b"a" * BLOCK)
    blade.lose = {"mb0"}
    with pytest.raises(LostError) as lost:
        blade.write("f", 0, b"c", os.O_APPEND)  # perhaps it was carried out: not again
    assert lost.value.sent
    blade.write("f", 0, b"b")
    assert blade.read("f", 0, 2) == b"ba"
    assert blade.data.tally.counts() == {"P2M_WRITE": 2, "M2S_WRITE": 1, "M2S_READ": 1}
    blade.lose = {"sb0"}
    with pytest.raises(LostError):
        blade.read("f", 0, 1, b"")


def test_a_silent_storage_blade_is_told_as_that(blade: Blade) -> None:
    blade.make("f", b"a" * BLOCK)
    known = blade.version("f")
    blade.lose = {"sb0"}
    assert blade.read("f", 0, 1, known) == b"a"  # is kept
    with pytest.raises(LostError) as lost:
        blade.write("f", 0, b"b")
    assert lost.value.sent
    with pytest.raises(LostError):
        blade.read("f", 0, 1, known)  # what was kept may have become another version
    blade.lose = set()
    assert blade.read("f", 0, 1) == b"a"


def test_only_data_of_files_is_for_a_memory_blade(blade: Blade) -> None:
    buffers = blade.buffers["mb0"]
    for op, request in ((Op.GETATTR, wire.encode("f", "sb0", identity=1)), (Op.READ, wire.encode("f", identity=1)),
                        (Op.READ, wire.encode("f", "sb0"))):  # fmt: skip
        with pytest.raises(OSError) as refused:
            buffers.handle(op, memoryview(request), memoryview(b""), memoryview(bytearray(100)))
        assert refused.value.errno == errno.ENOSYS


def test_random_operations_do_what_they_do_on_a_local_file(tmp_path: Path) -> None:
    chance = random.Random(20181008)
    (tmp_path / "sb").mkdir()
    blade, local = Blade(tmp_path / "sb", memory=2), bytearray()
    blade.make("f")
    for _ in range(3000):
        blade.home = chance.choice(["mb0", "mb0", "mb1", None])
        offset, size = chance.randrange(6 * BLOCK), chance.randrange(1, 2 * BLOCK)
        match chance.randrange(8):
            case 0 | 1:
                data = chance.randbytes(size)
                local.extend(bytes(max(0, offset - len(local))))
                local[offset : offset + size] = data
                blade.write("f", offset, data)
            case 2:
                data = chance.randbytes(size % 100 + 1)
                local.extend(data)
                blade.write("f", 0, data, os.O_APPEND)
            case 3 if chance.random() < 0.3:
                del local[offset:]
                local.extend(bytes(max(0, offset - len(local))))
                blade.ask(Op.TRUNCATE, "f", a=offset)
            case 4 if chance.random() < 0.1:
                blade.buffers["mb0"].blocks.shrink(1)
            case _:
                assert blade.read("f", offset, size) == local[offset : offset + size]
    assert blade.data.counts["buffer_hits"] > 200
    assert (tmp_path / "sb" / "f").read_bytes() == local


def test_a_file_has_one_home_and_keeps_it_when_others_go() -> None:
    web = VNode("web", 1, None, ("pb0",), ("mb1", "mb2"), "sb0", "round-robin")
    vnodes, living = {"web": web}, ["mb0", "mb1", "mb2", "mb3"]
    home = home_of(vnodes, "sb0", "web/a/b", living)
    assert home in web.memory
    assert home_of(vnodes, "sb0", "web", living[::-1]) == home
    assert home_of(vnodes, "sb0", "web/x", [home]) == home
    (other,) = set(web.memory) - {home}
    assert home_of(vnodes, "sb0", "web/x", ["mb0", other]) == other
    assert home_of(vnodes, "sb0", "web/x", ["mb0"]) is None
    default = home_of(vnodes, "sb0", "webs", living)
    assert default == home_of(vnodes, "sb1", "web/x", living) == home_of(vnodes, "sb0", "", living)
    assert home_of({}, "sb0", "x", []) is None


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Any]:
    if reason := vnode_mounts.missing():
        pytest.skip(reason)
    with mounted(tmp_path, 2) as mounts:
        yield mounts


@pytest.mark.long
def test_a_program_on_another_blade_reads_without_the_storage_blades_disk(two: Any) -> None:
    contents = random.Random(3).randbytes(2 << 20)
    (two.root / "f").write_bytes(contents)
    assert (two.blades[0] / "f").read_bytes() == contents
    before = two.counts()
    assert before["bytes_out"] >= len(contents)
    assert (two.blades[1] / "f").read_bytes() == contents
    after = two.counts()
    assert after["bytes_out"] == before["bytes_out"]
    assert after["by_opcode"]["M2S_READ"] == before["by_opcode"]["M2S_READ"]
    assert after["buffers"][0]["hits"] > before["buffers"][0]["hits"]


@pytest.mark.long
def test_whoever_asks_sees_every_write_that_was_finished_before(tmp_path: Path) -> None:
    """Writers and readers at once, each piece of data by another way: none reads what is older than it knows."""
    blade = Blade(tmp_path, memory=2)
    blocks, steps = 4, 500
    blade.make("f", bytes(blocks * BLOCK))
    finished, locks = [0] * blocks, [threading.Lock() for _ in range(blocks)]
    failures: list[str] = []
    home = threading.local()
    blade.data._home = lambda _path: home.way and ("sb0", home.way)

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(steps):
            number = chance.randrange(blocks)
            home.way = chance.choice(["mb0", "mb0", "mb1", None])
            if chance.random() < 0.4:
                with locks[number]:
                    blade.write("f", number * BLOCK, struct.pack("<Q", finished[number] + 1) * (BLOCK // 8))
                    finished[number] += 1
            else:
                least = finished[number]
                known = blade.version("f")
                home.way = chance.choice(["mb0", "mb0", "mb1", None])
                found = blade.read("f", number * BLOCK, BLOCK, known)
                stamps = {stamp for (stamp,) in struct.iter_unpack("<Q", found)}
                if len(found) != BLOCK or min(stamps) < least or max(stamps) > finished[number] + 1:
                    failures.append(f"block {number}: {sorted(stamps)}, and {least} was finished before")

    def run(seed: int) -> None:
        try:
            work(seed)
        except BaseException as failure:
            failures.append(repr(failure))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert blade.data.counts["buffer_hits"] > 20
