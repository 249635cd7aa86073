"""`kill -9` of the orchestrator at any moment leaves nothing that the next `up` or `down` does not mend."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from contextlib import suppress

import pytest

from tests.rack.conftest import Bench, unique

pytestmark = pytest.mark.rack

KILLS = int(os.environ.get("RACKLESS_KILLS", "10"))
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
    kills: list[tuple[str, float]] = []
    try:
        for attempt in range(3 * KILLS):
            victim = ("up", str(file)) if attempt % 5 else ("down", name)
            if victim[0] == "up" and attempt % 2:
                bench.rackless("down", name)
            elif victim[0] == "up":
                _cut_power(bench, name, "mb0")
            moment = chance.uniform(0, whole if victim[0] == "up" else 1.5)
            if not _killed_after(bench, victim, moment):
                continue  # it was done by then
            kills.append((victim[0], round(moment, 2)))
            result = json.loads(bench.rackless("up", str(file), "--json").stdout)
            states = {blade: about["state"] for blade, about in bench.status(name).items()}
            assert states == {"gm0": "ready", "mb0": "ready"}, f"after {kills[-1]}: {result}"
            assert bench.rackless("plan", str(file)).returncode == 0
            assert json.loads(bench.rackless("gc", "--json").stdout) == []
            if len(kills) == KILLS:
                break
    finally:
        print(f"seed {SEED}; an up takes {whole:.1f} s; {len(kills)} kills (command, seconds): {kills}")
        bench.rackless("down", name)
    assert len(kills) == KILLS
    assert _processes_of(name) == []


def _cut_power(bench: Bench, rack: str, blade: str) -> None:
    with suppress(FileNotFoundError, ProcessLookupError):  # the last attempt may have ended it
        os.kill(int((bench.run / rack / f"libvirt/qemu/{rack}.{blade}.pid").read_text()), signal.SIGKILL)


def _killed_after(bench: Bench, words: tuple[str, str], seconds: float) -> bool:
    """Start a command and kill it after some seconds; False when it had ended by then."""
    process = subprocess.Popen(bench.command(*words), env=bench.env(), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True


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
