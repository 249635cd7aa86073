"""`rackless run`: a program on a stand-in blade behaves as if it ran here."""

from __future__ import annotations

import filecmp
import json
import os
import pty
import signal
import subprocess
import time
from pathlib import Path

import pytest

from orchestrator.cli.run import check_writable, parse_excache
from orchestrator.errors import RacklessError
from tests.unit.stand_in_rackless import ROOT, Rackless

pytestmark = pytest.mark.long


@pytest.mark.netns
def test_run_has_the_programs_streams_exit_code_and_directory(rackless: Rackless) -> None:
    done = rackless("run", "--on", "pb0", "--", "sh", "-c", "pwd; cat; echo err >&2; exit 42", input="in\n")
    assert (done.stdout, done.stderr, done.returncode) == (f"{rackless.vnode}\nin\n", "err\n", 42)


@pytest.mark.netns
def test_run_keeps_arguments_as_they_are(rackless: Rackless) -> None:
    words = ["a b", "", "$HOME", "it's", '"', "*", "--on", "-x", "\\n", "é"]
    done = rackless("run", "--on", "pb0", "printf", "%s\n", *words)
    assert done.stdout.splitlines() == words


@pytest.mark.netns
def test_run_streams_much_binary_data_both_ways(rackless: Rackless) -> None:
    data = os.urandom(32 << 20)
    (rackless.folder / "in").write_bytes(data)
    with (rackless.folder / "in").open("rb") as source, (rackless.folder / "out").open("wb") as sink:
        process = rackless.start("run", "--on", "pb0", "--", "cat", stdin=source, stdout=sink, stderr=None)
        assert process.wait(60) == 0
    assert filecmp.cmp(rackless.folder / "in", rackless.folder / "out", shallow=False)


@pytest.mark.netns
def test_run_passes_output_on_as_it_comes_and_waits_for_no_stdin(rackless: Rackless) -> None:
    keep_open, unused = os.pipe()
    process = rackless.start(
        "run", "--on", "pb0", "--", "sh", "-c", "echo first; sleep 1; echo second", stdin=keep_open
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"first\n"
    first_at = time.monotonic()
    assert process.stdout.readline() == b"second\n"
    assert time.monotonic() - first_at > 0.5
    assert process.wait(20) == 0
    os.close(keep_open)
    os.close(unused)
    closed = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *rackless.command("run", "--on", "pb0", "--", "cat")],
        env=rackless.environment, cwd=ROOT, capture_output=True, check=False, timeout=60,
    )  # fmt: skip
    assert (closed.returncode, closed.stdout) == (0, b"")


@pytest.mark.netns
def test_run_writes_stats_here_and_leaves_nothing_there(rackless: Rackless) -> None:
    stats = rackless.folder / "stats.json"
    options = ("--excache", "16MiB", "--replicas", "2", "--stats", stats)
    done = rackless("run", "--on", "pb0", *options, "--", "sh", "-c", "exit 3")
    assert done.returncode == 3
    assert json.loads(stats.read_text()) == {"misses": 1, "excache": str(16 << 20), "replicas": "2"}
    assert not list(Path("/tmp").glob("rackless-run-*"))


@pytest.mark.netns
def test_migrate_says_before_the_program_ends_that_stats_cannot_be_written(rackless: Rackless) -> None:
    done = rackless("migrate", "pb0.1", "--on", "pb0", "--stats", rackless.folder / "none" / "s")
    assert (done.returncode, "there is no folder" in done.stderr) == (1, True), done


@pytest.mark.netns
def test_run_writes_a_trace_here_and_leaves_nothing_there(rackless: Rackless) -> None:
    stats, trace = rackless.folder / "stats.json", rackless.folder / "trace.json"
    for options in (("--trace", trace), ("--trace", trace, "--stats", stats)):
        assert rackless("run", "--on", "pb0", *options, "--", "sh", "-c", "exit 3").returncode == 3
        assert json.loads(trace.read_text()) == {"traceEvents": []}
        trace.unlink()
    assert json.loads(stats.read_text())["misses"] == 1
    assert not list(Path("/tmp").glob("rackless-run-*"))


@pytest.mark.netns
def test_run_says_which_result_is_missing(rackless: Rackless) -> None:
    trace = rackless.folder / "trace.json"
    options = ("--trace", trace, "--stats", rackless.folder / "s", "--env", "FORGET_TRACE=1")
    done = rackless("run", "--on", "pb0", *options, "--", "true")
    assert done.returncode == 1
    assert "pb0 has no trace of this run" in done.stderr
    assert (rackless.folder / "s").exists()
    assert not list(Path("/tmp").glob("rackless-run-*"))


