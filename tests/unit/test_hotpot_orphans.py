"""Programs whose service has gone: what they have they keep, the rest is SIGBUS. Nobody waits, nothing reads zeros."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest_agents import lite
from guest_agents.hotpot import userfault
from guest_agents.hotpot.service import Service
from tests.unit import lite_pair
from tests.unit.hotpot_rack import PROJECT, Place, mortal, shells
from tests.unit.lite_blades import eventually
from tests.unit.lite_stack import stack
from tests.unit.test_hotpot_library import build

pytestmark = [pytest.mark.long, pytest.mark.skipif(lite_pair.missing() is not None, reason=str(lite_pair.missing()))]
Mortal = tuple[Place, "subprocess.Popen[bytes]"]
SECONDS = 60
WHY = "that page is not here, and the service has gone"
NATIVE = Path(__file__).parent / "native"

MAPPED = """
import os, socket, sys
from guest_agents.hotpot import mapping, userfault, watch
from guest_agents.hotpot.records import REGION
service = socket.socket(fileno=int(sys.argv[1]))
file = os.memfd_create("set")
os.ftruncate(file, 3 * 4096)
os.pwrite(file, b"here" * 2048, 0)
mapping.reserve()
memory = mapping.map_file(file, REGION, 3 * 4096)
faults = userfault.open_for(REGION, 3 * 4096)
watcher = watch.start(service.fileno(), faults, REGION, 3 * 4096, "set")
socket.send_fds(service, [b"mapped"], [faults])
exec(sys.argv[2])
"""


@pytest.mark.parametrize(("text", "protected", "printed"), [
    ("print(bytes(memory[4096:4100]))", False, "b'here'\n"),
    ("memory[4096] = 65; print(bytes(memory[4096:4100]))", False, "b'Aere'\n"),
    ("memory[0]; memory[0] = 65; print(bytes(memory[:4]), bytes(memory[4096:4100]))", True, "b'Aere' b'here'\n"),
    ("memory[8192]; print('never')", False, None),
    ("memory[8192] = 1; print('never')", False, None),
    ("print(os.readv(os.open('/dev/zero', os.O_RDONLY), [memory[8192:]]))", False, "Bad address"),
])  # fmt: skip
def test_a_fault_that_the_service_has_read_but_not_answered(
    lite_core: Path, text: str, protected: bool, printed: str | None
) -> None:
    """The first two pages are in the file, the third is not. protected: the service has mapped the first, for loads."""
    service, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with service:
        with theirs:
            program = subprocess.Popen(
                [sys.executable, "-c", MAPPED, str(theirs.fileno()), text], pass_fds=[theirs.fileno()], cwd=PROJECT,
                env={**os.environ, "LD_LIBRARY_PATH": str(lite_core.parent)}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
        faults = socket.recv_fds(service, 10, 1)[1][0]
        waiting = fault_of(faults)
        if protected:
            userfault.let(faults, waiting.address, writable=False)
            assert fault_of(faults).protected
        os.close(faults)
    out, errors = rest(program)
    if printed is None:
        assert (program.returncode, out) == (-signal.SIGBUS, "")
        assert f"SIGBUS at 8192 of dataset 'set': {WHY}" in errors
    else:
        assert printed in out + errors


def rest(program: subprocess.Popen[str], told: str | None = None) -> tuple[str, str]:
    """What a program says until it ends, which it must soon."""
    try:
        return program.communicate(told, timeout=SECONDS)
    finally:
        program.kill()


def fault_of(faults: int) -> userfault.Fault:
    """The next fault of a program."""
    assert select.select([faults], [], [], SECONDS)[0]
    found = userfault.read(faults)
    assert found is not None
    return found


@pytest.fixture
def blade(tmp_path: Path, lite_core: Path) -> Iterator[Path]:
    """LITE's socket on a blade whose service can be killed; the manager's service is in this process."""
    with stack(tmp_path, lite_core, "gm0", "mb0") as sockets, lite.connect(sockets["gm0"]) as manager:
        dispatcher = Service(manager, tmp_path / "dispatcher", manager.node_id).start()
        yield Path(sockets["mb0"])
        dispatcher.close()


@pytest.fixture
def orphanage(blade: Path, tmp_path: Path) -> Iterator[Mortal]:
    """A service on the blade."""
    with mortal(blade, tmp_path) as found:
        yield found


def in_a_fault(process: int) -> bool:
    """A thread waits, and not in a system call."""
    tasks = Path(f"/proc/{process}/task").iterdir()
    return any(task.joinpath("syscall").read_text().startswith("-1") for task in tasks)


def test_who_waits_for_a_page_when_the_service_is_killed_gets_sigbus(orphanage: Mortal) -> None:
    place, service = orphanage
    with shells(place) as [program]:
        program.do("d = session.create('set', 8192)")
        program.do("d.memory[0] = 65")
        service.send_signal(signal.SIGSTOP)
        assert program.process.stdin is not None
        program.process.stdin.write('"d.memory[4096]"\n')
        program.process.stdin.flush()
        eventually(lambda: in_a_fault(program.process.pid))
        service.kill()
        out, errors = program.process.communicate(timeout=SECONDS)
        assert (program.process.returncode, out) == (-signal.SIGBUS, "")
        assert f"SIGBUS at 4096 of dataset 'set': {WHY}" in errors


def test_what_a_program_has_it_keeps_and_the_next_request_says_that_the_service_has_gone(orphanage: Mortal) -> None:
    place, service = orphanage
    with shells(place, place) as [program, other]:
        program.do("d = session.create('set', 4 * 4096)")
        program.do("d.memory[:4] = b'kept'\nd.commit((0, 4))\nd.memory[4096:4100] = b'here'")
        assert other.do("(d := session.open('set')) and bytes(d.memory[:4])") == b"kept"
        service.kill()
        service.wait()
        assert program.do("bytes(d.memory[:4])") == b"kept"
        assert other.do("bytes(d.memory[4096:4100])") == b"here", "that page is on this blade, but was not mapped here"
        program.do("d.memory[:4], d.memory[4100:4104] = b'mine', b'mine'")
        assert program.do("bytes(d.memory[:4]), bytes(d.memory[4096:4104])") == (b"mine", b"heremine")
        assert program.refused("d.commit((0, 4))").startswith("NotJoined")
        assert program.refused("d.close()").startswith("NotJoined")
        other.process.communicate('"d.memory[3 * 4096]"\n', timeout=SECONDS)
        assert other.process.returncode == -signal.SIGBUS


def test_a_program_that_lives_on_opens_its_dataset_again_with_the_next_service(blade: Path, tmp_path: Path) -> None:
    with mortal(blade, tmp_path) as (place, service), shells(place) as [program]:
        program.do("d = session.create('set', 4096, owners=[2])")
        program.do("d.memory[:8] = b'oldthing'\nd.commit((0, 8))")
        service.kill()
        service.wait()
        program.do("d.memory[:8] = b'newthing'")
        assert program.refused("d.close()").startswith("NotJoined")
        with mortal(blade, tmp_path):
            program.do("session = hotpot.connect()\nd = session.open('set')")
            assert program.do("bytes(d.memory[:8])") == b"oldthing", "as that was never committed"
            program.do("d.run(lambda t: t.acquire(0, 3).__setitem__(slice(3), b'any'))")
            assert program.do("bytes(d.memory[:8])") == b"anything"


STORM = """
import os, random, threading, time
names = [f"set{i}" for i in range(4)]
for name in names:
    session.create(name, 64 * 4096).close()
