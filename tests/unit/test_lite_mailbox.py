"""Mailboxes of LITE's core: requests in memory that a program shares with it, and programs that misuse them."""

from __future__ import annotations

import mmap
import os
import random
import socket
import struct
import threading
import time

import pytest

from guest_agents.lite import wire
from guest_agents.lite.errors import BadHandle, BadMessage, NotJoined
from guest_agents.lite.wire import Flag, Op, Reply
from tests.unit import lite_pair
from tests.unit.lite_pair import ALL, Pair, Program

REASON = lite_pair.missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")
CORE = 1  # of MAIL_PROGRAM and MAIL_CORE
TURN, ASLEEP, PAYLOAD, REQUEST = 0, 4, 8, 16
OUT = REQUEST + wire.REQUEST.size
REPLY = OUT + wire.INLINE
IN = REPLY + wire.REPLY.size
SIZE = IN + wire.INLINE
KNOCK = struct.pack("<B63x", 255)


class Mailbox:
    """What liblite does with one, in Python."""

    def __init__(self, pair: Pair, node: int) -> None:
        self.client = pair.nodes[node].client_add(os.getpid())
        self.socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(lite_pair.SECONDS)
        file = pair.nodes[node].channel_add(self.client, other.detach(), mailbox=True)
        assert file is not None
        with pytest.raises(OSError, match="not permitted"):
            os.ftruncate(file, 0)  # would be the core's SIGBUS
        self.memory = mmap.mmap(file, SIZE)
        os.close(file)

    def word(self, at: int) -> int:
        return int(struct.unpack_from("<I", self.memory, at)[0])

    def post(self, request: bytes, data: bytes = b"", payload: int | None = None, knock: bool = True) -> None:
        self.memory[REQUEST:OUT] = request
        self.memory[OUT : OUT + len(data)] = data
        struct.pack_into("<I", self.memory, PAYLOAD, len(data) if payload is None else payload)
        struct.pack_into("<I", self.memory, TURN, CORE)
        if knock and self.word(ASLEEP):
            self.socket.send(KNOCK)

    def answer(self) -> tuple[Reply, bytes]:
        deadline = time.monotonic() + lite_pair.SECONDS
        while self.word(TURN) == CORE:
            assert time.monotonic() < deadline, "no answer"
            time.sleep(0.001)
        reply = wire.reply(self.memory[REPLY:IN])
        return reply, self.memory[IN : IN + min(reply.length, wire.INLINE)]

    def ask(self, op: int, data: bytes = b"", /, payload: int | None = None, **fields: int) -> tuple[Reply, bytes]:
        self.post(wire.request(op, 7, **fields), data, payload)
        return self.answer()


def area(pair: Pair, mailbox: Mailbox) -> int:
    """A handle of the mailbox's owner on 100,000 bytes of node 2."""
    pair.lmr(1, (2, 100_000))
    return pair.nodes[1].handle_add(mailbox.client, 1, ALL)


def test_requests_of_every_size_in_a_mailbox_and_beside_it(pair: Pair) -> None:
    box = Mailbox(pair, 1)
    handle = area(pair, box)
    chance = random.Random(1)
    expected = bytearray(100_000)
    for length in (0, 1, 64, 4096, wire.INLINE):
        offset, data = chance.randrange(50_000), chance.randbytes(length)
        expected[offset : offset + length] = data
        reply, _ = box.ask(Op.WRITE, data, handle=handle, offset=offset, length=length, flags=Flag.INLINE_DATA)
        assert (reply.tag, reply.status, reply.length) == (7, 0, length)
        box.socket.send(wire.request(Op.READ, 9, handle=handle, offset=offset, length=64, flags=Flag.INLINE_REPLY))
        reply, got = box.ask(Op.READ, handle=handle, offset=offset, length=length, flags=Flag.INLINE_REPLY)
        assert (reply.status, got) == (0, data)
        packet = box.socket.recv(wire.PACKET)
        assert wire.reply(packet).tag == 9
        assert packet[wire.REPLY.size :] == expected[offset : offset + 64]
    assert pair.nodes[1].stats()["mails"] == 10
    assert box.ask(Op.READ, handle=handle + 1, length=1, flags=Flag.INLINE_REPLY)[0].status == BadHandle.code


def test_calls_by_mailbox_on_both_sides(pair: Pair) -> None:
    server, caller = Mailbox(pair, 2), Mailbox(pair, 1)
    pair.nodes[2].port_open(server.client, 5, wire.INLINE)
    rounds = 50

    def serve() -> None:
        both = Flag.INLINE_DATA | Flag.INLINE_REPLY
        reply, data = server.ask(Op.RECEIVE, arg0=5, arg1=wire.INLINE, flags=Flag.INLINE_REPLY)
        for _ in range(rounds - 1):
            reply, data = server.ask(Op.REPLY_RECEIVE, data[::-1], handle=reply.value, arg0=5, arg1=wire.INLINE,
                                     length=len(data), flags=both)  # fmt: skip
        assert server.ask(Op.REPLY, data[::-1], handle=reply.value, length=len(data),
                          flags=Flag.INLINE_DATA)[0].status == 0  # fmt: skip

    serving = threading.Thread(target=serve)
    serving.start()
    for number in range(rounds):
        said = random.Random(number).randbytes(number * 100)
        reply, data = caller.ask(Op.CALL, said, handle=2, arg0=5, arg1=wire.INLINE, length=len(said),
                                 flags=Flag.INLINE_DATA | Flag.INLINE_REPLY)  # fmt: skip
        assert (reply.status, data) == (0, said[::-1])
    serving.join()


