"""Ports of LITE's core that are closed and registered again, while others send to them; over stand-in verbs."""

from __future__ import annotations

import random
import struct
import threading
import time

import pytest

from guest_agents.lite import errors, wire
from guest_agents.lite.wire import Flag, Op
from tests.unit import lite_pair
from tests.unit.lite_pair import Pair, Program

REASON = lite_pair.missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")
PORT = 5
CLOSED = errors.PortClosed.code


def send(program: Program, data: bytes, node: int = 2) -> int:
    return program.ask(Op.SEND, data, handle=node, arg0=PORT, length=len(data), flags=Flag.INLINE_DATA)[0].status


def settled(program: Program, node: int = 2) -> None:
    """Calls until its node, and not only the server, knows that the port is closed."""
    deadline = time.monotonic() + lite_pair.SECONDS
    while program.node.stats()["rings_out"]:
        assert program.call(node, PORT, b"?")[0].status == CLOSED
        assert time.monotonic() < deadline


@pytest.mark.parametrize("node", [2, 1])
def test_a_send_to_a_port_that_was_closed_says_so(pair: Pair, node: int) -> None:
    server, caller = Program(pair.nodes[node]), Program(pair.nodes[1])
    pair.nodes[node].port_open(server.client, PORT, 100)
    assert send(caller, b"read", node) == 0
    assert server.receive(PORT)[1] == b"read"
    pair.nodes[node].port_close(server.client, PORT)
    settled(caller, node)
    assert send(caller, b"nobody is there", node) == CLOSED
    assert send(caller, b"still nobody", node) == CLOSED
    pair.nodes[node].port_open(server.client, PORT, 100)
    assert send(caller, b"back", node) == 0
    assert server.receive(PORT)[1] == b"back"
    assert server.receive(PORT, flags=Flag.NO_WAIT)[0].status == errors.TimedOut.code
    pair.clean_up(server, caller)


def test_whose_messages_nobody_read_hears_it_with_the_next_and_only_once(pair: Pair) -> None:
    server = Program(pair.nodes[2])
    loser, other, late = (Program(pair.nodes[1]) for _ in range(3))
    pair.nodes[2].port_open(server.client, PORT, 100)
    assert send(other, b"read") == 0
    assert server.receive(PORT)[1] == b"read"
    with pair.held():  # on its way when the port is closed
        tag = late.post(Op.SEND, b"late", handle=2, arg0=PORT, length=4, flags=Flag.INLINE_DATA)
        deadline = time.monotonic() + lite_pair.SECONDS
        while pair.nodes[1].stats()["pieces"] != 1:
            assert time.monotonic() < deadline
        pair.nodes[2].port_close(server.client, PORT)
    assert late.next()[0][:2] == (tag, 0)
    pair.nodes[2].port_open(server.client, PORT, 100)
    # In between the port was open and late's message was delivered, or it was closed and the message was lost.
    lost = pair.nodes[2].stats()["messages_dropped"]
    if not lost:
        assert server.receive(PORT)[1] == b"late"
    assert send(loser, b"unread") == 0
    before = pair.nodes[2].stats()["messages_dropped"]
    pair.nodes[2].port_close(server.client, PORT)
    assert pair.nodes[2].stats()["messages_dropped"] == before + 1
    pair.nodes[2].port_open(server.client, PORT, 100)
    assert send(other, b"not concerned") == 0
    assert loser.call(2, 9, b"")[0].status == CLOSED, "another port is another matter"
    assert send(loser, b"hears it") == CLOSED
    assert send(loser, b"goes on") == 0
    assert send(late, b"too") == (CLOSED if lost else 0)
    got = {server.receive(PORT)[1] for _ in range(2 if lost else 3)}
    assert got == {b"not concerned", b"goes on"} | (set() if lost else {b"too"})
    pair.clean_up(server, loser, other, late)


def test_who_was_told_that_the_port_is_closed_is_not_told_again_when_it_is_open(pair: Pair) -> None:
    server, caller = Program(pair.nodes[2]), Program(pair.nodes[1])
    pair.nodes[2].port_open(server.client, PORT, 100)
    assert send(caller, b"unread") == 0
    pair.nodes[2].port_close(server.client, PORT)
    settled(caller)
    pair.nodes[2].port_open(server.client, PORT, 100)
    assert send(caller, b"fresh") == 0
    assert server.receive(PORT)[1] == b"fresh"
    pair.clean_up(server, caller)


def test_a_reply_that_comes_before_the_acknowledgement_of_its_call_does_not_keep_the_ring(pair: Pair) -> None:
    server, again, caller = Program(pair.nodes[2]), Program(pair.nodes[2]), Program(pair.nodes[1])
    pair.nodes[2].port_open(server.client, PORT, 100)

    def serve(program: Program) -> None:
        program.reply(program.receive(PORT)[0].value, b"answer")

    for program in (server, again):
        server_thread = threading.Thread(target=serve, args=(program,))
        server_thread.start()
        pair.fake.fake_late(1)
        reply, data = caller.call(2, PORT, b"question", timeout_ms=3000)
        pair.fake.fake_late(0)
        server_thread.join()
        assert (reply.status, data) == (0, b"answer")
        pair.nodes[2].port_close(program.client, PORT)
        if program is server:
            pair.nodes[2].port_open(again.client, PORT, 100)
    pair.clean_up(server, again, caller)


