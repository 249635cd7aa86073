"""RPC of LITE's native core between two nodes of one process, over stand-in verbs."""

from __future__ import annotations

import ctypes
import random
import struct
import threading

import pytest

from guest_agents.lite import errors, wire
from guest_agents.lite.wire import Flag, Op
from tests.unit.lite_pair import PORT, Pair, Program, Server, until


def test_calls_of_every_size_from_many_programs(pair: Pair) -> None:
    pair.fake.fake_delay(0)
    programs = [Program(pair.nodes[2])]
    pair.nodes[2].port_open(programs[0].client, PORT, wire.INLINE)
    servers = [Server(programs[0])]
    for _ in range(2):
        programs.append(Program(pair.nodes[2], programs[0].client))
        servers.append(Server(programs[-1]))
    for server in servers:
        server.start()
    wrong: list[str] = []

    def ask(program: Program, seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(400):
            data = chance.randbytes(min(int(2 ** chance.uniform(0, 13)), wire.INLINE))
            reply, back = program.call(2, PORT, data)
            if reply.status or back != data[::-1]:
                wrong.append(f"{len(data)}: {reply}")

    callers = [Program(pair.nodes[n]) for n in (1, 1, 1, 2)]
    threads = [threading.Thread(target=ask, args=(caller, i)) for i, caller in enumerate(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert sum(server.seen for server in servers) == 1600
    pair.nodes[2].port_close(programs[0].client, PORT)
    for server in servers:
        server.join()
    assert callers[0].call(2, PORT, b"x")[0].status == errors.PortClosed.code
    pair.clean_up(*programs, *callers)


def test_large_messages(pair: Pair) -> None:
    server, caller = Program(pair.nodes[2]), Program(pair.nodes[1])
    pair.nodes[2].port_open(server.client, PORT, 3 << 20)
    question, answer = random.Random(3).randbytes(3 << 20), random.Random(4).randbytes(1 << 20)
    sent, got = bytearray(question), bytearray(1 << 20)

    def place(memory: bytearray) -> int:
        return ctypes.addressof((ctypes.c_char * len(memory)).from_buffer(memory))

    tag = caller.post(
        Op.CALL, handle=2, arg0=PORT, arg1=1 << 20, length=3 << 20, address=place(sent), offset=place(got)
    )
    assert server.receive(PORT)[0][1:3] == (errors.MessageTooLarge.code, 3 << 20)
    inbox, outbox = bytearray(3 << 20), bytearray(answer)
    reply, _ = server.ask(Op.RECEIVE, arg0=PORT, arg1=3 << 20, address=place(inbox))
    assert (reply.status, reply.value2, bytes(inbox)) == (0, 1, question)
    too_much = server.ask(Op.REPLY, handle=reply.value, length=(1 << 20) + 1, address=place(inbox))[0]
    assert too_much.status == errors.MessageTooLarge.code
    assert server.reply(reply.value, b"less") == errors.BadHandle.code
    told, _ = caller.next()
    assert (told.tag, told.status) == (tag, errors.MessageTooLarge.code)
    tag = caller.post(
        Op.CALL, handle=2, arg0=PORT, arg1=1 << 20, length=3 << 20, address=place(sent), offset=place(got)
    )
    reply, _ = server.ask(Op.RECEIVE, arg0=PORT, arg1=3 << 20, address=place(inbox))
    assert server.ask(Op.REPLY, handle=reply.value, length=1 << 20, address=place(outbox))[0].status == 0
    assert server.reply(reply.value, b"again") == errors.BadHandle.code
    reply, _ = caller.next()
    assert (reply.tag, reply.status, reply.length, bytes(got)) == (tag, 0, 1 << 20, answer)
    over = caller.ask(Op.SEND, handle=2, arg0=PORT, length=(3 << 20) + 1, address=place(sent))[0]
    assert over.status == errors.MessageTooLarge.code
    pair.clean_up(server, caller)


@pytest.mark.parametrize("size", [0, 1, 4096, 65535, 65536, 65537])
def test_a_reply_with_and_without_a_head_brings_the_same(pair: Pair, size: int) -> None:
    """Its head is left out of one that fits into a single work request, and of none that is empty or larger."""
    server, caller = Program(pair.nodes[2]), Program(pair.nodes[1])
    pair.nodes[2].port_open(server.client, PORT, 100)
    answer = bytearray(random.Random(size).randbytes(size) + b"end")
    got = bytearray(70000)

    def place(memory: bytearray) -> int:
        return ctypes.addressof((ctypes.c_char * len(memory)).from_buffer(memory))

    for _ in range(40):  # more calls than there are small slots at once: tickets of slots that were used before
        tag = caller.post(Op.CALL, b"?", handle=2, arg0=PORT, arg1=70000, length=1, flags=1, offset=place(got))
        call, _ = server.receive(PORT)
        assert server.ask(Op.REPLY, handle=call.value, length=size, address=place(answer))[0].status == 0
        reply, _ = caller.next()
        assert (reply.tag, reply.status, reply.length) == (tag, 0, size)
        assert got[:size] == answer[:size]
    pair.clean_up(server, caller)


def test_a_reply_that_cannot_be_read_ends_its_call(pair: Pair) -> None:
    server, caller = Program(pair.nodes[2]), Program(pair.nodes[1])
    pair.nodes[2].port_open(server.client, PORT, 100)
    for size in (100, 100000):
        tag = caller.post(Op.CALL, b"?", handle=2, arg0=PORT, arg1=1 << 20, length=1, flags=1)
        call, _ = server.receive(PORT)
        assert server.ask(Op.REPLY, handle=call.value, length=size, address=8)[0].status == errors.BadArgument.code
        reply, _ = caller.next()
        assert (reply.tag, reply.status) == (tag, errors.BadMessage.code)
    pair.clean_up(server, caller)


def test_a_full_ring_holds_senders_back_and_loses_nothing(pair: Pair) -> None:
    server, caller = Program(pair.nodes[2]), Program(pair.nodes[1])
    pair.nodes[2].port_open(server.client, PORT, 8192)
    for i in range(100):  # 100 x 8 KiB go into a ring of 256 KiB
        caller.post(Op.SEND, struct.pack("<I", i) + bytes(8188), handle=2, arg0=PORT, length=8192,
                    flags=Flag.INLINE_DATA, timeout_ms=wire.NO_LIMIT if i < 90 else 200)  # fmt: skip
    until(lambda: pair.nodes[1].stats()["timeouts"] == 10)
    seen = []
    for _ in range(90):
        reply, data = server.receive(PORT, timeout_ms=5000)
        assert reply.status == 0
        seen.append(struct.unpack_from("<I", data)[0])
    assert sorted(seen) == list(range(90))
    assert server.receive(PORT, flags=Flag.NO_WAIT)[0].status == errors.TimedOut.code
    statuses = [caller.next()[0].status for _ in range(100)]
    assert sorted(statuses) == [errors.RingFull.code] * 10 + [0] * 90
    pair.clean_up(server, caller)


def test_a_late_reply_finds_its_slot_in_quarantine(pair: Pair) -> None:
    server, caller = Program(pair.nodes[2]), Program(pair.nodes[1])
    pair.nodes[2].port_open(server.client, PORT, 100)
    assert caller.call(2, PORT, b"slow", timeout_ms=50)[0].status == errors.TimedOut.code
    assert pair.nodes[1].stats()["slots_quarantined"] == 1
    reply, data = server.receive(PORT)
    assert data == b"slow"
    assert server.reply(reply.value, b"late") == 0
    until(lambda: pair.nodes[1].stats()["slots_quarantined"] == 0)
    tag = caller.post(Op.CALL, b"never", handle=2, arg0=PORT, arg1=8, length=5, flags=3)
    until(lambda: pair.nodes[2].stats()["messages_in"] == 2)
    cancel = caller.post(Op.CANCEL, arg0=tag)
    assert {caller.next()[0][:2], caller.next()[0][:2]} == {(tag, errors.Cancelled.code), (cancel, 0)}
    pair.nodes[1].peer_dead(2, 1)
    assert pair.nodes[1].stats()["slots_quarantined"] == 0
    pair.clean_up(server, caller)


def test_a_server_that_dies_answers_its_callers(pair: Pair) -> None:
    server, caller = Program(pair.nodes[2]), Program(pair.nodes[1])
    pair.nodes[2].port_open(server.client, PORT, 100)
    caller.post(Op.CALL, b"one", handle=2, arg0=PORT, arg1=8, length=3, flags=3)
    assert server.receive(PORT)[1] == b"one"
    caller.post(Op.CALL, b"two", handle=2, arg0=PORT, arg1=8, length=3, flags=3)
    until(lambda: pair.nodes[2].stats()["messages_in"] == 2)
    server.close()
    pair.nodes[2].client_remove(server.client)
    assert [caller.next()[0].status for _ in range(2)] == [errors.PortClosed.code] * 2
    with pytest.raises(errors.BadHandle):
        pair.nodes[2].client_remove(server.client)
    pair.clean_up(caller)