@pytest.mark.netns
def test_run_says_how_the_excache_is_organised(rackless: Rackless) -> None:
    options = ("--ways", "8", "--policy", "lru", "--victim", "16", "--prefetch", "4", "--no-pool",
               "--tier", "excache")  # fmt: skip
    done = rackless("run", "--on", "pb0", *options, "--", "true")
    said = "organised: --ways 8 --policy lru --victim 16 --prefetch 4 --pool off --tier excache\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, said, "")
    refused: list[tuple[tuple[str, ...], str]] = [
        (("--ways", "0"), "Invalid value for '--ways'"),
        (("--policy", "mru"), "'mru' is not one of 'fifo', 'lru', 'random'"),
        (("--prefetch", "33"), "Invalid value for '--prefetch'"),
        (("--ways", "8", "--pool"), "--pool and --ways exclude each other"),
    ]
    for words, why in refused:
        done = rackless("run", "--on", "pb0", *words, "--", "true")
        assert done.returncode != 0
        assert why in done.stderr, done.stderr


@pytest.mark.netns
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_forwards_signals(rackless: Rackless, number: signal.Signals) -> None:
    name = number.name.removeprefix("SIG")
    script = f"trap 'echo got {name}; exit 17' {name}; echo ready; while :; do sleep 0.1; done"
    process = rackless.start("run", "--on", "pb0", "--", "sh", "-c", script)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    assert process.stdout.read() == f"got {name}\n".encode()
    assert process.wait(20) == 17


@pytest.mark.netns
def test_run_tells_death_by_a_signal_as_a_shell_does(rackless: Rackless) -> None:
    assert rackless("run", "--on", "pb0", "--", "sh", "-c", "kill -9 $$").returncode == 137
    process = rackless.start("run", "--on", "pb0", "--", "sh", "-c", "echo ready; exec sleep 30")
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130


@pytest.mark.netns
def test_run_on_a_terminal_gives_the_program_one(rackless: Rackless) -> None:
    ours, theirs = pty.openpty()
    script = "test -t 0 && test -t 1 && echo a terminal; read line; exit 6"
    process = rackless.start(
        "run", "--on", "pb0", "--", "sh", "-c", script,
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    while b"a terminal\r\n" not in shown:
        shown += os.read(ours, 1000)
    os.write(ours, b"go\r")
    assert process.wait(20) == 6
    os.close(ours)


@pytest.mark.netns
def test_run_with_typed_input_and_piped_output(rackless: Rackless) -> None:
    ours, theirs = pty.openpty()
    process = rackless.start("run", "--on", "pb0", "--", "cat", stdin=theirs, start_new_session=True)
    os.close(theirs)
    os.write(ours, b"typed\n\x04")
    assert process.stdout is not None
    assert process.stdout.read() == b"typed\n"
    assert process.wait(20) == 0
    os.close(ours)


@pytest.mark.netns
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--on", "mb0", "true"], "mb0 is a memory blade: it runs no programs"),
        (["--on", "pb7", "true"], "no blade pb7 in rack"),
        (["--on", "pb0", "--excache", "16", "true"], '"16" has no unit; write "16 MiB"'),
        (["--on", "pb0", "--stats", "no/such/file", "true"], "there is no folder no/such"),
        (["--on", "pb0", "--trace", "no/such/file", "true"], "--trace: there is no folder no/such"),
        (["--on", "pb0", "--trace", "a", "--stats", "./a", "true"], "--stats and --trace cannot both go to a"),
    ],
)
def test_run_errors(rackless: Rackless, arguments: list[str], message: str) -> None:
    done = rackless("run", *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.netns
def test_run_without_a_vnode_says_so(rackless: Rackless) -> None:
    rackless.vnode.rmdir()
    done = rackless("run", "--on", "pb0", "true")
    assert done.returncode == 125
    assert f"pb0 has no {rackless.vnode}" in done.stderr
    assert not list(Path("/tmp").glob("rackless-run-*"))


def test_sizes_and_files_are_checked_before_anything_runs(tmp_path: Path) -> None:
    assert parse_excache(None) is None
    assert parse_excache("64 MiB") == 64 << 20
    with pytest.raises(RacklessError, match="--excache"):
        parse_excache("much")
    check_writable(tmp_path / "stats.json")
    with pytest.raises(RacklessError, match="is a folder"):
        check_writable(tmp_path)
