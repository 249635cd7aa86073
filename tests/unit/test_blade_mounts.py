"""What a processor blade does to its own system for vNodes: addresses and mounts, in namespaces of their own."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest_agents import fabric
from orchestrator.network.namespace import inside

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.netns, pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make namespaces")]

ROOTS = """
import subprocess, sys
from pathlib import Path
from guest_agents.control import ControlError
from guest_agents.splitkernel.managers.vnode import VNode
from guest_agents.splitkernel.process.roots import Roots

where, mounted = Path(sys.argv[1]), []

def serve(blade, folder):
    mounted.append(blade)
    folder.mkdir(parents=True, exist_ok=True)
    how = "ro" if blade == "full" else "rw"
    subprocess.run(["mount", "-t", "tmpfs", "-o", how, "none", folder], check=True)

def vnode(name, storage):
    return VNode(name, 1, None, ("pb0",), ("mb0",), storage, "round-robin")

roots = Roots(serve, where)
assert roots.of(vnode("none", None)) is None
assert roots.of(vnode("web", "sb0")) == where / "sb0" / "web"
assert roots.of(vnode("db", "sb0")) == where / "sb0" / "db"
assert roots.of(vnode("web", "sb1")) == where / "sb1" / "web"
(where / "sb0" / "web" / "f").write_text("kept")
assert mounted == ["sb0", "sb1"]
try:
    roots.of(vnode("web", "full"))
except ControlError as error:
    assert "no folder web on full" in error.error and "Read-only" in error.error, error
else:
    raise AssertionError
again = Roots(serve, where)  # what an agent that died has left does not answer any more
assert not list((where / "sb0").iterdir())
assert again.of(vnode("web", "sb0")).is_dir()
print("good")
"""


@pytest.fixture
def namespace() -> Iterator[str]:
    """The name of a rack whose network namespace has a card called mgmt, with a blade's address."""
    name = f"t{secrets.token_hex(4)}"
    ip = ["ip", "-n", f"rackless-{name}"]
    subprocess.run(["ip", "netns", "add", f"rackless-{name}"], check=True)
    try:
        subprocess.run([*ip, "link", "add", "mgmt", "type", "veth", "peer", "name", "other"], check=True)
        subprocess.run([*ip, "addr", "add", "10.78.0.11/24", "dev", "mgmt"], check=True)
        yield name
    finally:
        subprocess.run(["ip", "netns", "del", f"rackless-{name}"], check=True)


def test_a_blade_holds_the_addresses_of_vnodes_and_keeps_its_own(namespace: str) -> None:
    def held() -> list[str]:
        shown = subprocess.run(["ip", "-json", "-4", "-n", f"rackless-{namespace}", "addr", "show", "dev", "mgmt"],
                               capture_output=True, check=True)  # fmt: skip
        return sorted(entry["local"] for entry in json.loads(shown.stdout)[0]["addr_info"])

    for wanted in ({"10.78.0.253"}, {"10.78.0.253", "10.78.0.252"}, {"10.78.0.251"}, set()):
        inside(namespace, lambda wanted=wanted: fabric.hold("10.78.0.11", 24, wanted))  # type: ignore[misc]
        assert held() == sorted({"10.78.0.11"} | wanted)


def test_each_storage_blade_is_mounted_once_and_has_a_folder_for_each_vnode(tmp_path: Path) -> None:
    command = ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", ROOTS, str(tmp_path / "storage")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "good\n"), done.stderr
