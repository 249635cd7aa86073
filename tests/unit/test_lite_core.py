"""LITE's native core over stand-in verbs: two nodes in this process, no RDMA, no VM."""

from __future__ import annotations

import os
import random
import re
import socket
import struct
import threading
import time
from pathlib import Path

import pytest

from guest_agents.lite import errors, wire
from guest_agents.lite.core import Config, Slab
from guest_agents.lite.wire import Flag, Op
from tests.unit import lite_pair
from tests.unit.lite_pair import ALL, NATIVE, PORT, Pair, Program, Server, until


def test_header_and_python_agree() -> None:
    text = (NATIVE / "lite" / "wire.h").read_text()
    numbers = {name: int(value) for name, value in re.findall(r"LITE_(\w+) = (-?\d+)\b(?! <<)", text)}
    assert {op.name: op.value for op in Op}.items() <= numbers.items()
    assert {flag.name: flag.value for flag in Flag}.items() <= numbers.items()
    assert {kind.name: code for code, kind in errors.ERRORS.items()}.items() <= numbers.items()
    assert (numbers["INLINE"], numbers["SEGMENTS"], numbers["PORTS"], numbers["WINDOW"]) == (
        wire.INLINE, wire.SEGMENTS, wire.PORTS, wire.WINDOW)  # fmt: skip
    assert (wire.REQUEST.size, wire.REPLY.size, wire.SEGMENT.size) == (64, 32, 16)


@pytest.mark.parametrize("seed", range(3))
def test_reads_and_writes_at_any_place(pair: Pair, seed: int) -> None:
    chance = random.Random(seed)
    pair.lmr(1, (2, 300_000), (1, 70_001), (2, 12_345), (1, 200_000))
    size = 582_346
    program = Program(pair.nodes[1])
    handle = pair.nodes[1].handle_add(program.client, 1, ALL)
    model = bytearray(size)
    for _ in range(150):
        length = min(int(2 ** chance.uniform(0, 19.2)), size)
        offset = chance.randrange(size - length + 1)
        if chance.random() < 0.5:
            data = chance.randbytes(length)
            model[offset : offset + length] = data
            assert program.write(handle, offset, data) == 0
        else:
            assert program.read(handle, offset, length) == model[offset : offset + length]
    assert program.read(handle, 0, size) == model
    pair.clean_up(program)


def test_scatter_and_gather(pair: Pair) -> None:
    pair.lmr(1, (2, 8192), (1, 8192))
    program = Program(pair.nodes[1])
    handle = pair.nodes[1].handle_add(program.client, 1, ALL)
    places = [(8190, 5), (0, 0), (100, 3), (16380, 4), (50, 0)]
    segments = b"".join(wire.SEGMENT.pack(*place) for place in places)
    reply, _ = program.ask(
        Op.WRITEV, segments + b"abcdefghijkl", handle=handle, arg0=5, length=12, flags=Flag.INLINE_DATA
    )
    assert reply.status == 0
    assert [program.read(handle, offset, length) for offset, length in places] == [b"abcde", b"", b"fgh", b"ijkl", b""]
    reply, data = program.ask(Op.READV, segments, handle=handle, arg0=5, length=12, flags=Flag.INLINE_REPLY)
    assert (reply.status, data) == (0, b"abcdefghijkl")
    for places, code in [([(16380, 5)], -2), ([(2**64 - 1, 2), (0, 2)], -2), ([(0, 2**63), (0, 2**63)], -17)]:
        segments = b"".join(wire.SEGMENT.pack(*place) for place in places)
        length = sum(length for _, length in places) % 2**64
        assert program.ask(Op.READV, segments, handle=handle, arg0=len(places), length=length)[0].status == code
    pair.clean_up(program)


