"""The Python client of LITE against a stand-in agent on a real socket: framing, data paths, errors, threads, fork."""

from __future__ import annotations

import array
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest_agents import lite
from guest_agents.lite import errors, wire
from guest_agents.lite.wire import Op
from tests.unit.stand_in_lite import NODE_ID, StandIn

LARGE = 3 * wire.INLINE + 5


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[StandIn]:
    made = StandIn(tmp_path / "lite.sock")
    yield made
    made.close()


@pytest.fixture
def node(agent: StandIn) -> Iterator[lite.Node]:
    with lite.connect(str(agent.path)) as made:
        yield made


def test_importing_it_is_light() -> None:
    script = "import sys, guest_agents.lite; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    for heavy in ("ctypes", "logging", "numpy", "pyverbs", "multiprocessing", "dataclasses", "guest_agents.control"):
        assert heavy not in loaded


def test_without_an_agent(tmp_path: Path) -> None:
    with pytest.raises(lite.NotJoined, match="is this a blade"):
        lite.connect(str(tmp_path / "nothing"))


def test_every_error_has_its_code_and_survives_the_control_socket() -> None:
    assert sorted(errors.ERRORS) == list(range(-23, 0))
    for code, kind in errors.ERRORS.items():
        again = errors.from_reply(kind("what happened", hint="do this").reply())
        assert type(again) is kind
        assert (again.code, again.message, again.hint) == (code, "what happened", "do this")
    assert "code -77" in str(errors.error_for(-77))


@pytest.mark.parametrize("size", [0, 1, 4096, wire.INLINE, wire.INLINE + 1, LARGE])
def test_what_is_written_is_read(node: lite.Node, size: int) -> None:
    memory = node.malloc(2 * LARGE)
    data = os.urandom(size)
    memory.write(data, at=7)
    assert memory.read(size, at=7) == data
    target = bytearray(size)
    memory.read_into(target, at=7)
    assert target == data
    assert memory.read()[7 : 7 + size] == data


def test_any_contiguous_memory_will_do(node: lite.Node) -> None:
    memory = node.malloc(1 << 20)
    numbers = array.array("d", range(5000))
    for data in (numbers, memoryview(numbers), memoryview(numbers)[100:], bytearray(b"abc"), memoryview(b"x" * LARGE)):
        memory.write(data, at=64)
        assert memory.read(memoryview(data).nbytes, at=64) == bytes(memoryview(data).cast("B"))
    again = array.array("d", [0.0]) * 5000
    memory.write(numbers)
    memory.read_into(again)
    assert again == numbers
    memory.read_into(memoryview(again)[5:10], at=0)
    assert list(again[4:11]) == [4.0, 0.0, 1.0, 2.0, 3.0, 4.0, 10.0]
    for wrong in (memoryview(bytes(8)), memoryview(bytes(LARGE))):
        with pytest.raises((BufferError, TypeError)):
            memory.read_into(wrong)
    with pytest.raises((BufferError, TypeError)):
        memory.write(memoryview(numbers)[::2])


def test_arrays_of_several_dimensions(node: lite.Node) -> None:
    numpy = pytest.importorskip("numpy")
    memory = node.malloc(1 << 20)
    for shape in ((3, 4), (100, 50)):
        matrix = numpy.arange(shape[0] * shape[1], dtype="f8").reshape(shape)
        memory.write(matrix)
        back = numpy.zeros(shape)
        memory.read_into(back)
        assert (back == matrix).all()


def test_registered_memory_is_used_without_copies(agent: StandIn, node: lite.Node) -> None:
    memory = node.malloc(4 * LARGE)
    with node.buffer(2 * LARGE) as buffer:
        buffer.view[:] = os.urandom(len(buffer))
        memory.write(buffer.view[100 : 100 + LARGE])
        memory.read_into(buffer.view[50 : 50 + LARGE])
        assert memory.read(LARGE) == buffer.view[50 : 50 + LARGE]
        used = [number for op, number in agent.requests if op in (Op.READ, Op.WRITE)]
        assert used[0] == used[1] != 0
        assert used[2] == 0
        outlives = buffer.view[:10]
    outlives[0] = 1
    memory.write(b"z" * LARGE)  # perhaps at the same address: it is no longer registered
    assert agent.requests[-1][1] == 0
    assert not next(iter(agent.processes.values())).buffers


def test_many_at_once_in_any_order(node: lite.Node) -> None:
    memory = node.malloc(600 * 64)
    pieces = [os.urandom(64) for _ in range(600)]
    writes = [memory.write_async(piece, at=64 * i) for i, piece in enumerate(pieces)]
    node.fence()
    assert all(ticket.done for ticket in writes)
    reads = [memory.read_async(64, at=64 * i) for i in range(600)]
    assert [ticket.wait() for ticket in reversed(reads)] == pieces[::-1]
    large = bytearray(LARGE)
    ticket = memory.read_into_async(large)
    assert memory.read(64) == pieces[0]
    ticket.wait()
    assert large == b"".join(pieces)[:LARGE]


