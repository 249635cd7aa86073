"""libhotpot, the library for C programs: several at once, beside a Python program."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest_agents.hotpot.records import SETTINGS
from tests.unit import lite_pair
from tests.unit.hotpot_rack import Blade, output, rack, shells

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(lite_pair.missing() is not None, reason=str(lite_pair.missing())),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler"),
]
LIBRARY = lite_pair.NATIVE / "libhotpot"
FLAGS = ["-std=gnu17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", f"-I{LIBRARY}"]
Rack = dict[str, Blade]


def build(folder: Path, source: Path, protocol: int = SETTINGS["protocol"]) -> Path:
    """A program with the library in it."""
    program = folder / f"{source.stem}{protocol}"
    sources = [source, *(lite_pair.NATIVE / name for name in lite_pair.LIBHOTPOT)]
    subprocess.run(["cc", *FLAGS, f"-DHP_PROTOCOL={protocol}", "-o", program, *sources, "-lpthread"], check=True)
    return program


@pytest.fixture(scope="module")
def blades(tmp_path_factory: pytest.TempPathFactory, lite_core: Path) -> Iterator[Rack]:
    with rack(tmp_path_factory.mktemp("c"), lite_core, "gm0", "mb0", "mb1") as made:
        yield made


def start(blade: Blade, *words: object) -> subprocess.Popen[str]:
    return subprocess.Popen([*map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "RACKLESS_HOTPOT": str(blade.socket)})  # fmt: skip


@pytest.mark.parametrize("mode", ["mrmw", "mrsw"])
def test_all_of_it_by_several_programs_at_once(blades: Rack, mode: str, tmp_path: Path) -> None:
    program = build(tmp_path, Path(__file__).parent / "native" / "hotpot_exercise.c")
    with shells(blades["gm0"]) as (python,):
        python.do(f"d = session.create({mode!r}, 16 * 4096, mode={mode!r}, chunk=4096)")
        where = ("mb0", "mb0", "mb1")
        running = [start(blades[name], program, mode, mode, 15) for name in where]
        assert {int(output(process), 16) for process in running} == {python.do("d.address")}
        python.do("import struct")
        counted = python.do("struct.unpack('Q', d.memory[:8]) + struct.unpack('Q', d.memory[8*4096-4 : 8*4096+4])")
        assert counted == (15 * len(where), 3 * 15 * len(where))
        python.do("d.close()")
        python.do(f"session.delete({mode!r})")


def test_the_example_counts_its_runs(blades: Rack, tmp_path: Path) -> None:
    program = build(tmp_path, LIBRARY / "example.c")
    assert [output(start(blades[name], program)) for name in ("mb0", "mb1", "mb0")] == [
        "run number 1\n", "run number 2\n", "run number 3\n"]  # fmt: skip
    blades["mb0"].run("session.delete('counter')")


def test_another_protocol_is_refused_and_so_is_a_blade_without_service(blades: Rack, tmp_path: Path) -> None:
    other = start(blades["mb0"], build(tmp_path, LIBRARY / "example.c", protocol=1000))
    assert "VersionMismatch" in other.communicate(timeout=60)[1]
    blade = Blade(tmp_path / "nothing", blades["mb0"].service, tmp_path)
    assert "no Hotpot at" in start(blade, build(tmp_path, LIBRARY / "example.c")).communicate(timeout=60)[1]
