"""Files through the buffer cache of a memory blade, on real blades: counted, not timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.rack.conftest import Rack

pytestmark = [pytest.mark.rack, pytest.mark.timeout(600)]

SIZE = 1 << 20
FORGET = "echo 3 > /proc/sys/vm/drop_caches"
"""The page cache of a blade's own kernel: else it is what answers."""


def _run(rack: Rack, stats: Path, *words: str) -> tuple[str, dict[str, Any]]:
    """What a program prints, and what it asked of storage."""
    done = rack("run", "--on", "pb0", "--stats", str(stats), "--", *words)
    return done.stdout, json.loads(stats.read_text())["storage"]["sb0"]


def _look(rack: Rack) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(rack("top", "--json", "--seconds", "0.2").stdout)
    return found


def test_a_second_program_reads_without_the_storage_blade(rack: Rack, tmp_path: Path) -> None:
    rack.on("sb0", f"head -c {SIZE} /dev/urandom > /srv/vnode/buffered; sync; {FORGET}")
    summed = rack.on("sb0", "sha256sum < /srv/vnode/buffered")
    first, asked = _run(rack, tmp_path / "first.json", "sha256sum", "buffered")
    assert first.split()[0] == summed.split()[0]
    assert asked["buffer_misses"] > 0

    rack.on("pb0", FORGET)
    before = _look(rack)
    second, asked = _run(rack, tmp_path / "second.json", "sha256sum", "buffered")
    after = _look(rack)
    assert second == first
    assert asked["buffer_hits"] > 0
    assert asked["buffer_misses"] == 0
    assert asked["by_opcode"]["P2M_READ"] == asked["buffer_hits"]
    assert before["storage"][0]["bytes_out"] == after["storage"][0]["bytes_out"]
    assert before["storage"][0]["by_opcode"]["M2S_READ"] == after["storage"][0]["by_opcode"]["M2S_READ"]
    hits = [sum(blade["buffers"]["bytes_hit"] for blade in look["memory"]) for look in (before, after)]
    assert hits[1] - hits[0] == SIZE
    print(asked, after["memory"])

    # Written through: on the disk after fsync, and kept.
    _run(rack, tmp_path / "third.json", "dd", "if=/dev/zero", "of=buffered", "bs=64k", "count=2", "conv=notrunc,fsync")
    rack.on("sb0", "cmp -n 131072 /srv/vnode/buffered /dev/zero")
    rack.on("pb0", FORGET)
    told, asked = _run(rack, tmp_path / "fourth.json", "sha256sum", "buffered")
    assert told.split()[0] == rack.on("sb0", "sha256sum < /srv/vnode/buffered").split()[0]
    assert asked["buffer_misses"] == 0
