"""How programs that use LITE end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.lite_stack import stack

PROJECT = Path(__file__).parents[2]
LEFT = {
    "a thread waits for a message": "port = node.register(7); wait(port.receive)",
    "a thread waits in a call": "node.register(7); wait(lambda: node.call('gm0', 7, b'nobody answers'))",
    "an operation nobody waits for": "m = node.malloc(1 << 20); m.write_async(bytes(1 << 20))",
    "everything at once": "port = node.register(7); [wait(port.receive) for _ in range(4)]; kept = [node]",
}


@pytest.mark.parametrize("what", LEFT)
def test_the_interpreter_ends_whatever_is_under_way(tmp_path: Path, lite_core: Path, what: str) -> None:
    source = f"""
import threading, time
from guest_agents import lite
node = lite.connect()
def wait(work):
    threading.Thread(target=work, daemon=True).start()
    time.sleep(0.2)
{LEFT[what]}
print("ends")
"""
    with stack(tmp_path, lite_core, "gm0") as sockets:
        done = subprocess.run([sys.executable, "-c", source], cwd=PROJECT, capture_output=True, text=True, timeout=20,
                              env={**os.environ, "RACKLESS_LITE": sockets["gm0"]}, check=False)  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "ends\n"), done.stderr


def test_a_forked_child_does_not_speak_for_connections_that_its_parent_has_dropped(
    tmp_path: Path, lite_core: Path
) -> None:
    """They may be garbage that nobody has collected yet; what the child said would be the parent's word."""
    source = """
import gc, os
from guest_agents.lite.connection import Connection
from types import SimpleNamespace
gc.disable()
connection = Connection(os.environ["RACKLESS_LITE"], None, [])
connection.channel.cancel = lambda ticket: os.write(1, b"cancelled by %d\\n" % os.getpid())
connection.channel._pending[1] = SimpleNamespace(_release=lambda: None)
ring = [connection]
ring.append(ring)
del ring, connection
if not os.fork():
    gc.collect()
    os._exit(0)
os.wait()
gc.collect()
print(os.getpid())
"""
    with stack(tmp_path, lite_core, "gm0") as sockets:
        done = subprocess.run([sys.executable, "-c", source], cwd=PROJECT, capture_output=True, text=True, timeout=20,
                              env={**os.environ, "RACKLESS_LITE": sockets["gm0"]}, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    parent = done.stdout.split()[-1]
    assert done.stdout == f"cancelled by {parent}\n{parent}\n"