def test_atomics_of_both_nodes_add_up(pair: Pair) -> None:
    pair.lmr(1, (2, 4096))
    programs = [Program(pair.nodes[n]) for n in (1, 2, 1, 2)]

    def add(program: Program) -> None:
        handle = program.node.handle_add(program.client, 1, ALL)
        for _ in range(200):
            assert program.ask(Op.FETCH_ADD, handle=handle, offset=16, arg0=3)[0].status == 0

    threads = [threading.Thread(target=add, args=(p,)) for p in programs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle = pair.nodes[2].handle_add(programs[1].client, 1, ALL)
    assert programs[1].ask(Op.CAS, handle=handle, offset=16, arg0=2400, arg1=7)[0].value == 2400
    assert struct.unpack("<Q", programs[1].read(handle, 16, 8)) == (7,)
    assert programs[1].ask(Op.CAS, handle=handle, offset=17)[0].status == errors.BadArgument.code
    pair.clean_up(*programs)


def test_what_is_not_allowed_has_a_name(pair: Pair) -> None:
    pair.lmr(1, (2, 4096))
    program, stranger = Program(pair.nodes[1]), Program(pair.nodes[1])
    node = pair.nodes[1]
    reader = node.handle_add(program.client, 1, 1)
    everything = node.handle_add(program.client, 1, ALL)
    assert program.write(reader, 0, b"x") == errors.PermissionDenied.code
    assert program.ask(Op.FETCH_ADD, handle=reader)[0].status == errors.PermissionDenied.code
    assert stranger.write(everything, 0, b"x") == errors.BadHandle.code
    for offset, length in [(4096, 1), (4095, 2), (2**64 - 1, 2), (0, 4097), (2**63, 2**63)]:
        reply, _ = program.ask(Op.READ, handle=everything, offset=offset, length=length)
        assert reply.status == errors.OutOfRange.code
    assert program.ask(Op.READ, handle=everything, length=64, address=8)[0].status == errors.BadArgument.code
    assert program.ask(Op.READ, handle=everything, length=64, buffer=3)[0].status == errors.BadHandle.code
    assert program.call(9, 1, b"")[0].status == errors.NoSuchNode.code
    assert program.call(2, 64, b"")[0].status == errors.BadArgument.code
    assert program.reply(1 << 32 | 1, b"") == errors.BadHandle.code
    assert program.receive(3)[0].status == errors.PortClosed.code
    node.handle_set(program.client, reader, 0)
    assert program.ask(Op.READ, handle=reader, length=1)[0].status == errors.Revoked.code
    node.handle_drop(program.client, reader)
    assert program.ask(Op.READ, handle=reader, length=1)[0].status == errors.BadHandle.code
    again = node.handle_add(program.client, 1, ALL)
    assert again not in (reader, everything)
    node.lmr_kill(1, errors.Freed.code)
    assert program.write(everything, 0, b"x") == errors.Freed.code
    pair.clean_up(program, stranger)


def test_many_outstanding(pair: Pair) -> None:
    pair.lmr(1, (2, 1 << 20))
    program = Program(pair.nodes[1])
    handle = pair.nodes[1].handle_add(program.client, 1, ALL)
    program.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 << 20)
    with pair.held():
        tags = [program.post(Op.WRITE, bytes([i % 251]) * 512, handle=handle, offset=512 * i, length=512,
                             flags=Flag.INLINE_DATA) for i in range(200)]  # fmt: skip
    replies = [program.next()[0] for _ in range(200)]
    assert [reply.status for reply in replies] == [0] * 200
    assert {reply.tag for reply in replies} == set(tags)
    assert program.read(handle, 512 * 100, 512) == bytes([100]) * 512
    pair.clean_up(program)


