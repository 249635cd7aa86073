"""A storage blade that restarts, loses its power or stays away, as a program on a processor blade sees it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from typing import IO, Any

import pytest

from tests.rack.conftest import AGENT, Bench, Rack

pytestmark = [pytest.mark.rack, pytest.mark.timeout(900)]

BLADES: dict[str, Any] = {
    "gm0": {"kind": "manager", "cpus": 1, "memory": "256 MiB"},
    "pb0": {"kind": "processor", "cpus": 1, "memory": "512 MiB"},
    "mb0": {"kind": "memory", "cpus": 1, "memory": "256 MiB"},
    "sb0": {"kind": "storage", "cpus": 1, "memory": "256 MiB", "disk": {"size": "1 GiB"}},
}
RECORDS = """
import os, sys
fd = os.open("/vnode/records", os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o644)
os.fsync(os.open("/vnode", os.O_RDONLY))
for number in range(int(sys.argv[1])):
    if os.path.exists("/vnode/stop"):
        break
    os.pwrite(fd, b"%08d" % number * 512, number * 4096)
    os.fsync(fd)
    print(number, flush=True)
"""


@pytest.fixture(scope="module")
def small(bench: Bench) -> Iterator[Rack]:
    """A rack whose storage blade may be harmed."""
    with bench.up("s", blades=BLADES, links={"sb0": {"latency": "0 us"}}) as made:
        yield made


@pytest.fixture
def records(small: Rack, request: pytest.FixtureRequest) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    """A program that writes one record after another, each on the disk before it says its number."""
    words = small.bench.command("ssh", "--rack", small.name, "pb0", "--", "python3", "-",
                                  str(getattr(request, "param", 60)))  # fmt: skip
    with subprocess.Popen(words, env=small.bench.env(), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(RECORDS)
        process.stdin.close()
        yield process, process.stdout
        process.kill()


def _said(output: IO[str], wanted: int) -> None:
    """Read what the program says until it says a number."""
    for line in output:
        if line.strip() == str(wanted):
            return
        assert line.strip().isdigit(), line + output.read()
    raise AssertionError(f"it ended before {wanted}")


def _recorded(rack: Rack, blade: str = "sb0") -> list[int]:
    """What is on the storage blade."""
    read = "import os; d = open('/srv/vnode/records', 'rb').read(); print([d[i:i+4096] == b'%08d' % (i >> 12) * 512"
    told = rack.on(blade, f'python3 -c "{read} for i in range(0, len(d), 4096)])"')
    return [number for number, whole in enumerate(told.strip().strip("[]").split(", ")) if whole == "True"]


def test_an_agent_that_restarts_is_waited_for(small: Rack, records: tuple[subprocess.Popen[str], IO[str]]) -> None:
    process, output = records
    _said(output, 10)
    small.kill_agent("sb0")
    _said(output, 59)  # and no error between
    assert process.wait() == 0
    assert _recorded(small) == list(range(60))


def test_what_was_synced_survives_a_power_cut(small: Rack, records: tuple[subprocess.Popen[str], IO[str]]) -> None:
    process, output = records
    _said(output, 20)
    os.kill(int((small.bench.run / small.name / f"libvirt/qemu/{small.name}.sb0.pid").read_text()), signal.SIGKILL)
    small.bench.rackless("up", str(small.file))
    assert set(range(21)) <= set(_recorded(small))
    said = [line.strip() for line in output]  # goes on if the blade was back in time, else EIO: both are documented
    assert process.wait() == (0 if said[-1] == "59" else 1)
    assert said[-1] == "59" or "Errno 5" in said[-1], said


def test_a_blade_that_stays_away_is_an_error_and_its_return_the_end_of_it(small: Rack) -> None:
    small.on("pb0", "echo here > /vnode/f")
    small.on("sb0", f"sv down {AGENT}")
    try:
        said = small.on("pb0", "sleep 2; cat /vnode/f 2>&1; echo $?; cat /vnode/f 2>&1; echo $?")
        assert said.count("Input/output error") == 2, said
    finally:
        small.on("sb0", f"sv up {AGENT}")
    assert small.on("pb0", "until cat /vnode/f 2>/dev/null; do sleep 1; done; rm /vnode/f") == "here\n"


MAKE = """
mkdir -p /vnode/tree/deep && cd /vnode/tree && head -c 3000000 /dev/urandom > data && ln data deep/twin
ln -s data link
truncate -s 200M holes && chmod 2750 deep && chown 1234:4321 data && touch -d @1000000000.123456789 data deep
echo kept > removed && exec 9< removed && rm removed
echo ready; read go; cat <&9; sha256sum < data
"""
LOOK = """
cd /vnode/tree && find . -printf '%p %M %U %G %n %s %T@ %A@ %l\\n' | sort && sha256sum data deep/twin && du -k holes
"""


@pytest.fixture
def second(small: Rack) -> None:
    """Another storage blade, without files."""
    _rackless(small, "blade", "add", "storage", "sb1", "--disk", "512 MiB")


def _rackless(rack: Rack, *words: str, **more: Any) -> Any:
    return rack.bench.rackless(*words, "--rack", str(rack.file), **more)


@pytest.mark.usefixtures("second")
@pytest.mark.parametrize("records", [100_000], indirect=True)
def test_files_move_while_programs_use_them(small: Rack, records: tuple[subprocess.Popen[str], IO[str]]) -> None:
    """The last here: it removes sb0."""
    process, output = records
    _rackless(small, "vnode", "create", "web", "--storage", "sb0")
    words = small.bench.command("run", "--rack", small.name, "--vnode", "web", "--", "sh", "-c", MAKE)
    with subprocess.Popen(words, env=small.bench.env(), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT) as user:  # fmt: skip
        assert user.stdin is not None
        assert user.stdout is not None
        assert user.stdout.readline() == "ready\n"
        before = small.on("pb0", LOOK.replace("/vnode", "/vnode/web"))
        dry = json.loads(_rackless(small, "blade", "remove", "sb0", "--dry-run", "--json").stdout)
        assert 3 << 20 < dry["moved"] < 64 << 20, dry
        _said(output, 10)
        done = _rackless(small, "blade", "remove", "sb0").stdout
        assert "moved to other blades" in done, done
        print("go", file=user.stdin, flush=True)
        told = user.stdout.read()
        assert user.wait() == 0, told
    assert told.startswith("kept\n"), told
    assert told.split()[1] in before, "what it had open is what it was"
    small.on("pb0", "touch /vnode/stop")
    said = [int(line) for line in output]  # and no error between
    assert process.wait() == 0
    assert said == list(range(11, len(said) + 11))
    assert small.on("pb0", LOOK.replace("/vnode", "/vnode/web")) == before
    assert small("run", "--vnode", "web", "--", "sh", "-c", LOOK).stdout == before
    assert _recorded(small, "sb1") == list(range(len(said) + 11))
    vnodes = json.loads(_rackless(small, "vnode", "list", "--json").stdout)
    assert [vnode["storage"] for vnode in vnodes] == ["sb1", "sb1"]
    refused = _rackless(small, "blade", "remove", "sb1", check=False)
    assert refused.returncode != 0
    assert "there is no other storage blade" in refused.stderr, refused.stderr
