"""The programs on LITE, on all of LITE but the hardware; tests/rack/test_lite_apps.py runs them on blades."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guest_agents import lite
from guest_agents.lite.apps import dsm, log
from guest_agents.lite.apps.graph import references
from tests.lite_reference import pagerank
from tests.unit import lite_pair
from tests.unit.lite_stack import stack

pytestmark = [pytest.mark.long, pytest.mark.skipif(lite_pair.missing() is not None, reason=str(lite_pair.missing()))]
PROJECT = Path(__file__).parents[2]
TEXT = "\n".join(sorted((PROJECT / "README.md").read_text().splitlines() * 30))


Sockets = dict[str, str]


@pytest.fixture(scope="module")
def blades(tmp_path_factory: pytest.TempPathFactory, lite_core: Path) -> Iterator[Sockets]:
    with stack(tmp_path_factory.mktemp("stack"), lite_core, "gm0", "pb0", "pb1", "mb0") as sockets:
        yield sockets


def start(socket: str, app: str, *words: str, text: str = "") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", f"guest_agents.lite.apps.{app}", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, cwd=PROJECT, env={**os.environ, "RACKLESS_LITE": socket},
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(text)
    process.stdin.close()
    process.stdin = None
    return process


def output(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return out


def run(socket: str, app: str, *words: str, **more: Any) -> str:
    return output(start(socket, app, *words, **more))


def test_log_of_several_writers_with_a_cleaner(blades: Sockets) -> None:
    """A ring far smaller than what goes through it."""
    run(blades["gm0"], "log", "create", "notes", "--size", "4096", "--on", "mb0")
    lines = TEXT.splitlines()
    parts = [[f"{writer} {line}" for line in lines[writer::3]] for writer in range(3)]
    writers = [start(blades[name], "log", "append", "notes", "--batch", str(1 + i), text="\n".join(parts[i]))
               for i, name in enumerate(("pb0", "pb1", "mb0"))]  # fmt: skip
    taken = run(blades["gm0"], "log", "clean", "notes", "--count", str(len(lines) - 5)).splitlines()
    for writer in writers:
        output(writer)
    taken += run(blades["gm0"], "log", "read", "notes").splitlines()
    for i, part in enumerate(parts):
        assert [line for line in taken if line.startswith(f"{i} ")] == part
    assert len(taken) == len(lines)
    run(blades["pb0"], "log", "drop", "notes")
    with lite.connect(blades["pb1"]) as node, pytest.raises(lite.NoSuchName):
        log.Log.open(node, "notes")


def test_log_entries_around_the_end(blades: Sockets) -> None:
    """Random sizes against a model, single process: every wrap of header, payload and transaction."""
    rand = random.Random(5)
    with lite.connect(blades["pb0"]) as node:
        made = log.Log.create(node, "ring", 13 * log.UNIT)
        expected: list[bytes] = []
        for _ in range(400):
            batch = [rand.randbytes(rand.randrange(40)) for _ in range(rand.randrange(1, 4))]
            made.append(batch)
            expected += batch
            if rand.random() < 0.9:
                assert [entry for _, entry in made.committed(made.number(log.HEAD))] == expected
                assert made.clean(2) == expected[:2]
                del expected[:2]
            while sum(max(1, -(-len(entry) // log.UNIT)) for entry in expected) > 7:
                expected = expected[len(made.clean(1)) :]
        with pytest.raises(lite.BadArgument):
            made.append([bytes(made.capacity + 1)])
        made.append([bytes(100)])
        with pytest.raises(lite.TimedOut, match="full"):
            made.append([bytes(made.capacity - 31)], timeout=0.1)


def test_an_uncommitted_entry_is_not_seen(blades: Sockets) -> None:
    with lite.connect(blades["pb0"]) as node:
        made = log.Log.create(node, "torn", 240)
        made.append([b"whole"])
        place = log.INDEX + made.append([b"torn", b"same transaction"]) // log.UNIT * log.WORD.size
        for kept in range(8):  # of the commit word, as if a reader saw a part of it
            word = node.map("torn").read(8, at=place)
            node.map("torn").write(word[:kept] + bytes(8 - kept), at=place)
            assert [entry for _, entry in made.committed(0)] == [b"whole"]
            node.map("torn").write(word, at=place)
        assert len(list(made.committed(0))) == 3


DYING = """
import os, signal, sys
from guest_agents import lite
from guest_agents.lite.apps.log import Log
where, cause = sys.argv[1:3]
with lite.connect() as node:
    log = Log.open(node, sys.argv[3])
    memory = log.memory
    def stop(*_, **__):
        print("there", flush=True)
        os.kill(os.getpid(), getattr(signal, cause))
        setattr(memory, where, before)  # for who comes back
        return before(*_, **__)
    before = getattr(memory, where)
    setattr(memory, where, stop)
    log.append([b"never committed" * 9, b"nor this"])
    print("appended", flush=True)