def test_registered_buffers_need_no_copy_and_cannot_shrink(pair: Pair) -> None:
    pair.lmr(1, (2, 1 << 20))
    program = Program(pair.nodes[1])
    node = pair.nodes[1]
    handle = node.handle_add(program.client, 1, ALL)
    number, fd = node.buffer_add(program.client, 1 << 20)
    data = random.Random(1).randbytes(1 << 20)
    os.pwrite(fd, data, 0)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    assert program.ask(Op.WRITE, handle=handle, length=1 << 20, buffer=number)[0].status == 0
    os.pwrite(fd, bytes(1 << 20), 0)
    assert program.ask(Op.READ, handle=handle, offset=5, length=1000, buffer=number, address=77)[0].status == 0
    assert os.pread(fd, 1000, 77) == data[5:1005]
    assert program.ask(Op.READ, handle=handle, length=9, buffer=number, address=(1 << 20) - 8)[0].status == -2
    assert program.ask(Op.READ, handle=handle, length=9, buffer=number, address=2**64 - 4)[0].status == -2
    os.close(fd)
    node.buffer_drop(program.client, number)
    assert program.ask(Op.READ, handle=handle, length=9, buffer=number)[0].status == errors.BadHandle.code
    with pytest.raises(errors.NoMemory):
        node.buffer_add(program.client, 1 << 40)
    pair.clean_up(program)


def test_an_lmr_moves_while_it_is_written(pair: Pair) -> None:
    pair.lmr(1, (2, 65536))
    node = pair.nodes[1]
    writer = Program(node)
    handle = node.handle_add(writer.client, 1, ALL)
    slabs: list[Slab] = []
    stop = threading.Event()

    def move() -> None:
        place, address, rkey = 2, *next((s.address, s.rkey) for s in pair.nodes[2]._slabs.values())
        while not stop.is_set():
            to = 3 - place
            slab = pair.nodes[to].slab(65536)
            slabs.append(slab)
            node.lmr_freeze(1)
            data = node.read(place, address, rkey, 65536)
            node.write(to, slab.address, slab.rkey, data)
            node.lmr_replace(1, [(to, slab.address, slab.rkey, 65536)])
            node.lmr_thaw(1)
            place, address, rkey = to, slab.address, slab.rkey

    mover = threading.Thread(target=move)
    mover.start()
    chance = random.Random(2)
    model = bytearray(65536)
    for _ in range(300):
        offset, data = chance.randrange(60000), chance.randbytes(chance.randrange(1, 5000))
        model[offset : offset + len(data)] = data
        assert writer.write(handle, offset, data) == 0
        assert writer.read(handle, offset, len(data)) == data
    stop.set()
    mover.join()
    assert len(slabs) > 3
    assert writer.read(handle, 0, 65536) == model
    pair.clean_up(writer)


def test_freeze_waits_for_what_is_in_flight(pair: Pair) -> None:
    pair.lmr(1, (2, 4096))
    node = pair.nodes[1]
    program = Program(node)
    handle = node.handle_add(program.client, 1, ALL)
    with pair.held():
        first = program.post(Op.WRITE, b"first", handle=handle, length=5, flags=Flag.INLINE_DATA)
        until(lambda: node.stats()["pieces"] == 1)
        with pytest.raises(errors.TimedOut):
            node.lmr_freeze(1, 0.1)
    assert program.next()[0].tag == first
    node.lmr_freeze(1)
    program.post(Op.READ, handle=handle, length=5, flags=Flag.INLINE_REPLY)
    late = program.post(Op.READ, handle=handle, length=5, flags=Flag.INLINE_REPLY, timeout_ms=30)
    reply, _ = program.next()
    assert (reply.tag, reply.status) == (late, errors.TimedOut.code)
    node.lmr_thaw(1)
    reply, data = program.next()
    assert (reply.status, data) == (0, b"first")
    node.lmr_freeze(1)
    program.post(Op.READ, handle=handle, length=5)
    until(lambda: node.stats()["parked"] >= 3)
    node.lmr_kill(1, errors.Freed.code)
    assert program.next()[0].status == errors.Freed.code
    pair.clean_up(program)