def test_a_ticket_can_be_waited_for_again(agent: StandIn, node: lite.Node) -> None:
    memory = node.malloc(100)
    agent.go.clear()
    ticket = memory.write_async(b"late")
    with pytest.raises(lite.TimedOut):
        ticket.wait(0.05)
    assert not ticket.done
    agent.go.set()
    ticket.wait()
    assert memory.read(4) == b"late"


def test_fence_tells_of_what_nobody_waited_for(agent: StandIn, node: lite.Node) -> None:
    memory = node.malloc(100)
    memory.write_async(b"x", at=200)
    told = memory.write_async(b"x", at=300)
    with pytest.raises(lite.OutOfRange):
        told.wait()
    with pytest.raises(lite.OutOfRange):
        node.fence()
    node.fence()


def test_gather_and_scatter(node: lite.Node) -> None:
    memory = node.malloc(4 * LARGE)
    memory.scatter([(0, b"first"), (1000, b"second"), (LARGE, b"x" * LARGE)])
    assert memory.gather([(1000, 6), (0, 5), (LARGE + 3, LARGE - 3), (5, 1)]) == [
        b"second", b"first", b"x" * (LARGE - 3), b"\0"]  # fmt: skip
    with pytest.raises(lite.BadArgument):
        memory.gather([])
    with pytest.raises(lite.OutOfRange):
        memory.scatter([(-1, b"x")])


def test_atomics_wrap(node: lite.Node) -> None:
    memory = node.malloc(64)
    assert memory.fetch_add(8, 5) == 0
    assert memory.fetch_add(8, -6) == 5
    assert memory.fetch_add(8) == 2**64 - 1
    assert memory.compare_swap(8, 1, 9) == 0
    assert memory.compare_swap(8, 0, 9) == 0
    assert memory.read(8, at=8) == (9).to_bytes(8, "little")


def test_copies_at_the_data(node: lite.Node) -> None:
    memory, other = node.malloc(100), node.malloc(100)
    memory.memset(0x41, at=10, length=20)
    memory.copy_to(other, at=10, to=50, length=5)
    other.move_to(other, at=50, to=52, length=5)
    assert other.read(10, at=50) == b"AAAAAAA\0\0\0"


def test_errors_are_named(agent: StandIn, node: lite.Node) -> None:
    memory = node.malloc(100, name="there", permissions=lite.Permission.READ | lite.Permission.SHARE)
    with pytest.raises(lite.NameTaken, match="called there"):
        node.malloc(10, name="there")
    with pytest.raises(lite.NoSuchName):
        node.map("elsewhere")
    with pytest.raises(lite.PermissionDenied):
        node.map("there")
    reader = node.map("there", lite.Permission.READ)
    with pytest.raises(lite.PermissionDenied, match="map the LMR with"):
        reader.write(b"x")
    with pytest.raises(lite.OutOfRange):
        memory.read(101)
    with pytest.raises(lite.OutOfRange):
        memory.read(at=101)
    with pytest.raises(lite.BadArgument):
        memory.write(b"x", at=-1)
    for op, error in ((Op.READ, lite.NodeDead()), (Op.WRITE, lite.NodeUnreachable())):
        agent.fail[op] = error
    with pytest.raises(lite.NodeDead):
        memory.read(1)
    with pytest.raises(lite.NodeUnreachable):
        memory.write(b"1")
    agent.fail.clear()
    reader.unmap()
    with pytest.raises(lite.BadHandle):
        reader.read(1)
    with reader:
        pass  # unmapping what is gone is no error here


def test_calls(node: lite.Node) -> None:
    with node.register(5, max_message=2 * LARGE) as port:
        served = threading.Thread(target=port.serve, args=(lambda request: bytes(request.data).upper(), 3))
        served.start()
        for size in (0, 3, wire.INLINE, LARGE):
            assert node.call("pb0", 5, b"a" * size, max_reply=size) == b"A" * size
            assert node.call(NODE_ID, 5, b"a" * size, max_reply=LARGE) == b"A" * size
        with pytest.raises(lite.MessageTooLarge):
            node.call("pb0", 5, b"much", max_reply=1)
        outcome = node.multicast(["pb0", "mb9"], 5, b"all")
        assert outcome["pb0"] == b"ALL"
        assert isinstance(outcome["mb9"], lite.NoSuchNode)
    served.join(10)
    assert not served.is_alive()
    with pytest.raises(lite.PortClosed):
        node.call("pb0", 5, b"x")
    with pytest.raises(lite.NoSuchNode, match="there are: pb0"):
        node.call("mb0", 5, b"x")  # dead