def test_a_core_that_sleeps_is_woken_by_a_knock(pair: Pair) -> None:
    box = Mailbox(pair, 1)
    handle = area(pair, box)
    for _ in range(3):
        deadline = time.monotonic() + lite_pair.SECONDS
        while not box.word(ASLEEP):
            assert time.monotonic() < deadline, "it does not sleep"
            time.sleep(0.01)
        assert box.ask(Op.READ, handle=handle, length=8, flags=Flag.INLINE_REPLY)[0].status == 0
    assert pair.nodes[1].stats()["knocks"] >= 3


@pytest.mark.parametrize("payload", [wire.INLINE + 1, wire.INLINE + 4096, 1 << 31, 0xFFFFFFFF])
def test_a_payload_that_cannot_be_is_refused(pair: Pair, payload: int) -> None:
    box = Mailbox(pair, 1)
    handle = area(pair, box)
    reply, _ = box.ask(Op.WRITE, payload=payload, handle=handle, length=payload, flags=Flag.INLINE_DATA)
    assert reply.status == BadMessage.code
    assert box.ask(Op.READ, handle=handle, length=8, flags=Flag.INLINE_REPLY)[0].status == 0


def test_ranges_and_data_that_do_not_fit_in_a_packet_are_refused(pair: Pair) -> None:
    """They would be read from behind the packet: from what other programs have sent."""
    box = Mailbox(pair, 1)
    handle = area(pair, box)
    ranges = b"".join(wire.SEGMENT.pack(i * 32, 32) for i in range(wire.SEGMENTS))
    fields = {"handle": handle, "arg0": wire.SEGMENTS, "length": wire.INLINE, "flags": int(Flag.INLINE_DATA)}
    most = ranges + bytes(wire.INLINE - len(ranges))
    assert box.ask(Op.WRITEV, most, payload=len(ranges) + wire.INLINE, **fields)[0].status == BadMessage.code
    program = Program(pair.nodes[1], box.client)
    assert program.ask(Op.WRITEV, ranges + bytes(wire.INLINE), **fields)[0].status == BadMessage.code


@pytest.mark.parametrize("seed", range(4))
def test_nonsense_in_a_mailbox_harms_nobody(pair: Pair, seed: int) -> None:
    chance = random.Random(seed)
    box, other = Mailbox(pair, 1), Mailbox(pair, 1)
    handle = area(pair, other)
    waits = {int(Op.RECEIVE), int(Op.REPLY_RECEIVE), int(Op.CALL), int(Op.SEND)}
    for _ in range(200):
        request = bytearray(chance.randbytes(wire.REQUEST.size))
        request[0] = chance.choice([op for op in range(256) if op not in waits])
        if chance.random() < 0.5:
            request[1:4] = bytes((0, chance.randrange(4), 0))
        box.post(bytes(request), chance.randbytes(chance.randrange(200)), chance.choice([None, 0, 1 << 20]))
        box.answer()
        assert other.ask(Op.READ, handle=handle, length=8, flags=Flag.INLINE_REPLY)[0].status == 0


def test_who_waits_hears_when_the_channel_is_closed(pair: Pair) -> None:
    box = Mailbox(pair, 1)
    pair.nodes[1].port_open(box.client, 6, 100)
    box.post(wire.request(Op.RECEIVE, 7, arg0=6, arg1=100, flags=Flag.INLINE_REPLY))
    time.sleep(0.05)
    assert box.word(TURN) == CORE
    pair.nodes[1].client_remove(box.client)
    assert box.answer()[0].status == NotJoined.code


def test_programs_killed_with_a_request_in_their_mailbox_leave_nothing(pair: Pair) -> None:
    before = pair.nodes[1].stats()
    for _ in range(20):
        box = Mailbox(pair, 1)
        pair.nodes[1].port_open(box.client, 6, 100)
        box.post(wire.request(Op.RECEIVE, 7, arg0=6, arg1=100, flags=Flag.INLINE_REPLY))
        box.socket.close()
        pair.nodes[1].client_remove(box.client)
    after = pair.nodes[1].stats()
    for key in ("channels", "ops", "clients", "ports"):
        assert after[key] == before[key]
    assert after["pool_used"] <= before["pool_used"] + wire.PACKET  # the core keeps one for the next request