def test_a_dead_peer_ends_what_is_in_flight_and_writes_nothing_after(pair: Pair) -> None:
    [(_, address)] = pair.lmr(1, (2, 1 << 20))
    node = pair.nodes[1]
    program, server = Program(node), Program(pair.nodes[2])
    pair.nodes[2].port_open(server.client, 1, 100)
    handle = node.handle_add(program.client, 1, ALL)
    with pair.held():
        for i in range(100):
            program.post(Op.WRITE, b"\xff" * 4096, handle=handle, offset=4096 * i, length=4096, flags=Flag.INLINE_DATA)
        program.post(Op.CALL, b"hi", handle=2, arg0=1, arg1=8, length=2, flags=3)
        until(lambda: node.stats()["pieces"] == 101)
        node.peer_dead(2, 1)
        assert {program.next()[0].status for _ in range(101)} == {errors.NodeDead.code}
    assert pair.nodes[2].read_local(address, 1 << 20) == bytes(1 << 20)
    assert program.write(handle, 0, b"x") == errors.NodeDead.code
    with pytest.raises(errors.NodeDead):
        node.peer_prepare(2, 1)
    pair.connect(incarnation=2)
    assert program.write(handle, 0, b"x") == errors.NodeDead.code, "the LMR was part of the life before"
    pair.clean_up(program, server)


def test_a_broken_peer_is_unreachable_until_connected_anew(pair: Pair) -> None:
    pair.lmr(1, (2, 1 << 20))
    node = pair.nodes[1]
    program = Program(node)
    handle = node.handle_add(program.client, 1, ALL)
    for qpn, _ in pair.addresses[1]["qps"]:
        assert pair.fake.fake_cut(qpn)
    assert program.write(handle, 0, bytes(700_000)) == errors.NodeUnreachable.code
    assert program.call(2, 1, b"")[0].status == errors.NodeUnreachable.code
    until(lambda: any(event.kind == "peer_broken" for _, event in pair.events))
    assert node.stats()["peers"][2]["state"] == "broken"
    pair.connect()
    assert program.write(handle, 0, bytes(700_000)) == 0
    pair.clean_up(program)


@pytest.mark.parametrize("seed", range(4))
def test_programs_killed_in_the_middle_of_anything_leave_nothing(pair: Pair, seed: int) -> None:
    chance = random.Random(seed)
    pair.lmr(1, (2, 1 << 20), (1, 1 << 20))
    server, witness = Program(pair.nodes[2]), Program(pair.nodes[1])
    pair.nodes[2].port_open(server.client, PORT, 8192)
    Server(server).start()
    handle = pair.nodes[1].handle_add(witness.client, 1, ALL)
    for _ in range(12):
        victim = Program(pair.nodes[1])
        own = pair.nodes[1].handle_add(victim.client, 1, ALL)
        number, fd = pair.nodes[1].buffer_add(victim.client, 1 << 20)
        os.close(fd)
        pair.nodes[1].port_open(victim.client, 9, 100)
        for _ in range(chance.randrange(60)):
            kind = chance.randrange(7)
            if kind == 0:
                victim.post(Op.WRITE, bytes(100), handle=own, length=100, flags=1)
            elif kind == 1:
                victim.post(Op.READ, handle=own, length=1 << 20, buffer=number, offset=chance.randrange(1 << 20))
            elif kind == 2:
                victim.post(Op.CALL, bytes(4000), handle=2, arg0=PORT, arg1=8000, length=4000, flags=3)
            elif kind == 3:
                victim.post(Op.RECEIVE, arg0=9, arg1=10, flags=2)
            elif kind == 4:
                victim.post(Op.READ, handle=own, length=500_000, address=4096)
            elif kind == 5:
                victim.post(Op.FETCH_ADD, handle=own, offset=8, arg0=1)
            else:
                victim.post(Op.SEND, bytes(4000), handle=1, arg0=9, length=4000, flags=1)
        time.sleep(chance.random() * 0.01)
        victim.close()
        pair.nodes[1].client_remove(victim.client)
        assert witness.write(handle, 1000, b"well") == 0
        assert witness.call(2, PORT, b"well")[1] == b"llew"
    pair.clean_up(server, witness)


