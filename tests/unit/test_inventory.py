"""The Ansible inventory plugin, by Ansible's own commands on stand-in blades."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.stand_in import StandInRack, blade_specs

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent

Ansible = Callable[..., subprocess.CompletedProcess[str]]

# Python imports this at its start: Ansible then finds the given blades where libvirt would be asked.
SITE = """
import json
from pathlib import Path
from tests.unit.stand_in_cli import install_engine

install_engine(json.loads(Path({facts!r}).read_text()))
"""


def make_ansible(folder: Path, rack: str, facts: dict[str, object], state: Path, run: Path) -> Ansible:
    """Return a function that runs one of Ansible's commands, from the project's root as a user would."""
    if not (BIN / "ansible").exists():
        pytest.skip("needs ansible-core")
    (folder / "facts.json").write_text(json.dumps(facts))
    (folder / "sitecustomize.py").write_text(SITE.format(facts=str(folder / "facts.json")))
    environment = {
        **os.environ,
        "RACKLESS_STATE": str(state),
        "RACKLESS_RUN": str(run),
        "RACKLESS_CACHE": str(folder / "cache"),
        "RACKLESS_RACK": rack,
        "PYTHONPATH": f"{folder}:{ROOT}",
        "ANSIBLE_HOME": str(folder / "ansible"),
    }

    def ansible(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [BIN / command, *arguments],
            env=environment, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip

    return ansible


@pytest.fixture
def demo(tmp_path: Path) -> Ansible:
    """Ansible over a rack that only has to be described, not reached."""
    specs = blade_specs("demo", ("gm0", "pb0", "mb0", "mb1"))
    facts = {"specs": [spec.to_json() for spec in specs.values()], "paused": ["mb1"]}
    return make_ansible(tmp_path, "demo", facts, tmp_path / "state", tmp_path / "run")


def test_blades_are_hosts_in_a_group_per_kind(demo: Ansible, tmp_path: Path) -> None:
    done = demo("ansible-inventory", "--list")
    listed = json.loads(done.stdout)
    groups = {kind: listed[kind]["hosts"] for kind in listed["all"]["children"] if kind != "ungrouped"}
    assert groups == {"manager": ["gm0"], "processor": ["pb0"], "memory": ["mb0"]}, "mb1 is paused"
    config = tmp_path / "state" / "racks" / "demo" / "ssh" / "ssh_config"
    assert plain(listed["_meta"]["hostvars"]["pb0"]) == {
        "ansible_host": "10.78.0.11",
        "ansible_user": "root",
        "ansible_ssh_common_args": f"-F '{config}'",
        "ansible_python_interpreter": "/usr/bin/python3",
        "rackless_rack": "demo",
        "rackless_kind": "processor",
        "rackless_cpus": 1,
        "rackless_memory_bytes": 256 << 20,
        "rackless_mgmt_address": "10.78.0.11",
        "rackless_fabric_address": "10.77.0.11",
    }
    assert config.exists()


def plain(variables: dict[str, Any]) -> dict[str, Any]:
    """Take off the mark by which Ansible remembers that a text is no template."""
    return {name: value["__ansible_unsafe"] if isinstance(value, dict) else value for name, value in variables.items()}


def test_users_can_construct_groups(demo: Ansible, tmp_path: Path) -> None:
    inventory = tmp_path / "my.rackless.yml"
    inventory.write_text("plugin: rackless\ngroups: {dram: \"rackless_kind == 'memory'\"}\n")
    listed = json.loads(demo("ansible-inventory", "-i", str(inventory), "--list").stdout)
    assert listed["dram"]["hosts"] == ["mb0"]


def test_a_rack_that_is_not_up_has_no_hosts_and_says_so(demo: Ansible, tmp_path: Path) -> None:
    inventory = tmp_path / "rackless.yml"
    inventory.write_text("plugin: rackless\nrack: other\n")
    done = demo("ansible-inventory", "-i", str(inventory), "--list")
    assert json.loads(done.stdout)["_meta"]["hostvars"] == {}
    assert "rack other is not up" in done.stderr


@pytest.mark.long
@pytest.mark.netns
def test_ping_reaches_every_blade(stand_in_rack: StandInRack, tmp_path: Path) -> None:
    facts: dict[str, object] = {
        "specs": [spec.to_json() for spec in stand_in_rack.specs.values()],
        "paused": [],
    }
    settings = stand_in_rack.paths.settings
    ansible = make_ansible(tmp_path, stand_in_rack.paths.name, facts, settings.state_dir, settings.run_dir)
    done = ansible("ansible", "-m", "ping", "all", "-o")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count('"ping": "pong"') == 4
    memory = ansible("ansible", "-m", "command", "-a", "printenv BLADE", "memory", "-o")
    assert sorted(line.split()[0] for line in memory.stdout.splitlines()) == ["mb0", "mb1"]
    assert ansible("ansible-playbook", "playbooks/ping.yml").returncode == 0
