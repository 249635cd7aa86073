"""A rack comes up, stays as its file says, and can be changed while it runs."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import yaml

from tests.rack.conftest import Bench, Rack, unique

pytestmark = pytest.mark.rack


def test_every_blade_is_ready(rack: Rack) -> None:
    blades = rack.bench.status(rack.name)
    assert {name: blade["kind"] for name, blade in blades.items()} == {
        "gm0": "manager", "pb0": "processor", "mb0": "memory", "mb1": "memory", "sb0": "storage"}  # fmt: skip
    assert {blade["state"] for blade in blades.values()} == {"ready"}
    assert blades["pb0"]["cpus"] == 1
    assert blades["pb0"]["memory_bytes"] == 512 << 20
    assert {blade["agents"]["rdma"] for blade in blades.values()} == {"ACTIVE"}
    assert len({blade["agents"]["node_id"] for blade in blades.values()}) == 5


def test_a_second_up_has_nothing_to_do(rack: Rack) -> None:
    before = {name: blade["agents"]["uptime_seconds"] for name, blade in rack.bench.status(rack.name).items()}
    assert rack.bench.rackless("plan", str(rack.file)).returncode == 0
    result = json.loads(rack.bench.rackless("up", str(rack.file), "--json").stdout)
    assert result["changed"] == []
    assert (result["restored"], result["booted"]) == (0, 0)
    after = {name: blade["agents"]["uptime_seconds"] for name, blade in rack.bench.status(rack.name).items()}
    assert all(after[name] > before[name] for name in before)


def test_identities_differ_between_clones(rack: Rack) -> None:
    facts = {}
    for blade in ("mb0", "mb1", "pb0"):
        commands = ("hostname", "cat /etc/machine-id", "md5sum < /etc/ssh/ssh_host_ed25519_key",
                    "head -c16 /dev/urandom | od -An -tx1")  # fmt: skip
        facts[blade] = rack.on(blade, "; ".join(commands)).splitlines()
    assert [lines[0] for lines in facts.values()] == ["mb0", "mb1", "pb0"]
    for line in (1, 2, 3):
        assert len({lines[line] for lines in facts.values()}) == 3


def test_the_clock_is_right(rack: Rack) -> None:
    assert abs(float(rack.on("mb0", "date +%s.%N")) - time.time()) < 30


def test_changes_are_live_where_they_can_be(bench: Bench) -> None:
    name = unique("live")
    file = bench.rack_file(name, "pair")
    try:
        bench.rackless("up", str(file))
        uptime = bench.status(name)["mb0"]["agents"]["uptime_seconds"]
        _edit(file, "mb0", cpu_quota="40 %")
        planned = bench.rackless("plan", str(file), check=False)
        assert planned.returncode == 2
        assert "cpu_quota" in planned.stdout
        assert "update" in planned.stdout
        result = json.loads(bench.rackless("up", str(file), "--json").stdout)
        assert result["changed"] == ["mb0"]
        assert result["restored"] == 0
        assert bench.status(name)["mb0"]["agents"]["uptime_seconds"] > uptime, "the blade was made anew"
        _edit(file, "mb1", kind="memory", memory="256 MiB")
        result = json.loads(bench.rackless("up", str(file), "--json").stdout)
        assert result["changed"] == ["mb1"]
        assert {b["state"] for b in bench.status(name).values()} == {"ready"}
    finally:
        bench.rackless("down", name)
    assert bench.status(name) == {}


def _edit(file: Path, blade: str, **keys: str) -> None:
    data = yaml.safe_load(file.read_text())
    data["blades"].setdefault(blade, {}).update(keys)
    file.write_text(yaml.safe_dump(data, sort_keys=False))