@pytest.mark.parametrize("seed", range(4))
def test_nonsense_from_a_program_harms_nobody(pair: Pair, seed: int) -> None:
    chance = random.Random(seed)
    pair.lmr(1, (2, 65536), (1, 65536))
    pair.lmr(2, (2, 65536))
    server, witness = Program(pair.nodes[2]), Program(pair.nodes[1])
    pair.nodes[2].port_open(server.client, PORT, 8192)
    Server(server).start()
    handle = pair.nodes[1].handle_add(witness.client, 2, ALL)
    interesting = (0, 1, 2, 5, 7, 8, 63, 64, 8192, 8193, 65536, 131072, 2**31, 2**32 - 1, 2**63, 2**64 - 1, 1 << 32 | 1)

    def number() -> int:
        return chance.choice(interesting) if chance.random() < 0.8 else chance.randrange(2**64)

    for _ in range(10):
        fool = Program(pair.nodes[1])
        fool.socket.setblocking(False)
        pair.nodes[1].handle_add(fool.client, 1, ALL)
        pair.nodes[1].port_open(fool.client, 7, 8192)
        for _ in range(300):
            header = wire.REQUEST.pack(
                chance.randrange(16), chance.choice((0, 0, 1, 2, 3)), chance.choice((0, 1, 2, 3, 4, 7, 8, 0xFFFF)),
                number() & 0xFF, number(), number(), number(), number(), number(), number(), number() & 0xF,
                chance.choice((1, 1, 20, 50)))  # fmt: skip
            packet = header + chance.randbytes(chance.choice((0, 8, 16, 32, 64, 8192, 9000)))
            if chance.random() < 0.01:
                packet = packet[: chance.randrange(1, 64)]
            try:
                fool.socket.send(packet)
                while chance.random() < 0.9:
                    fool.socket.recv(65536)
            except BlockingIOError:
                continue
            except OSError:
                break  # it was shown the door
        assert witness.write(handle, 0, b"well") == 0
        assert witness.read(handle, 0, 4) == b"well"
        assert witness.call(2, PORT, b"well")[1] == b"llew"
        fool.close()
        pair.nodes[1].client_remove(fool.client)
    pair.clean_up(server, witness)


def test_a_short_packet_closes_the_channel(pair: Pair) -> None:
    program = Program(pair.nodes[1])
    program.socket.send(b"short")
    assert program.socket.recv(100) == b""
    until(lambda: any(e.kind == "channel_closed" and e.client == program.client for _, e in pair.events))
    assert pair.nodes[1].stats()["bad_messages"] == 1
    other = Program(pair.nodes[1], program.client)
    assert other.ask(Op.READ, bytes(9000), handle=1, length=9000)[0].status == errors.BadMessage.code
    assert other.ask(77)[0].status == errors.BadMessage.code
    pair.clean_up(program, other)


@pytest.mark.parametrize(
    "immediate", [0, 0xFFFFFFFF, 1 << 30 | 5 << 24, 1 << 30 | 5 << 24 | 0xFFFFFF, 2 << 30 | 999, 2 << 30]
)
def test_nonsense_from_a_peer_is_counted_and_breaks_with_it(pair: Pair, immediate: int) -> None:
    server, caller = Program(pair.nodes[2]), Program(pair.nodes[1])
    pair.nodes[2].port_open(server.client, PORT, 100)
    assert caller.ask(Op.SEND, b"hi", handle=2, arg0=PORT, length=2, flags=1)[0].status == 0
    assert server.receive(PORT)[1] == b"hi"
    qpn = pair.addresses[2]["qps"][1][0]
    pair.fake.fake_immediate(qpn, socket.htonl(immediate), 64)
    pair.fake.fake_hold(0)
    until(lambda: pair.nodes[2].stats()["peers"][1]["state"] == "broken")
    assert pair.nodes[2].stats()["messages_dropped"] == 1
    pair.clean_up(server, caller)


