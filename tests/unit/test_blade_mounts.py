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
from tests.unit.vnode_mounts import missing

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

# A process monitor with one storage blade, whose files are both all of /vnode and those of the vNode web.
MONITOR = """
import os, socket, sys
from pathlib import Path
from unittest.mock import patch
from tests.unit import stand_in_pyverbs
stand_in_pyverbs.install()
from guest_agents.budget import Budget
from guest_agents.config import AgentConfig
from guest_agents.lite.links import Links
from guest_agents.splitkernel.managers.holder import Holder
from guest_agents.splitkernel.managers.vnode import Ledger, VNode
from guest_agents.splitkernel.process import monitor
from guest_agents.verbs.node import Node
from tests.unit.vnode_mounts import Wire

files, secret = Path(sys.argv[1]), b"s" * 32
files.mkdir()
holder = Holder(Links(secret, lambda: None, lambda life: None), lambda: None, lambda: None, lambda dead: None,
                Path("/run/vnodes.json"))
holder._adopt(Ledger(1, 2, {"web": VNode("web", 1, None, ("pb0",), (), "sb0", "round-robin")}))
config = AgentConfig("pb0", Node(stand_in_pyverbs.device("10.77.0.2")), secret,
                     lambda kind: {"sb0": "127.0.0.1"} if kind == "storage" else {}, Budget(0), holder,
                     vnode=Path("/run/vnode"))
patch.object(monitor, "Client", lambda *arguments: Wire(files)).start()
told = monitor.handlers(config)
desk = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
desk.connect(str(monitor.SOCKET))
desk.send(b"job - web")
roots = [config.vnode, Path(desk.recv(4096).decode().split()[3])]
assert roots[1].name == "web", roots
while " /run/vnode fuse" not in Path("/proc/mounts").read_text():
    pass
opened = []
for root in (*roots, *roots):  # the first removal of each empties what an earlier agent has left
    name = root / f"f{len(opened)}"
    name.write_text(str(len(opened)))
    opened.append(name.open())
    name.unlink()
removed = sorted(path.read_text() for path in files.glob(".vnode-removed/*/*"))
assert removed == ["0", "1", "2", "3"], removed
assert [file.read() for file in opened] == removed
assert os.listdir(roots[0]) == ["web"] and os.listdir(roots[1]) == []
assert told["process.stats"]({})["storage"]["sb0"]["requests"] > 0
print("good", flush=True)
os._exit(0)
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


@pytest.mark.skipif(missing() is not None, reason="no FUSE")
def test_two_mounts_of_one_storage_blade_keep_their_removed_files_apart(tmp_path: Path) -> None:
    script = ["sh", "-c", 'mount -t tmpfs none /run && exec "$@"', "sh"]
    command = ["unshare", "--mount", "--propagation", "private", *script, sys.executable, "-c", MONITOR]
    command.append(str(tmp_path / "files"))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "good\n"), done.stderr