def resources():
    return sorted(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
def again(name, turns):
    for turn in range(turns):
        with session.open(name) as d:
            for _ in range(5):
                assert d.memory[random.randrange(d.size)] == 0
                d.memory[random.randrange(d.size)] = 0
def all_at_once(turns):
    threads = [threading.Thread(target=again, args=(name, turns)) for name in names]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
before = resources()
all_at_once(25)
deadline = time.monotonic() + 30
while resources() != before:  # the kernel may not be done yet with a thread that was joined
    assert time.monotonic() < deadline, (resources(), before)
print("begins", flush=True)
all_at_once(1 << 30)
"""


def ends(program: subprocess.Popen[str], service: subprocess.Popen[bytes]) -> None:
    """The service is killed under a program that opens and closes; that ends, by an error or SIGBUS."""
    assert program.stdout is not None
    begins = program.stdout.readline()
    assert begins == "begins\n", rest(program)
    service.kill()
    _out, errors = rest(program)
    if program.returncode == -signal.SIGBUS:
        assert WHY in errors
    else:
        assert "service" in errors, errors


def test_threads_that_open_and_close_all_the_time_leave_nothing_and_end_with_the_service(orphanage: Mortal) -> None:
    place, service = orphanage
    ends(place.start(STORM), service)


def test_a_forked_child_has_neither_the_mapping_nor_the_thread(orphanage: Mortal) -> None:
    place, service = orphanage
    with shells(place) as [program]:
        program.do("d = session.create('set', 4 * 4096)")
        program.do("""
def in_child(action):
    child = os.fork()
    if child == 0:
        try:
            action()
        except hotpot.NotJoined:
            os._exit(7)
        os._exit(0)
    return os.waitpid(child, 0)[1]
""")
        assert program.do("in_child(d.close)") == 7 << 8
        assert program.do("in_child(session.close)") == 0
        assert program.do("in_child(lambda: d.memory[0])") == signal.SIGSEGV
        program.do("d.memory[:4] = b'here'\nd.commit((0, 4))")
        service.kill()
        service.wait()
        assert program.do("bytes(d.memory[:4])") == b"here"
        assert program.do("in_child(lambda: d.memory[0])") == signal.SIGSEGV
        assert program.do("in_child(d.close)") == 7 << 8
        program.process.communicate('"d.memory[4096]"\n', timeout=SECONDS)
        assert program.process.returncode == -signal.SIGBUS


def test_a_session_that_is_closed_first_leaves_nobody_waiting(orphanage: Mortal) -> None:
    place, _service = orphanage
    with shells(place) as [program]:
        program.do("d = session.create('set', 8192)\nsession.close()")
        assert program.do("d.memory[0]") == 0
        assert program.refused("d.close()").startswith("NotJoined")
        program.do("session = hotpot.connect()")
        eventually(lambda: "set" not in program.do("[about['name'] for about in session.datasets() if about['open']]"))
        program.do("session.delete('set')")


def test_a_c_program_keeps_what_it_has_and_gets_sigbus_for_the_rest(orphanage: Mortal, tmp_path: Path) -> None:
    place, service = orphanage
    program = subprocess.Popen([build(tmp_path, NATIVE / "hotpot_orphan.c"), "keep"], text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env={**os.environ, "RACKLESS_HOTPOT": str(place.socket)})  # fmt: skip
    assert program.stdout is not None
    assert program.stdout.readline() == "begins\n"
    service.kill()
    service.wait()
    out, errors = rest(program, "go on\n")
    assert (program.returncode, out) == (0, "ends\n"), errors
    assert WHY in errors


def test_threads_of_a_c_program_end_with_the_service(orphanage: Mortal, tmp_path: Path) -> None:
    place, service = orphanage
    ends(subprocess.Popen([build(tmp_path, NATIVE / "hotpot_orphan.c"), "storm"], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env={**os.environ, "RACKLESS_HOTPOT": str(place.socket)}), service)  # fmt: skip
