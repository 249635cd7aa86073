"""The programs on LITE, on all of LITE but the hardware; tests/rack/test_lite_apps.py runs them on blades."""

from __future__ import annotations

import os
import random
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

pytestmark = pytest.mark.skipif(lite_pair.missing() is not None, reason=str(lite_pair.missing()))
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
        made = log.Log.create(node, "ring", 240)
        expected: list[bytes] = []
        for _ in range(400):
            batch = [rand.randbytes(rand.randrange(40)) for _ in range(rand.randrange(1, 4))]
            made.append(batch)
            expected += batch
            if rand.random() < 0.9:
                assert [entry for _, entry in made.committed(made.number(log.HEAD))] == expected
                assert made.clean(2) == expected[:2]
                del expected[:2]
            while sum(8 + len(entry) + -len(entry) % 8 for entry in expected) > 100:
                expected = expected[len(made.clean(1)) :]
        with pytest.raises(lite.BadArgument):
            made.append([bytes(300)])
        made.append([bytes(100)])
        with pytest.raises(lite.TimedOut, match="full"):
            made.append([bytes(200)], timeout=0.1)


def test_an_uncommitted_entry_is_not_seen(blades: Sockets) -> None:
    with lite.connect(blades["pb0"]) as node:
        made = log.Log.create(node, "torn", 240)
        made.append([b"whole"])
        position = made.append([b"torn", b"same transaction"])
        for kept in range(8):  # of the commit word, as if a reader saw a part of it
            word = node.map("torn").read(8, at=log.RING + position)
            node.map("torn").write(word[:kept] + bytes(8 - kept), at=log.RING + position)
            assert [entry for _, entry in made.committed(0)] == [b"whole"]
            node.map("torn").write(word, at=log.RING + position)
        assert len(list(made.committed(0))) == 3


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
