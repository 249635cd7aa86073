"""Hotpot on all of LITE but the hardware: datasets, loads and stores, commits and what they leave alone."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest_agents.hotpot.changes import Change, encode
from guest_agents.hotpot.errors import Retry
from guest_agents.hotpot.records import Piece
from tests.unit import lite_pair
from tests.unit.hotpot_rack import Blade, Shell, output, rack, shells

pytestmark = pytest.mark.skipif(lite_pair.missing() is not None, reason=str(lite_pair.missing()))
Rack = dict[str, Blade]
Programs = list[Shell]
PAGE = 4096
_names = itertools.count()


@pytest.fixture(scope="module")
def blades(tmp_path_factory: pytest.TempPathFactory, lite_core: Path) -> Iterator[Rack]:
    with rack(tmp_path_factory.mktemp("hotpot"), lite_core, "gm0", "mb0", "mb1", "mb2") as made:
        yield made


@pytest.fixture(scope="module")
def running(blades: Rack) -> Iterator[Programs]:
    """Two programs on mb0, one on mb1 and on mb2."""
    with shells(blades["mb0"], blades["mb0"], blades["mb1"], blades["mb2"]) as made:
        yield made


@pytest.fixture(params=["mrmw", "mrsw"])
def programs(running: Programs, request: pytest.FixtureRequest) -> Iterator[Programs]:
    """They have a new dataset `d` open, of eight pages, which all nodes own in turn."""
    name = f"set {next(_names)}"
    running[0].do(f"d = session.create({name!r}, {8 * PAGE}, chunk={PAGE}, mode={request.param!r})")
    for program in running[1:]:
        program.do(f"d = session.open({name!r})")
    yield running
    for program in running:
        program.do("t = v = None")
        program.do("d.close()")
    running[0].do(f"session.delete({name!r})")


def test_a_dataset_is_at_one_address_and_spread_over_owners(blades: Rack, running: Programs) -> None:
    made = running[0].do("""d = session.create("one", 100_000, chunk=16384)""")
    assert made is None
    about = "(d.address, d.size, bytes(d.memory) == bytes(d.size))"
    first = running[0].do(about)
    running[3].do('d = session.open("one")')
    assert running[3].do(about) == first
    assert first[1:] == (102400, True)
    for program in (running[0], running[3]):
        program.do("d.close()")
    [listed] = running[1].do("session.datasets()")
    assert (listed["name"], listed["owners"], listed["open"]) == ("one", [1, 2, 3, 4], [])
    assert [len(blade.service.owner.homes()) for blade in blades.values()] == [1, 1, 1, 1]
    running[2].do('session.delete("one")')
    assert not running[2].do("session.datasets()")
    assert not any(list(blade.folder.glob("home-*")) for blade in blades.values())


def test_pointers_in_a_dataset_hold_everywhere_and_after_it_was_closed(programs: Programs) -> None:
    first, _, other, _ = programs
    first.do("import ctypes, struct\nd.memory[:8] = struct.pack('Q', d.address + 5 * 4096)\n"
             "d.memory[5 * 4096 : 5 * 4096 + 3] = b'far'\nd.commit((0, 8), (5 * 4096, 3))")  # fmt: skip
    other.do("name = d.name\nd.close()\nd = session.open(name)\nimport ctypes, struct")
    assert other.do("ctypes.string_at(struct.unpack('Q', d.memory[:8])[0], 3)") == b"far"


def test_stores_stay_on_their_node_until_they_are_committed(programs: Programs) -> None:
    first, beside, other, late = programs
    assert other.do("bytes(d.memory[:4])") == bytes(4)
    first.do("d.memory[:4] = b'here'")
    assert beside.do("bytes(d.memory[:4])") == b"here"
    assert other.do("bytes(d.memory[:4])") == late.do("bytes(d.memory[:4])") == bytes(4)
    first.do("d.commit((0, 4))")
    for program in programs:
        assert program.do("bytes(d.memory[:4])") == b"here", "also where the page was cached"
    other.do("d.memory[:4] = b'gone'\nd.discard((0, 4))")
    assert other.do("bytes(d.memory[:4])") == b"here"


def test_what_is_stored_by_the_kernel_counts_too(programs: Programs) -> None:
    first, _, other, _ = programs
    first.do("with open('/proc/version', 'rb') as file: n = file.readinto(d.memory[4000:4200])")
    first.do("d.commit((4000, 200))")
    assert other.do("bytes(d.memory[4000:4010])") == Path("/proc/version").read_bytes()[:10]


def test_only_the_ranges_of_a_commit_are_committed(programs: Programs) -> None:
    first, _, other, _ = programs
    first.do("d.memory[:8] = b'abcdefgh'\nd.commit((2, 3))")
    assert other.do("bytes(d.memory[:8])") == b"\0\0cde\0\0\0"
    assert first.do("bytes(d.memory[:8])") == b"abcdefgh"
    first.do("d.commit((0, 1), (7, 1))\nd.discard((0, 1))")
    assert first.do("bytes(d.memory[:8])") == other.do("bytes(d.memory[:8])") == b"a\0cde\0\0h"


def test_two_nodes_commit_bytes_of_one_page(programs: Programs) -> None:
    """While each has stores there that the other shall not see."""
    first, _, other, late = programs
    first.do("d.memory[0:4] = b'1111'")
    other.do("d.memory[4:8] = b'2222'")
    first.do("d.commit((0, 2))")
    assert other.do("bytes(d.memory[:8])") == b"\0\0\0\x002222", "what a program is storing to is left alone"
    other.do("d.commit((4, 2))")
    assert late.do("bytes(d.memory[:8])") == b"11\0\x0022\0\0"
    assert other.do("bytes(d.memory[:8])") == b"11\0\x002222", "now it has both"
    first.do("d.commit((2, 2))")
    other.do("d.commit((6, 2))")
    for program in programs:
        assert program.do("bytes(d.memory[:8])") == b"11112222"


def test_an_abort_takes_back_and_a_commit_does_not(programs: Programs) -> None:
    first, _, other, _ = programs
    first.do("with d.transaction() as t:\n    t.acquire(0, 4)[:] = b'kept'\n    t.acquire(4096, 4)[:] = b'also'")
    first.do("t = d.transaction()\nt.acquire(0, 4)[:] = b'no!!'\nt.acquire(8, 4)[:] = b'no!!'\nt.abort()")
    for program in (first, other):
        assert program.do("bytes(d.memory[:12]), bytes(d.memory[4096:4100])") == (b"kept" + bytes(8), b"also")
    first.do("""
