"""`kill -9` of the orchestrator at any moment leaves nothing that the next `up` or `down` does not mend."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time

import pytest

from tests.rack.conftest import Bench, unique

pytestmark = pytest.mark.rack

KILLS = 30
SEED = int(os.environ.get("RACKLESS_SEED", "2026"))


@pytest.mark.timeout(1500)
def test_up_converges_after_kill_9_at_any_moment(bench: Bench) -> None:
    chance = random.Random(SEED)
    name = unique("k")
    file = bench.rack_file(name, "pair")
    bench.rackless("up", str(file))
    bench.rackless("down", name)
    begun = time.monotonic()
    bench.rackless("up", str(file))  # with templates: how long an `up` takes here now
    whole = time.monotonic() - begun
    moments = []
    try:
        for number in range(KILLS):
            if number % 3 == 0:
                bench.rackless("down", name)
            victim = ("down", name) if number % 5 == 4 else ("up", str(file))
            moments.append((victim[0], _killed_after(bench, victim, chance.uniform(0, whole))))
            result = json.loads(bench.rackless("up", str(file), "--json").stdout)
            states = {blade: about["state"] for blade, about in bench.status(name).items()}
            assert states == {"gm0": "ready", "mb0": "ready"}, f"kill {number} of {moments[-1]}, then {result}"
            assert bench.rackless("plan", str(file)).returncode == 0
            assert json.loads(bench.rackless("gc", "--json").stdout) == []
    finally:
        print(f"seed {SEED}, an up takes {whole:.1f} s, killed (command, seconds): {moments}")
        bench.rackless("down", name)
    assert _processes_of(name) == []


def _killed_after(bench: Bench, words: tuple[str, str], seconds: float) -> float | None:
    """Start a command, kill it after some seconds; None when it had ended by then."""
    process = subprocess.Popen(bench.command(*words), env=bench.env(), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        process.wait(seconds)
        return None
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return round(seconds, 2)


def _processes_of(rack: str) -> list[str]:
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                with open(f"{entry.path}/cmdline") as file:
                    command = file.read()
            except OSError:
                continue
            if f"guest={rack}." in command or f"/{rack}/libvirt/" in command:
                found.append(command.replace("\0", " ")[:200])
    return found
