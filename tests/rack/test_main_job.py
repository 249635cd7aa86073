"""The main job: unmodified programs on a processor blade, memory on memory blades, files on a storage blade."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from orchestrator.corpus import english
from orchestrator.settings import Settings
from tests.rack.conftest import Rack

pytestmark = pytest.mark.rack

TEXT_BYTES = 2 << 20
EXCACHE = "16MiB"
COUNT_WORDS = """{ $0 = tolower($0); gsub(/[^a-z]+/, " "); for (i = 1; i <= NF; i++) count[$i]++ }
END { for (word in count) print count[word], word }"""


@pytest.fixture(scope="module")
def text(rack: Rack, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Real English, put on the storage blade as /vnode/english.txt."""
    with english(Settings.from_environment()).open("rb") as source:
        content = source.read(TEXT_BYTES)
    local = tmp_path_factory.mktemp("text") / "english.txt"
    local.write_bytes(content)
    rack("cp", str(local), "sb0:/vnode/english.txt")
    return content


def _run(rack: Rack, *command: str, excache: str = EXCACHE, stats: Path | None = None, **more: Any) -> Any:
    words = ["--on", "pb0", "--excache", excache, *(["--stats", str(stats)] if stats else []), "--", *command]
    return subprocess.run(rack.bench.command("run", "--rack", rack.name, *words), env=rack.bench.env(), check=False,
                          timeout=900, **{"stdin": subprocess.DEVNULL, "capture_output": True, **more})  # fmt: skip


def _out(done: Any) -> bytes:
    assert done.returncode == 0, done.stderr.decode()
    return bytes(done.stdout)


@pytest.mark.timeout(900)
def test_gawk_counts_words(rack: Rack, text: bytes, tmp_path: Path) -> None:
    output = _out(_run(rack, "env", "LC_ALL=C", "gawk", COUNT_WORDS, "english.txt", stats=tmp_path / "stats.json",
                       excache="8MiB"))  # fmt: skip
    counted = {word: int(count) for count, word in (line.split(b" ", 1) for line in output.splitlines())}
    assert counted == Counter(re.findall(rb"[a-z]+", text.lower()))
    stats = json.loads((tmp_path / "stats.json").read_text())
    assert stats["misses"] > 100
    assert stats["flushes"] > 100
    assert stats["zero_fills"] > 1000
    assert stats["bytes_in"] >= 4096 * stats["misses"]
    assert stats["bytes_out"] >= 4096 * stats["flushes"] > 0
    assert stats["piggybacks"] >= 0
    assert stats["packed_hits"] > 10 * stats["misses"]  # a word's pages were near, but not plain
    assert 0 < stats["pool_bytes"] <= stats["excache_bytes"] * 3 // 4
    assert stats["packed_bytes"] < 4096 * stats["packed"] // 2
    assert set(stats["blades"]) <= {"mb0", "mb1"}


@pytest.mark.timeout(900)
def test_gnu_sort(rack: Rack, text: bytes) -> None:
    output = _out(_run(rack, "env", "LC_ALL=C", "sort", "-S", "40M", "english.txt", excache="4MiB"))
    assert output.splitlines() == sorted(text.splitlines())


@pytest.mark.timeout(900)
def test_sqlite_with_its_database_on_the_storage_blade(rack: Rack, text: bytes) -> None:
    words = Counter(re.findall(rb"[a-z]+", text.lower()[: 256 << 10]))
    sql = ["create table words(word text primary key, count int);", "begin;"]
    sql += [f"insert into words values('{word.decode()}', {count});" for word, count in words.items()]
    sql += ["commit;", "select count(*), sum(count) from words;",
            "select word, count from words order by count desc, word limit 5;", "pragma integrity_check;"]  # fmt: skip
    done = _run(rack, "sqlite3", "words.db", stdin=None, input="\n".join(sql).encode())
    best = sorted(words.items(), key=lambda item: (-item[1], item[0]))[:5]
    expected = [b"%d|%d" % (len(words), sum(words.values())), *(b"%s|%d" % pair for pair in best), b"ok"]
    assert _out(done).splitlines() == expected
    assert "words.db" in rack.on("sb0", "ls /vnode")


def test_streams_and_exit_codes_are_the_programs(rack: Rack) -> None:
    data = bytes(range(256)) * 300
    assert _out(_run(rack, "cat", stdin=None, input=data)) == data
    done = _run(rack, "sh", "-c", "echo out; echo err >&2; exit 3")
    assert (done.returncode, done.stdout, done.stderr) == (3, b"out\n", b"err\n")
    assert _run(rack, "pwd").stdout == b"/vnode\n"
    missing = _run(rack, "no-such-program")
    assert missing.returncode == 127
    assert missing.stderr.count(b"\n") == 1


def test_the_racks_excache_can_change_while_it_runs(rack: Rack, tmp_path: Path) -> None:
    stats = tmp_path / "stats.json"

    def excache() -> int:
        done = rack("run", "--on", "pb0", "--stats", str(stats), "--", "true")
        assert done.returncode == 0
        return int(json.loads(stats.read_text())["excache_bytes"])

    assert excache() == 64 << 20
    text = rack.file.read_text()
    try:
        rack.file.write_text(text.replace("excache: 64 MiB", "excache: 8 MiB"))
        rack.bench.rackless("up", str(rack.file))
        assert excache() == 8 << 20
    finally:
        rack.file.write_text(text)
        rack.bench.rackless("up", str(rack.file))


def test_run_refuses_what_makes_no_sense(rack: Rack) -> None:
    for words, said in (
        (("--on", "mb0", "--", "true"), "runs no programs"),
        (("--on", "pb9", "--", "true"), "no blade pb9"),
        (("--on", "pb0", "--excache", "lots", "--", "true"), "lots"),
    ):
        done = rack("run", *words, check=False)
        assert done.returncode != 0
        assert said in done.stderr
        assert "Traceback" not in done.stderr