@pytest.mark.parametrize("sizes", [(100, wire.MAX_MESSAGE), (1 << 20, 100), (100, 100)])
def test_a_port_registered_anew_has_its_new_size(pair: Pair, sizes: tuple[int, int]) -> None:
    first, second, caller = Program(pair.nodes[2]), Program(pair.nodes[2]), Program(pair.nodes[1])
    pair.nodes[2].port_open(first.client, PORT, sizes[0])
    assert send(caller, b"one") == 0
    assert first.receive(PORT)[1] == b"one"
    first.close()
    pair.nodes[2].client_remove(first.client)
    pair.nodes[2].port_open(second.client, PORT, sizes[1])
    big = bytearray(random.Random(1).randbytes(sizes[1] + 1))
    place = lite_pair.address_of(big)
    assert caller.ask(Op.SEND, handle=2, arg0=PORT, length=sizes[1], address=place)[0].status == 0
    room = bytearray(sizes[1])
    reply, _ = second.ask(Op.RECEIVE, arg0=PORT, arg1=sizes[1], address=lite_pair.address_of(room))
    assert (reply.status, reply.length, room) == (0, sizes[1], big[:-1])
    reply, _ = caller.ask(Op.SEND, handle=2, arg0=PORT, length=sizes[1] + 1, address=place)
    assert reply.status == errors.MessageTooLarge.code
    assert pair.nodes[2].stats()["rings_in"] == 1
    pair.clean_up(second, caller)


def test_a_message_that_is_being_read_outlives_its_ring(pair: Pair) -> None:
    """A reader that does not take its answer holds the memory of the old ring, not the new one back."""
    reader, caller = Program(pair.nodes[2]), Program(pair.nodes[1])
    pair.nodes[2].port_open(reader.client, PORT, 4096)
    for i in range(200):  # unread answers fill the reader's socket, which then points into the ring
        reader.post(Op.RECEIVE, arg0=PORT, arg1=4096, flags=Flag.INLINE_REPLY)
        assert send(caller, bytes([i]) * 4096) == 0
    while pair.nodes[2].stats()["messages_in"] < 200:  # a send has ended when its message is there, not when it is seen
        time.sleep(0.01)
    pair.nodes[2].port_close(reader.client, PORT)
    settled(caller)
    pair.nodes[2].port_open(reader.client, PORT, 8192)
    for _ in range(25):
        assert send(caller, bytes(8192)) == 0
    for i in range(200):
        reply, data = reader.next()
        assert (reply.status, data) == (0, bytes([i]) * 4096)
    pair.clean_up(reader, caller)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_opening_and_closing_under_load_breaks_nothing_and_loses_nothing_in_silence(pair: Pair, seed: int) -> None:
    """Every message is received, or its sender gets PORT_CLOSED for it or for one after it."""
    chance = random.Random(seed)
    stop = threading.Event()
    told: dict[int, list[int]] = {}
    sent: dict[int, list[int]] = {}
    received: set[tuple[int, int]] = set()
    statuses: set[int] = set()

    def work(number: int, program: Program) -> None:
        random_ = random.Random(100 * seed + number)
        told[number], sent[number] = [], []
        turn = 0
        while not stop.is_set():
            turn += 1
            data = struct.pack("<II", number, turn) + bytes(random_.randrange(0, 3000))
            if random_.random() < 0.3:
                statuses.add(program.call(2, PORT, data, timeout_ms=2000)[0].status)
                continue
            status = send(program, data)
            statuses.add(status)
            (sent if status == 0 else told)[number].append(turn)

    def serve(server: Program, most: int) -> None:
        """Until the port is closed."""
        while True:
            reply, data = server.receive(PORT, most)
            if reply.status in (errors.Cancelled.code, CLOSED):
                return
            assert reply.status == 0
            if reply.value:
                server.reply(reply.value, data[:8])
            else:
                received.add(struct.unpack_from("<II", data))

    callers = {number: Program(pair.nodes[2 if number == 3 else 1]) for number in range(4)}
    threads = [threading.Thread(target=work, args=item) for item in callers.items()]
    for thread in threads:
        thread.start()
    servers = []
    for _ in range(25):
        server, most = Program(pair.nodes[2]), chance.choice((1000, 3008, 8192))
        servers.append(server)
        pair.nodes[2].port_open(server.client, PORT, most)
        reader = threading.Thread(target=serve, args=(server, most))
        reader.start()
        time.sleep(chance.uniform(0.0, 0.05))
        pair.nodes[2].port_close(server.client, PORT)
        reader.join()
        time.sleep(chance.choice((0.0, 0.01)))
    stop.set()
    for thread in threads:
        thread.join()
    for number, program in callers.items():  # the last word: it is closed
        assert send(program, struct.pack("<II", number, 1 << 31)) == CLOSED
        told[number].append(1 << 31)
    assert statuses <= {0, CLOSED, errors.MessageTooLarge.code}
    assert 0 in statuses
    assert all(node.stats()["peers_broken"] == 0 for node in pair.nodes.values())
    for number, turns in sent.items():
        lost = [turn for turn in turns if (number, turn) not in received]
        assert all(max(told[number]) > turn for turn in lost)
    assert len(received) > 50
    pair.clean_up(*servers, *callers.values())