try:
    with d.transaction() as t:
        t.acquire(0, 4)[:] = b'lost'
        1 / 0
except ZeroDivisionError:
    pass""")
    assert first.do("bytes(d.memory[:4])") == b"kept"
    assert other.do("(d.run(lambda t: bytes(t.acquire(0, 4))), )") == (b"kept",), "reading is a transaction too"


def test_many_ranges_are_acquired_at_once(programs: Programs) -> None:
    first, beside, other, _ = programs
    first.do("d.memory[:] = bytes(i // 4096 + 1 for i in range(d.size))\nd.commit((0, d.size))")
    other.do("t = d.transaction()\nparts = t.acquire_all(*((i * 4096, 2) for i in range(8)))")
    assert other.do("[bytes(part) for part in parts]") == [bytes([i, i]) for i in range(1, 9)]
    other.do("for part in parts: part[1] += 100\ndel parts, part\nt.commit()")
    assert first.do("[bytes(d.memory[i * 4096 : i * 4096 + 3]) for i in range(8)]") == [
        bytes([i, i + 100, i]) for i in range(1, 9)]  # fmt: skip
    first.do("t = d.transaction()\nt.acquire(3 * 4096, 1)")
    beside.do("t = d.transaction()")
    assert beside.refused("t.acquire_all((0, 1), (3 * 4096, 1), (5 * 4096, 1))").startswith("Retry")
    first.do("t.acquire_all((0, 1), (5 * 4096, 1))\nt.abort()")
    beside.do("t.abort()")


def test_who_comes_second_is_told_to_retry(programs: Programs) -> None:
    first, beside, other, _ = programs
    other.do("t = d.transaction()")
    first.do("t = d.transaction()\nt.acquire(0, 4)[:] = b'mine'")
    beside.do("t = d.transaction()")
    assert beside.refused("t.acquire(100, 4)").startswith("Retry"), "a page is one transaction's on a node"
    beside.do("t.abort()")
    if first.do("d.mode") == "mrsw":
        assert other.refused("t.acquire(100, 4)").startswith("Retry")
        other.do("t.abort()")
    else:
        other.do("t.acquire(100, 4)[:] = b'late'")
    first.do("t.commit()")
    if first.do("d.mode") == "mrmw":
        assert other.do("bytes(d.memory[:4])") == bytes(4), "it reads one version until it ends"
        assert other.refused("t.commit()").startswith("Retry")
    assert other.do("bytes(d.memory[:4]), bytes(d.memory[100:104])") == (b"mine", bytes(4))
    other.do("d.run(lambda t: t.acquire(100, 4).__setitem__(slice(4), b'then'))")
    assert first.do("bytes(d.memory[:4]), bytes(d.memory[100:104])") == (b"mine", b"then")


def test_an_owner_refuses_what_is_based_on_an_old_version(programs: Programs, blades: Rack) -> None:
    """Which the node that commits need not have heard of yet."""
    programs[0].do("d.memory[0] = 1\nd.commit((0, 1))\nd.memory[0] = 2\nd.commit((0, 1))")
    owner = blades["gm0"].service.owner
    number = max(home.record.id for home in owner.homes())
    ask = owner.handlers()

    def prepare(expected: int) -> None:
        pages, payload = encode([Change(0, expected, [(Piece(0, 1), b"\3")])])
        header = {"dataset": number, "part": 0, "xid": 99, "pages": pages, "replicas": 1, "origin": [2, "its media"],
                  "parts": [0, 1], "everywhere": [[0, [0]], [1, [1]]]}  # fmt: skip
        ask["prepare"](2, header, memoryview(payload))

    for expected in (0, 1, 3):
        with pytest.raises(Retry):
            prepare(expected)
    prepare(2)
    assert programs[1].refused("d.memory[0] = 4\nd.commit((0, 1))").startswith("Retry")
    ask["release"](2, {"dataset": number, "part": 0, "xid": 99}, memoryview(b""))
    programs[1].do("d.commit((0, 1))")
    assert programs[2].do("d.memory[0]") == 4


def test_copies_are_made_kept_up_to_date_and_used(programs: Programs, blades: Rack) -> None:
    first, _, other, late = programs
    held = [len(blade.service.copies.held(number)) for blade in blades.values()
            for number in [max(home.record.id for home in blade.service.owner.homes())]]  # fmt: skip
    assert held == [0, 0, 0, 0]
    first.do("d.memory[:] = b'x' * d.size\nd.commit((0, d.size), replicas=3)")
    number = max(home.record.id for home in blades["gm0"].service.owner.homes())
    assert sum(len(blade.service.copies.held(number)) for blade in blades.values()) == 2 * 8
    first.do("d.memory[:4] = b'more'\nd.commit((0, 4))")
    holders = [blade for blade in blades.values() if 0 in blade.service.copies.held(number)]
    for blade in holders:
        copy = blade.service.copies.read(number, 0)
        assert copy is not None
        assert (copy.version, copy.data[:6]) == (2, b"morexx"), "a commit of one copy does not leave old ones behind"
    assert other.do("bytes(d.memory[:6])") == late.do("bytes(d.memory[:6])") == b"morexx"


def test_a_child_does_not_have_the_mapping(running: Programs) -> None:
    running[0].do("d = session.create('parent', 4096)")
    ended = running[0].do("(pid := os.fork()) or os._exit(d.memory[0])\nstatus = os.waitpid(pid, 0)[1]")
    assert ended is None
    assert running[0].do("os.WTERMSIG(status)") == signal.SIGSEGV
    running[0].do("d.close()")
    running[0].do("session.delete('parent')")


def test_stat_tells_what_became_of_pages(blades: Rack, programs: Programs) -> None:
    name = programs[0].do("d.name")
    programs[0].do("d.memory[0] = 1\nd.memory[4096]")
    here = programs[0].do("session.stat()")
    assert (here["node"], here["datasets"][name]["dirty"], here["datasets"][name]["committed"]) == ("mb0", 1, 1)
    assert here["datasets"][name]["owned_chunks"] == 2
    programs[0].do("d.commit((0, 1), replicas=4)")
    elsewhere = blades["mb2"].service.stat()["datasets"][name]
    assert (elsewhere["redundant"], elsewhere["copies"], elsewhere["committed"]) == (1, 1, 0)
    programs[3].do("d.memory[0]")
    elsewhere = blades["mb2"].service.stat()["datasets"][name]
    assert (elsewhere["redundant"], elsewhere["copies"], elsewhere["committed"]) == (0, 1, 1)


COUNT = """
import random
d = session.open("counters")
def body(t):
    views = [t.acquire(at, 8).cast("Q") for at in random.sample(range(0, 12 * 4096, 4096), 2)]
    for view in views:
        view[0] += 1
for _ in range(int(sys.argv[1])):
    d.run(body, replicas=2)
"""


@pytest.mark.long
@pytest.mark.parametrize("mode", ["mrmw", "mrsw"])
def test_increments_of_many_are_all_there(blades: Rack, mode: str) -> None:
    blades["gm0"].run(f'session.create("counters", 12 * 4096, mode="{mode}", chunk=4096)')
    programs = [blades[name].start(COUNT, 8) for name in ("mb0", "mb1", "mb1")]
    for program in programs:
        output(program)
    total = blades["gm0"].run('print(sum(session.open("counters").memory[:].cast("Q")))')
    assert int(total) == 3 * 8 * 2
    blades["gm0"].run('session.delete("counters")')
