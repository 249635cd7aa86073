"""Missing things and bad moments: one clear line with a hint, an exit code, and nothing half-changed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.rack.conftest import Bench, Rack, unique

pytestmark = pytest.mark.rack


@pytest.fixture
def pair(bench: Bench) -> Iterator[Rack]:
    """A small rack's file; whatever a test makes of it is taken down."""
    name = unique("e")
    yield Rack(bench, name, bench.rack_file(name, "pair"))
    bench.rackless("down", name)


def _one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The error a command printed; fails when it is not one line with at most a hint, details and a log."""
    assert done.returncode != 0
    assert "Traceback" not in done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, done.stderr
    return errors[0]


def test_a_killed_libvirtd_is_started_again_and_finds_its_blades(pair: Rack) -> None:
    pair.bench.rackless("up", str(pair.file))
    uptimes = {name: b["agents"]["uptime_seconds"] for name, b in pair.bench.status(pair.name).items()}
    daemon = int((pair.bench.run / pair.name / "libvirt/libvirtd.pid").read_text())
    os.kill(daemon, signal.SIGKILL)
    after = pair.bench.status(pair.name)
    assert {name: blade["state"] for name, blade in after.items()} == {"gm0": "ready", "mb0": "ready"}
    assert all(after[name]["agents"]["uptime_seconds"] > uptimes[name] for name in after)
    assert json.loads(pair.bench.rackless("up", str(pair.file), "--json").stdout)["changed"] == []


def test_the_second_of_two_ups_is_told_who_is_at_work(pair: Rack) -> None:
    first = subprocess.Popen(pair.bench.command("up", str(pair.file)), env=pair.bench.env(),
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)  # fmt: skip
    try:
        assert first.stderr is not None
        for line in first.stderr:
            if "restore start" in line:
                break
        hasty = replace(pair.bench, environment={"RACKLESS_LOCK_SECONDS": "0.1"})  # the first may soon be done
        second = hasty.rackless("up", str(pair.file), check=False)
        assert re.search(rf"being changed by process {first.pid} ", _one_line(second))
    finally:
        first.communicate()
    assert first.returncode == 0


def test_no_room_for_an_image(pair: Rack, tmp_path: Path) -> None:
    with _small_disk(tmp_path) as disk:
        cramped = replace(pair.bench, environment={"RACKLESS_CACHE": str(disk)})
        done = cramped.rackless("image", "build", check=False)
        assert "MiB are free" in _one_line(done)
        assert "hint:" in done.stderr
        assert [path.name for path in (disk / "images").iterdir() if not path.name.endswith(".lock")] == []


def test_no_room_for_a_rack(pair: Rack, tmp_path: Path) -> None:
    with _small_disk(tmp_path) as disk:
        cramped = replace(pair.bench, environment={"RACKLESS_STATE": str(disk)})
        done = cramped.rackless("up", str(pair.file), check=False)
        try:
            assert "No space left on device" in _one_line(done)
        finally:
            cramped.rackless("down", pair.name)


def test_no_tun_device(pair: Rack) -> None:
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c",
               'mount --bind /dev/null /dev/net/tun && exec "$@"', "sh", *pair.bench.command("up", str(pair.file))]
    done = subprocess.run(command, env=pair.bench.env(), capture_output=True, text=True, check=False)  # fmt: skip
    assert "/dev/net/tun" in _one_line(done)
    assert pair.bench.status(pair.name) == {}


def test_a_blade_that_never_becomes_ready_shows_its_console(pair: Rack) -> None:
    """The blade's QEMU is stopped as soon as it is there, so nothing in it can answer."""
    hasty = replace(pair.bench, environment={"RACKLESS_READY_SECONDS": "1.5"})
    up = subprocess.Popen(hasty.command("up", str(pair.file)), env=hasty.env(), stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True)  # fmt: skip
    pid_file = pair.bench.run / pair.name / f"libvirt/qemu/{pair.name}.mb0.pid"
    lines = []
    assert up.stderr is not None
    for line in up.stderr:
        lines.append(line)
        if "mb0 join start" in line:
            stopped = int(pid_file.read_text())
            os.kill(stopped, signal.SIGSTOP)
    output = up.communicate()[0]
    done = subprocess.CompletedProcess(up.args, up.returncode, output, "".join(lines))
    try:
        assert "mb0 did not become ready" in _one_line(done)
        assert "log: " in done.stderr
    finally:
        os.kill(stopped, signal.SIGCONT)
    assert json.loads(pair.bench.rackless("up", str(pair.file), "--json").stdout)["changed"] == ["mb0"]


def test_a_corrupt_template_is_noticed_and_made_again(pair: Rack, tmp_path: Path) -> None:
    """On a copy of the cache, so that other tests keep theirs."""
    cache = Path(os.environ.get("RACKLESS_CACHE", "/var/cache/rackless"))
    pair.bench.rackless("up", str(pair.file))
    pair.bench.rackless("down", pair.name)
    subprocess.run(["cp", "-a", cache, tmp_path / "cache"], check=True)
    for state in (tmp_path / "cache/templates").glob("template-*/state.save"):
        with state.open("r+b") as file:
            file.seek(-4096, os.SEEK_END)
            file.write(os.urandom(4096))
    own = replace(pair.bench, environment={"RACKLESS_CACHE": str(tmp_path / "cache")})
    done = own.rackless("up", str(pair.file))
    assert "boot done" in done.stderr
    assert {blade["state"] for blade in own.status(pair.name).values()} == {"ready"}


def test_ctrl_c_leaves_what_up_mends(pair: Rack) -> None:
    up = subprocess.Popen(pair.bench.command("up", str(pair.file)), env=pair.bench.env(), stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, start_new_session=True)  # fmt: skip
    assert up.stderr is not None
    for line in up.stderr:
        if "restore done" in line:
            break
    began = time.monotonic()
    os.killpg(up.pid, signal.SIGINT)
    errors = up.communicate()[1]
    assert time.monotonic() - began < 10
    assert up.returncode == 130
    assert "interrupted" in errors
    pair.bench.rackless("up", str(pair.file))
    assert {blade["state"] for blade in pair.bench.status(pair.name).values()} == {"ready"}


@contextmanager
def _small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    place = folder / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)
