"""Static programs, whose memory swaps to memory blades; and calls about memory, most of which is on memory blades."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.rack.conftest import Rack

pytestmark = [pytest.mark.rack, pytest.mark.timeout(300)]
NATIVE = Path(__file__).parent / "native"


def _compile(rack: Rack, folder: Path, name: str, *flags: str) -> str:
    """Compile a C program here (the blade's C library may be newer, not older), and put it on pb0."""
    subprocess.run(["cc", "-std=gnu17", "-O2", *flags, "-o", folder / name, NATIVE / f"{name}.c"], check=True)
    rack("cp", str(folder / name), f"pb0:/tmp/{name}")
    rack.on("pb0", f"chmod +x /tmp/{name}")
    return f"/tmp/{name}"


@pytest.fixture(scope="module")
def touch(rack: Rack, tmp_path_factory: pytest.TempPathFactory) -> str:
    return _compile(rack, tmp_path_factory.mktemp("static"), "touch_static", "-static")


def test_a_static_program_swaps_to_memory_blades(rack: Rack, touch: str, tmp_path: Path) -> None:
    stats = tmp_path / "stats.json"
    done = rack("run", "--on", "pb0", "--excache", "4MiB", "--stats", str(stats), "--", touch, "8")
    assert done.stdout == "fine\n"
    counted = json.loads(stats.read_text())
    assert counted["tier"] == "swap"
    assert counted["swap"]["memory_peak_bytes"] <= counted["swap"]["limit_bytes"] == 4 << 20
    assert counted["swap"]["swap_peak_bytes"] > 4 << 20
    assert counted["swap"]["blade_bytes_in"] > 1 << 20


def test_nothing_of_it_stays(rack: Rack, touch: str) -> None:
    """Neither of one that ends nor of one that is killed: no swap space, no group, no memory at memory blades."""
    run = f"split run --excache 4194304 -- {touch} 200"
    begun = "until pid=$(pidof touch_static); do sleep 0.2; done; sleep 2"
    killed = rack.on("pb0", f"({run}; echo $?) & {begun}; kill -9 $pid; wait")
    assert killed == "137\n"
    gone = "for i in $(seq 100); do pidof swapd >/dev/null || break; sleep 0.2; done"
    said = rack.on("pb0", f"{gone}; grep -c nbd /proc/swaps; find /sys/fs/cgroup/rackless -mindepth 1 -type d")
    assert said == "0\n"


def test_any_program_may_have_the_second_tier(rack: Rack, tmp_path: Path) -> None:
    stats = tmp_path / "stats.json"
    words = ("--on", "pb0", "--excache", "16MiB", "--tier", "swap", "--stats", str(stats))
    done = rack("run", *words, "--", "sh", "-c", "echo $LD_PRELOAD; exit 3", check=False)
    assert (done.returncode, done.stdout) == (3, "\n")
    assert json.loads(stats.read_text())["tier"] == "swap"
    done = rack("run", *words, "--replicas", "2", "--", "true", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--replicas 2 is not to be had in the second tier" in done.stderr


def test_calls_about_memory_do_what_the_kernel_does(rack: Rack, tmp_path: Path) -> None:
    """The unit tests have the other cases, and other organisations of the ExCache."""
    calls = _compile(rack, tmp_path, "memory_calls", "-lpthread")
    cases = ("protection", "unmapping", "remapping", "advice", "children")
    done = rack("run", "--on", "pb0", "--excache", "2MiB", "--", calls, "4", *cases, check=False)
    assert done.stdout == "".join(f"{case}: fine\n" for case in cases)
    assert (done.returncode, done.stderr) == (0, "")
