"""LITE as programs see it, on real blades: the C library, and the applications with real text, checked against a
plain computation here."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest_agents.lite.apps.graph import references
from orchestrator import corpus
from orchestrator.settings import Settings
from tests.lite_reference import pagerank
from tests.rack.conftest import PROJECT, Bench, Rack

pytestmark = [pytest.mark.rack, pytest.mark.timeout(900)]

BLADES = {
    "gm0": {"kind": "manager", "memory": "256 MiB"},
    "pb0": {"kind": "processor", "memory": "384 MiB", "excache": "64 MiB"},
    "pb1": {"kind": "processor", "memory": "384 MiB", "excache": "64 MiB"},
    "mb0": {"kind": "memory", "memory": "384 MiB"},
    "mb1": {"kind": "memory", "memory": "384 MiB"},
}
APP = "python3 -m guest_agents.lite.apps"
EXERCISE = PROJECT / "tests/unit/native/lite_exercise.c"
LIBRARY = "/opt/rackless/guest_agents/native/liblite"


@pytest.fixture(scope="module")
def blades(bench: Bench) -> Iterator[Rack]:
    """Two processor and two memory blades."""
    with bench.up("l", blades=BLADES, links={}) as rack:
        yield rack


@pytest.fixture(scope="module")
def dictionary() -> bytes:
    """The dictionary; it is ASCII but for a few letters."""
    data = corpus.english(Settings.from_environment()).read_bytes()
    return data.decode(errors="replace").encode("ascii", "replace")


@pytest.fixture(scope="module")
def text(dictionary: bytes) -> bytes:
    """Its first megabyte, up to the end of a line."""
    return dictionary[: dictionary.rindex(b"\n", 0, 1 << 20) + 1]


def begin(rack: Rack, blade: str, command: str) -> subprocess.Popen[str]:
    """Start a shell command on a blade."""
    words = rack.bench.command("ssh", "--rack", rack.name, blade, "--", command)
    return subprocess.Popen(words, env=rack.bench.env(), text=True, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)


def end(process: subprocess.Popen[str]) -> str:
    """What it printed; it must have succeeded."""
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0
    return out


def give(rack: Rack, blade: str, data: bytes, to: str, folder: Path) -> str:
    """Put a file on a blade."""
    (folder / "given").write_bytes(data)
    rack("cp", str(folder / "given"), f"{blade}:{to}")
    return to


def test_python_programs_find_it_anywhere(blades: Rack) -> None:
    script = (
        "from guest_agents import lite\\n"
        "with lite.connect() as node:\\n"
        "  memory = node.malloc(10 << 20, on=['mb0', 'mb1'], spread=True)\\n"
        "  memory.write(b'across', at=(4 << 20) - 3)\\n"
        "  print(memory.read(6, at=(4 << 20) - 3), *sorted({where for where, _ in memory.blocks}))"
    )
    done = blades.on("pb0", f'cd / && printf "{script}" | env -i /usr/bin/python3 -')
    assert done == "b'across' mb0 mb1\n"


def test_c_programs_need_nothing_but_lite_h_and_llite(blades: Rack) -> None:
    done = blades.on("pb0", f"cd /tmp && gcc -Wall -Werror {LIBRARY}/example.c -llite -o example && ./example mb0")
    assert done == "Hello from C, by RDMA. (count was 0)\n"


@pytest.mark.parametrize("where", ["mb0", "pb0"])
def test_all_of_the_c_library(blades: Rack, where: str) -> None:
    """Against memory of another blade, and of its own."""
    blades("cp", str(EXERCISE), "pb0:/tmp/exercise.c")
    done = blades.on("pb0", f"cd /tmp && gcc -O1 exercise.c -llite -lpthread -o exercise && ./exercise {where}")
    assert done == f"all of it works with {where}\n"


def test_log(blades: Rack, text: bytes, tmp_path: Path) -> None:
    """Three blades write dictionary lines at the same time through a ring of 16 KiB, a fourth cleans."""
    lines = text[: 40 << 10].decode(errors="replace").splitlines()
    writers = ["pb0", "pb1", "mb1"]
    parts = {writer: [f"{writer} {line}" for line in lines[i::3]] for i, writer in enumerate(writers)}
    blades.on("gm0", f"{APP}.log create notes --on mb0 --size 16384")
    for writer, part in parts.items():
        give(blades, writer, "\n".join(part).encode(), "/tmp/part", tmp_path)
    running = [begin(blades, writer, f"{APP}.log append notes --batch {1 + i} < /tmp/part")
               for i, writer in enumerate(writers)]  # fmt: skip
    taken = blades.on("gm0", f"{APP}.log clean notes --count {len(lines) - 7}").splitlines()
    for process in running:
        end(process)
    taken += blades.on("pb0", f"{APP}.log read notes").splitlines()
    for writer, part in parts.items():
        assert [line for line in taken if line.startswith(f"{writer} ")] == part
    assert len(taken) == len(lines)
    blades.on("mb1", f"{APP}.log drop notes")
    assert "NO_SUCH_NAME" in blades("ssh", "mb1", "--", f"{APP}.log read notes", check=False).stderr


def test_mapreduce(blades: Rack, text: bytes, tmp_path: Path) -> None:
    give(blades, "gm0", text, "/tmp/text", tmp_path)
    workers = [begin(blades, name, f"{APP}.mapreduce work --port 1 --jobs 1") for name in ("pb0", "pb1")]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "serving\n"
    counted = blades.on("gm0", f"{APP}.mapreduce count /tmp/text --workers pb0,pb1 --text-on mb0,mb1")
    assert [end(worker) for worker in workers] == ["", ""]
    lines = [line.split(" ") for line in counted.splitlines()]
    assert {word.encode(): int(count) for word, count in lines} == Counter(text.split())


def test_graph(blades: Rack, dictionary: bytes, tmp_path: Path) -> None:
    """PageRank of the dictionary's words by their references, by three blades, the graph in the memory of two."""
    _words, edges = references(dictionary.decode())
    assert len(edges) > 10_000
    give(blades, "pb0", "".join(f"{a} {b}\n" for a, b in edges).encode(), "/tmp/edges", tmp_path)
    first = begin(blades, "pb0", f"{APP}.graph rank g --parts 3 --part 0 --edges /tmp/edges --on mb0,mb1")
    others = [begin(blades, name, f"{APP}.graph rank g --parts 3 --part {i}") for i, name in ((1, "pb1"), (2, "mb1"))]
    got = {int(vertex): float(rank) for vertex, rank in map(str.split, end(first).splitlines())}
    assert [end(other) for other in others] == ["", ""]
    assert got == pytest.approx(pagerank(edges, 20), rel=1e-12)


def test_dsm(blades: Rack, text: bytes, tmp_path: Path) -> None:
    """Three blades count letters in one table; all see the same at the end."""
    some = text[:200_000]
    members = ["pb0", "pb1", "mb1"]
    for name in members:
        give(blades, name, some, "/tmp/letters", tmp_path)
    running = [
        begin(blades, name, f"{APP}.dsm letters /tmp/letters --member {i} --members 3 --homes mb0,mb1")
        for i, name in enumerate(members)
    ]
    expected = Counter(some.decode(errors="replace").lower())
    for process in running:
        counted = dict(map(str.split, end(process).splitlines()))
        assert {letter: int(count) for letter, count in counted.items()} == {
            letter: expected[letter] for letter in "abcdefghijklmnopqrstuvwxyz"}  # fmt: skip