"""


def hold(socket: str, name: str, where: str, cause: str) -> subprocess.Popen[str]:
    """A writer that is killed or stopped after it has reserved its place: before `where`, an operation of its LMR."""
    process = subprocess.Popen(
        [sys.executable, "-c", DYING, where, cause, name], stdout=subprocess.PIPE, text=True, cwd=PROJECT,
        env={**os.environ, "RACKLESS_LITE": socket},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    return process


@pytest.mark.parametrize("where", ["scatter", "write"])  # before anything is written; only the commit is missing
def test_a_writer_that_dies_before_it_commits_is_left_out(blades: Sockets, where: str) -> None:
    name = f"gap-{where}"
    with lite.connect(blades["gm0"]) as node:
        made = log.Log.create(node, name, 40 * log.UNIT, "mb0")
        made.append([b"before"])
        first = hold(blades["pb0"], name, where, "SIGKILL")
        made.append([b"between", b"as well"])
        others = [hold(blades["pb1"], name, where, "SIGKILL") for _ in range(2)]
        made.append([b"after"])
        last = hold(blades["pb0"], name, where, "SIGKILL")
        for process in (first, *others, last):
            output_of_the_dead(process)
        assert [entry for _, entry in made.committed(0)] == [b"before"], "it stops at the gap"
        assert made.clean(10, patience=0) == [b"before"]
        assert made.clean(10, patience=0) == [], "now it waits"
        assert made.clean(10, patience=0) == [], "and now it has waited long enough"
        assert made.clean(2, patience=0) == [b"between", b"as well"]
        assert made.clean(10, patience=0) == [b"after"]
        assert made.number(log.HEAD) == made.number(log.TAIL), "the gap at the end is no gap any more"
        for turn in range(60):  # more than once around: nothing of the dead is left in the ring
            made.append([b"%d" % turn, bytes(40)])
            assert made.clean(10) == [b"%d" % turn, bytes(40)]
        node.map(name, lite.Permission.ADMIN).free()


def test_a_writer_that_was_only_stopped_writes_nothing_into_what_others_have_now(blades: Sockets) -> None:
    """It appends anew when it wakes, whatever it was about to do."""
    with lite.connect(blades["gm0"]) as node:
        for where in ("scatter", "write"):
            name = f"slow-{where}"
            made = log.Log.create(node, name, 12 * log.UNIT, "mb0")
            slow = hold(blades["pb0"], name, where, "SIGSTOP")
            made.append([b"other"])
            made.mend()
            assert made.clean(10) == [b"other"]
            for turn in range(20):  # the others use its place, several times
                made.append([b"%d" % turn, bytes(60)])
                assert made.clean(10) == [b"%d" % turn, bytes(60)]
            made.append([b"last"])
            slow.send_signal(signal.SIGCONT)
            assert output(slow) == "appended\n"
            assert made.clean(10) == [b"last", b"never committed" * 9, b"nor this"]
            node.map(name, lite.Permission.ADMIN).free()


def test_a_mender_that_dies_can_be_followed_by_another(blades: Sockets) -> None:
    with lite.connect(blades["gm0"]) as node, lite.connect(blades["pb0"]) as other:
        made = log.Log.create(node, "mended", 40 * log.UNIT, "mb0")
        writer = log.Log.open(other, "mended")
        output_of_the_dead(hold(blades["pb1"], "mended", "scatter", "SIGKILL"))
        made.memory.revoke(lite.Permission.WRITE | lite.Permission.ATOMIC)  # and it is gone
        with pytest.raises(lite.TimedOut, match="mended"):
            writer.append([b"x"], timeout=0.1)
        made.mend()
        writer.append([b"y"])
        assert made.clean(10) == [b"y"]


def output_of_the_dead(process: subprocess.Popen[str]) -> None:
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL


def test_mapreduce(blades: Sockets, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text(TEXT * 3)
    workers = [start(blades[name], "mapreduce", "work", "--jobs", "1") for name in ("pb0", "pb1")]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "serving\n"
    counted = run(blades["gm0"], "mapreduce", "count", str(text), "--workers", "pb0,pb1", "--text-on", "mb0,pb0")
    lines = [line.split(" ") for line in counted.splitlines()]
    assert {word: int(count) for word, count in lines} == Counter(text.read_text().split())
    assert [int(count) for _, count in lines] == sorted((int(count) for _, count in lines), reverse=True)
    assert [worker.wait(10) for worker in workers] == [0, 0]


def test_graph(blades: Sockets, tmp_path: Path) -> None:
    rand = random.Random(1)
    edges = sorted({(int(rand.paretovariate(0.8)) % 300, int(rand.paretovariate(0.5)) % 300) for _ in range(2000)})
    file = tmp_path / "edges"
    file.write_text("".join(f"{a} {b}\n" for a, b in edges))
    first = start(blades["pb0"], "graph", "rank", "g", "--parts", "3", "--edges", str(file), "--on", "mb0,gm0")
    others = [start(blades[name], "graph", "rank", "g", "--parts", "3", "--part", part)
              for name, part in (("pb1", "1"), ("mb0", "2"))]  # fmt: skip
    got = {int(vertex): float(rank) for vertex, rank in map(str.split, output(first).splitlines())}
    assert [output(other) for other in others] == ["", ""]
    assert got == pytest.approx(pagerank(edges, 20), rel=1e-12)


def test_references_of_a_dictionary() -> None:
    text = (
        "A \\A\\\n  see {Bee} and {a} and {nothing}\nBee \\Bee\\, n. [L. {C}]\nC \\C\\\n {bee} {A}\nBee \\Bee\\ {a}\n"
    )
    words, edges = references(text)
    assert words == ["a", "bee", "c"]
    assert edges == [(0, 1), (1, 0), (1, 2), (2, 0), (2, 1)]


def test_dsm_letters(blades: Sockets, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text(TEXT[:40_000])
    members = [
        start(blades[name], "dsm", "letters", str(text), "--member", str(i), "--members", "3", "--homes", "mb0,gm0")
        for i, name in enumerate(("pb0", "pb1", "mb0"))
    ]
    expected = Counter(text.read_text().lower())
    for member in members:
        counted = dict(map(str.split, output(member).splitlines()))
        assert {letter: int(count) for letter, count in counted.items()} == {
            letter: expected[letter] for letter in "abcdefghijklmnopqrstuvwxyz"}  # fmt: skip


def test_dsm_copies_are_kept_until_somebody_writes(blades: Sockets) -> None:
    with (
        lite.connect(blades["pb0"]) as one, lite.connect(blades["pb1"]) as two,
        dsm.Shared(one, "d", 3 * dsm.PAGE, 1) as a, dsm.Shared(two, "d", 3 * dsm.PAGE, 2) as b,
    ):  # fmt: skip
        with a.writing(dsm.PAGE - 4, 8) as view:
            view[:] = b"01234567"
        for _ in range(5):
            with b.reading(dsm.PAGE - 4, 8) as view:
                assert view.tobytes() == b"01234567"
        assert b.fetches == 2
        with b.reading(0, 4) as old:
            with a.writing(0, 4) as view:
                view[:] = b"new!"
            assert old.tobytes() == bytes(4)  # acquired before
        with b.reading(0, 4) as view:
            assert view.tobytes() == b"new!"
        assert b.fetches == 3
        with pytest.raises(lite.OutOfRange), b.reading(3 * dsm.PAGE - 1, 2):
            pass