def test_receiving_by_hand(node: lite.Node) -> None:
    with node.register(6) as port:
        with pytest.raises(lite.TimedOut):
            port.receive(timeout=0)
        with pytest.raises(lite.TimedOut):
            port.receive(timeout=0.05)
        node.send("pb0", 6, b"one way")
        sent = port.receive(timeout=5)
        assert (sent.data, sent.source, sent.descriptor) == (b"one way", NODE_ID, 0)
        with pytest.raises(lite.BadArgument):
            sent.reply(b"x")
        calls = [node.call_async("pb0", 6, f"call {i}".encode()) for i in range(3)]
        request = port.receive()
        for _ in range(2):
            request = request.reply_and_receive(b"re: " + request.data)
        request.reply(b"last")
        assert sorted(call.wait() for call in calls)[0] == b"last"
        with pytest.raises(lite.BadHandle):
            request.reply(b"again")


def test_an_exception_in_a_handler_ends_the_service(node: lite.Node) -> None:
    def fail(_request: lite.Request) -> bytes:
        raise ZeroDivisionError

    with node.register(7) as port:
        node.send("pb0", 7, b"x")
        with pytest.raises(ZeroDivisionError):
            port.serve(fail, threads=2)
    with pytest.raises(lite.PortClosed):
        node.send("pb0", 7, b"x")


def test_locks(node: lite.Node) -> None:
    lock = node.lock("l")
    with lock, pytest.raises(lite.TimedOut):
        node.lock("l").acquire(timeout=0.05)
    with pytest.raises(lite.NotHeld):
        lock.release()


def test_each_thread_has_a_connection_until_it_ends(agent: StandIn, node: lite.Node) -> None:
    memory = node.malloc(64)
    barrier = threading.Barrier(9)

    def work() -> None:
        for _ in range(20):
            memory.fetch_add(0)
        barrier.wait()
        barrier.wait()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    barrier.wait()
    (process,) = agent.processes.values()
    assert process.connections == 9
    barrier.wait()
    for thread in threads:
        thread.join()
    assert memory.fetch_add(0) == 160
    deadline = time.monotonic() + 5
    while process.connections > 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.connections == 1


def test_a_ticket_belongs_to_its_thread(agent: StandIn, node: lite.Node) -> None:
    memory = node.malloc(64)
    agent.go.clear()
    ticket = memory.write_async(b"x")
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            ticket.wait()
        except lite.BadArgument as failure:
            caught.append(failure)

    thread = threading.Thread(target=wait)
    thread.start()
    thread.join()
    assert caught
    agent.go.set()
    ticket.wait()


def test_a_forked_child_must_connect_anew(agent: StandIn) -> None:
    node = lite.connect(str(agent.path))
    memory = node.malloc(64)
    child = os.fork()
    if not child:
        status = 1
        try:
            memory.read(1)
        except lite.NotJoined as failure:
            if "fork" in str(failure):
                with lite.connect(str(agent.path)) as own:
                    own.malloc(10).write(b"child")
                    status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    memory.write(b"parent")
    node.close()
    with pytest.raises(lite.NotJoined):
        memory.read(1)


def test_the_agent_dies(agent: StandIn, node: lite.Node) -> None:
    memory = node.malloc(64)
    agent.go.clear()
    ticket = memory.read_async(8)
    threading.Timer(0.1, agent.close).start()
    with pytest.raises(lite.NotJoined, match="restarted or has died"):
        ticket.wait()
    with pytest.raises(lite.NotJoined):
        memory.write(b"x" * LARGE)
    with pytest.raises(lite.NotJoined):
        node.malloc(10)


def test_an_interrupted_receive_takes_no_message_along(node: lite.Node) -> None:
    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with node.register(8) as port:
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(KeyboardInterrupt):
                port.receive()
            node.send("pb0", 8, b"still here")
            assert port.receive(timeout=5).data == b"still here"
    finally:
        signal.signal(signal.SIGALRM, before)


def test_nonsense_on_the_data_channel_is_an_error(agent: StandIn, node: lite.Node) -> None:
    memory = node.malloc(64)
    channel = agent._open[1]
    agent.go.clear()
    ticket = memory.read_async(8)
    channel.send(b"short")
    with pytest.raises(lite.BadMessage):
        ticket.wait()
    channel.send(wire.REPLY.pack(12345, 0, 0, 0, 0))
    with pytest.raises(lite.BadMessage):
        ticket.wait()
    agent.go.set()
    assert ticket.wait() == bytes(8)


@pytest.mark.parametrize("answer", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 60_000, b'{"ok":true}', b'{"ok":0}'])
def test_an_agent_that_talks_nonsense(answer: bytes, tmp_path: Path) -> None:
    path = tmp_path / "lite.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(str(path))
        listening.listen()

        def talk() -> None:
            with listening.accept()[0] as control:
                control.recv(4096)
                if answer:
                    control.send(answer)

        threading.Thread(target=talk).start()
        with pytest.raises(lite.LiteError):
            lite.connect(str(path))