@pytest.mark.long
def test_programs_that_read_no_answers_hinder_nobody(pair: Pair) -> None:
    pair.lmr(1, (2, 65536))
    busy = Program(pair.nodes[1])
    handle = pair.nodes[1].handle_add(busy.client, 1, ALL)
    lazy = [Program(pair.nodes[1]) for _ in range(4)]
    asked = dict.fromkeys(lazy, 0)
    for program in lazy:
        own = pair.nodes[1].handle_add(program.client, 1, ALL)
        program.socket.setblocking(False)
        for _ in range(1000):
            try:
                program.post(Op.READ, handle=own, length=8192, flags=Flag.INLINE_REPLY)
                asked[program] += 1
            except BlockingIOError:
                time.sleep(0.001)
    for i in range(200):
        assert busy.write(handle, i, bytes([i])) == 0
    assert pair.nodes[1].stats()["pool_used"] < 100_000
    pair.nodes[1].lmr_freeze(1, 5)
    pair.nodes[1].lmr_thaw(1)
    for program in lazy:
        assert asked[program] > wire.WINDOW
        program.socket.settimeout(lite_pair.SECONDS)
        assert {program.next()[0].status for _ in range(asked[program])} == {0}
    pair.clean_up(*lazy, busy)


@pytest.mark.parametrize("mode", ["none", "hw_sep", "sw_pri"])
def test_every_priority_gets_through_in_every_mode(pair: Pair, mode: str) -> None:
    pair.nodes[1].qos_set(mode)  # type: ignore[arg-type]
    pair.lmr(1, (2, 1 << 20))
    stop = threading.Event()
    counts = {0: 0, 1: 0, 2: 0}

    def work(program: Program, priority: int, size: int) -> None:
        handle = program.node.handle_add(program.client, 1, ALL)
        while not stop.is_set():
            assert program.write(handle, 0, bytes(size), priority=priority) == 0
            counts[priority] += 1

    programs = [Program(pair.nodes[1]) for _ in range(3)]
    sizes = {0: 64, 1: 64, 2: 1 << 20}
    threads = [threading.Thread(target=work, args=(p, i, sizes[i])) for i, p in enumerate(programs)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    stop.set()
    for thread in threads:
        thread.join()
    assert min(counts.values()) > 0
    pair.clean_up(*programs)


def test_joining_comes_first_and_limits_are_checked(lite_core: Path) -> None:
    from guest_agents.lite import abi, core

    abi.LIBRARY = lite_core
    with pytest.raises(errors.NotJoined):
        core.Core(Config(device="mlx5_0"))
    with pytest.raises(errors.BadArgument):
        core.Core(Config(queue_pairs=9))
    with core.Core() as node:
        program = Program(node)
        assert program.ask(Op.CANCEL)[0].status == errors.NotJoined.code
        node.join(1, 1)
        assert program.ask(Op.CANCEL)[0].status == 0
        slab = node.slab(100)
        node.write_local(slab.address, b"here")
        assert bytes(node.read(1, slab.address, slab.rkey, 4)) == b"here"
        node.write(1, slab.address + 4, slab.rkey, b"too")
        assert node.fetch_add(1, slab.address + 16, slab.rkey, 5) == 0
        assert node.cas(1, slab.address + 16, slab.rkey, 5, 6) == 5
        assert node.read_local(slab.address, 24) == b"heretoo" + bytes(9) + b"\x06" + bytes(7)
        node.memset_local(slab.address, 7, 3)
        node.memmove_local(slab.address + 1, slab.address, 4)
        assert node.read_local(slab.address, 6) == b"\x07\x07\x07\x07eo"
        with pytest.raises(errors.OutOfRange):
            node.read_local(slab.address, slab.bytes + 1)
        node.lmr_put(1, [(1, slab.address, slab.rkey, 100)])
        with pytest.raises(errors.BadArgument):
            slab.close()
        node.lmr_kill(1, -4)
        node.client_remove(program.client)


def test_ten_thousand_lmrs_and_handles(pair: Pair) -> None:
    slab = pair.nodes[2].slab(4096)
    node = pair.nodes[1]
    program = Program(node)
    handles = {}
    for lmr in range(1000, 11000):
        node.lmr_put(lmr, [(2, slab.address, slab.rkey, 4096)])
        handles[lmr] = node.handle_add(program.client, lmr, ALL)
    assert len(set(handles.values())) == 10_000
    for lmr in (1000, 5555, 10999):
        assert program.write(handles[lmr], 0, b"x") == 0
    for lmr in range(1000, 11000):
        node.lmr_kill(lmr, -4)
    assert node.stats()["lmrs"] == 10_000, "handles keep them, so that their users learn what happened"
    pair.clean_up(program)


def test_closing_in_the_middle_of_work(lite_core: Path) -> None:
    """No clean-up before: what a stopping agent does."""
    pair = Pair(lite_core, Config())
    pair.lmr(1, (2, 65536))
    caller, server = Program(pair.nodes[1]), Program(pair.nodes[2])
    pair.nodes[2].port_open(server.client, PORT, 100)
    handle = pair.nodes[1].handle_add(caller.client, 1, ALL)
    caller.post(Op.CALL, b"hi", handle=2, arg0=PORT, arg1=8, length=2, flags=3)
    assert server.receive(PORT)[1] == b"hi"
    server.post(Op.RECEIVE, arg0=PORT, arg1=8, flags=2)
    with pair.held():
        for _ in range(20):
            caller.post(Op.WRITE, bytes(4096), handle=handle, length=4096, flags=Flag.INLINE_DATA)
        until(lambda: pair.nodes[1].stats()["pieces"] == 20)
        pair.close()


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_a_storm_of_broken_links_ends_every_request_with_a_name(pair: Pair, seed: int) -> None:
    chance = random.Random(seed)
    pair.lmr(1, (2, 1 << 20), (1, 1 << 20))
    stop = threading.Event()
    statuses: set[int] = set()
    servers = [Program(node) for node in pair.nodes.values()]
    for server in servers:
        server.node.port_open(server.client, PORT, wire.INLINE)
        Server(server).start()

    def work(program: Program, seed: int) -> None:
        chance = random.Random(seed)
        handle = program.node.handle_add(program.client, 1, ALL)
        while not stop.is_set():
            size = min(int(2 ** chance.uniform(0, 13)), wire.INLINE)
            count = chance.randrange(1, 12)
            for _ in range(count):
                kind = chance.randrange(4)
                if kind == 0:
                    program.post(Op.CALL, bytes(size), handle=chance.choice((1, 2)), arg0=PORT, arg1=size, length=size,
                                 flags=3, timeout_ms=3000)  # fmt: skip
                elif kind == 1:
                    program.post(Op.SEND, bytes(size), handle=chance.choice((1, 2)), arg0=PORT, length=size, flags=1)
                elif kind == 2:
                    program.post(Op.WRITE, bytes(size), handle=handle, offset=chance.randrange(1 << 20), length=size,
                                 flags=1)  # fmt: skip
                else:
                    program.post(Op.READ, handle=handle, offset=chance.randrange(1 << 20), length=size, flags=2)
            statuses.update(program.next()[0].status for _ in range(count))

    programs = [Program(pair.nodes[n]) for n in (1, 1, 2, 2)]
    threads = [threading.Thread(target=work, args=(p, 10 * seed + i)) for i, p in enumerate(programs)]
    for thread in threads:
        thread.start()
    for _ in range(12):
        time.sleep(chance.uniform(0.02, 0.15))
        pair.fake.fake_cut(chance.choice(pair.addresses[chance.choice((1, 2))]["qps"])[0])
        time.sleep(0.05)
        pair.connect()
    stop.set()
    for thread in threads:
        thread.join(lite_pair.SECONDS)
        assert not thread.is_alive()
    assert statuses >= {0, errors.NodeUnreachable.code}
    assert statuses <= {0, errors.NodeUnreachable.code, errors.TimedOut.code}
    pair.clean_up(*servers, *programs)
