"""Malformed messages on LITE's borders: from programs to the tier, among tiers and the directory, and in the rings,
heads and reply slots that peers write. (From programs to the core: test_lite_core.py.)"""

from __future__ import annotations

import ctypes
import json
import random
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guest_agents import control, lite
from guest_agents.lite import errors
from guest_agents.lite.core import Config
from guest_agents.lite.wire import Flag, Op
from tests.unit import lite_pair
from tests.unit.lite_blades import SECRET, Program, Rack, eventually
from tests.unit.lite_pair import Pair, until
from tests.unit.lite_stack import whole

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.skipif(lite_pair.missing() is not None, reason=str(lite_pair.missing())),
]
PORT = 5
HEAD = struct.Struct("<IHBBIIIIIIIIQQQ")
"""struct message_head of rpc.h."""
GOOD = {"magic": 0x4C495445, "port": PORT, "kind": 0, "sender": 0, "length": 5, "sequence": 0, "skipped": 0,
        "max_reply": 0, "slot": 0, "ticket": 0, "rkey": 0, "zero": 0, "address": 0, "z1": 0, "z2": 0}  # fmt: skip
REQUEST, REPLY, BARE_REPLY = 1 << 30, 2 << 30, 3 << 30

JUNK: list[Any] = [None, True, -1, 0, 1, 7, 2**31, 2**63, 2**64, 10**30, 1.5, float("inf"), "", "x", "x" * 200, "\0",
                   "é", [], [None], [1], [[1, 2]], ["mb0", 5], ["nowhere"], {}, {"a": 1}, [[[]]]]  # fmt: skip


@pytest.fixture
def rack(tmp_path: Path, lite_core: Path) -> Iterator[Rack]:
    with whole(tmp_path, lite_core, "gm0", "mb0", "mb1") as made:
        yield made


def works(rack: Rack) -> None:
    """All of it, still; and nothing is held when nobody has anything."""
    one, two = (lite.connect(str(rack[name].tier.settings.socket)) for name in ("mb0", "mb1"))
    with one, two, two.register(PORT):
        made = one.malloc(8192, ["mb1", "mb0"], spread=True, name="works", permissions=lite.Permission.ALL)
        two.map("works").write(b"well", at=4090)
        made.move("gm0")
        assert made.read(4, at=4090) == b"well"
        with one.lock("works", home="mb1"):
            one.send("mb1", PORT, b"well")
    eventually(lambda: all(blade.tier.clients.all() == [] for blade in rack.blades.values()))
    eventually(lambda: all(blade.tier.blocks.held() == [] for blade in rack.blades.values()))


@pytest.mark.parametrize("seed", range(4))
def test_nonsense_from_a_program_has_a_named_error(rack: Rack, seed: int) -> None:
    chance = random.Random(seed)
    fields = ["handle", "size", "nodes", "spread", "name", "keep", "permissions", "to", "block", "offset", "length",
              "byte", "source", "target", "soffset", "toffset", "id", "port", "max_message", "home", "count", "mode"]
    ops = sorted(rack["mb0"].tier.requests.actions())
    fool = rack["mb0"].client()
    held = [fool.call("malloc", size=4096, permissions=31)["handle"] for _ in range(3)]
    codes = set()
    for _ in range(600):
        request: dict[str, Any] = {name: chance.choice([*JUNK, *held]) for name in fields if chance.random() < 0.7}
        request["timeout_ms"] = chance.choice([1, 5, -1, "x", 2**40, []])
        request["op"] = chance.choice(ops) if chance.random() < 0.95 else chance.choice(JUNK)
        if isinstance(request.get("size"), float | int) and request["size"] == 7:
            request["nodes"] = ["mb1"]
        packet = json.dumps(request).encode()
        fool.socket.send(packet if chance.random() < 0.95 else packet[: chance.randrange(1, len(packet))])
        answer, descriptors, _flags, _from = socket.recv_fds(fool.socket, 1 << 20, 4)
        for descriptor in descriptors:
            socket.close(descriptor)
        reply = json.loads(answer)
        if not reply["ok"]:
            assert reply["code"] in errors.ERRORS, f"{request}: {reply}"
            codes.add(reply["code"])
    assert {errors.BadArgument.code, errors.BadHandle.code, errors.BadMessage.code} <= codes
    fool.kill()
    works(rack)


SHAPES: dict[str, dict[str, Any]] = {
    "lite.block.allocate": {"lmr": 5, "lengths": [4096]},
    "lite.block.free": {"blocks": [[5, [64]]], "dead": []},
    "lite.record.keep": {"record": {}},
    "lite.lmr.put": {"record": {"lmr": 9, "size": 64, "blocks": []}},
    "lite.lmr.freeze": {"lmr": 9},
    "lite.lmr.thaw": {"lmr": 9},
    "lite.lmr.kill": {"lmr": 9, "code": -4},
    "lite.block.copy": {"lmr": 5, "source": [], "address": 64},
    "lite.lock.make": {"name": "l"},
    "lite.lock.drop": {"name": "l", "dead": []},
    "lite.lock.state": {"name": "l", "dead": []},
    "lite.lock.reserve": {"name": "l", "life": [9, 9], "ticket": 1, "doubt": False},
    "lite.lock.grant": {"name": "l", "ticket": 1},
    "lite.handles.set": {"lmr": 9, "handles": [[1, 2]]},
    "lite.rpc.bind": {"life": [9, 9], "port": 5},
    "lite.wake": {"waiters": [1], "code": 0},
    "lite.peer.connect": {"life": [9, 9], "address": {}, "broken": 0},
    "lite.peer.ask": {"life": [9, 9], "broken": 0},
    "lite.directory.malloc": {"size": 64, "permissions": 3, "opening": 1},
    "lite.directory.map": {"name": "n", "permissions": 1, "opening": 2},
    "lite.directory.unmap": {"handles": [[1, 2]]},
    "lite.directory.undo": {"opening": 10**6},
    "lite.directory.move": {"lmr": 1, "ticket": 1, "to": ["mb0"], "block": 0},
    "lite.directory.lock_create": {"name": "l", "home": "mb0"},
    "lite.directory.barrier": {"name": "b", "count": 2, "waiter": 1},
}


@pytest.mark.parametrize("blade", ["mb1", "gm0"])
@pytest.mark.parametrize("seed", range(2))
def test_nonsense_from_another_agent_is_refused(rack: Rack, blade: str, seed: int) -> None:
    """Fields that are missing or of another type than they should be, from an agent that knows the secret."""
    chance = random.Random(seed)
    target = rack[blade]
    life, sender = target.tier.life(), rack["mb0"].tier.life()
    ops = sorted(target.tier.links.handlers)
    refused = 0
    with control.ControlClient((target.address, rack.port), SECRET, 30.0) as client:
        for _ in range(200):
            op = chance.choice(ops)
            fields = dict(SHAPES.get(op, {}))
            if op.startswith("lite.directory."):
                fields |= {"life": None, "client": 1}
            if "life" in fields:
                fields["life"] = [sender.node, sender.incarnation]
            for name in list(fields):
                if chance.random() < 0.3:
                    del fields[name]
                elif chance.random() < 0.6:
                    fields[name] = chance.choice([None, "x", [], [None], [["x", "y"]], [[1]], {"a": 1}, -1, 2**70])
            meant = [life.node, life.incarnation] if chance.random() < 0.9 else chance.choice([None, [1], "x", [0, 0]])
            try:
                client.call(op, meant_for=meant, **fields)
            except control.LostError:
                raise AssertionError(f"{op} {fields} broke the connection") from None
            except control.ControlError:
                refused += 1
    assert refused > 100
    for one in rack.blades.values():  # what requests that made sense have taken
        for name in [name for name, _address, _rkey in one.tier.locks.report()]:
            one.tier.locks.drop({"name": name})
        for held in one.tier.blocks.held():
            one.tier.blocks.free(held.owner, [held.address])
    works(rack)


def test_a_stranger_gets_nowhere(rack: Rack) -> None:
    with pytest.raises(control.ControlError, match="another secret"):
        control.ControlClient((rack["mb1"].address, rack.port), b"x" * 32, 5.0)
    works(rack)


@pytest.fixture
def pair(lite_core: Path) -> Iterator[Pair]:
    pair = Pair(lite_core, Config(timeout_ms=3000, spin_us=100))
    yield pair
    pair.close()


class Peers:
    """Node 2 serves, node 1 calls; the tests are what node 1 (or 2) would be if it were mad."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.server, self.caller = lite_pair.Program(pair.nodes[2]), lite_pair.Program(pair.nodes[1])
        pair.nodes[2].port_open(self.server.client, PORT, 4096)

    def send(self, data: bytes = b"hello", **fields: int) -> int:
        return self.caller.ask(Op.SEND, data, handle=2, arg0=PORT, length=len(data), flags=Flag.INLINE_DATA,
                               **fields)[0].status  # fmt: skip

    def exchange(self) -> None:
        """A message and a call get through."""
        assert self.send() == 0
        assert self.server.receive(PORT)[1] == b"hello"
        tag = self.caller.post(Op.CALL, b"q", handle=2, arg0=PORT, arg1=8, length=1, flags=3)
        reply, _ = self.server.receive(PORT)
        assert self.server.reply(reply.value, b"a") == 0
        answer, data = self.caller.next()
        assert (answer.tag, answer.status, data) == (tag, 0, b"a")

    def ring(self) -> int:
        return self.pair.nodes[2].ring_offer(1, 1, PORT).address

    def immediate(self, node: int, imm: int, size: int = 64) -> None:
        self.pair.fake.fake_immediate(self.pair.addresses[node]["qps"][1][0], socket.htonl(imm), size)
        self.pair.fake.fake_hold(0)

    def recover(self) -> None:
        """Connected anew all is well; a bind that failed before may still refuse a message."""
        self.pair.connect()
        while self.server.receive(PORT, 4096, flags=Flag.NO_WAIT)[0].status == 0:
            pass
        until(lambda: self.send() == 0)
        assert self.server.receive(PORT)[1] == b"hello"
        self.exchange()

    def clean_up(self) -> None:
        self.pair.clean_up(self.server, self.caller)


BAD_HEADS = [
    {"magic": 0}, {"port": 4}, {"port": 0xFFFF}, {"kind": 3}, {"kind": 255}, {"length": 4097}, {"length": 2**32 - 1},
    {"sequence": 2**31}, {"sequence": 1 << 20}, {"skipped": 63}, {"skipped": 1 << 30}, {"max_reply": 2**32 - 1},
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_HEADS, ids=str)
def test_a_malformed_message_in_a_ring_breaks_with_its_sender(pair: Pair, bad: dict[str, int]) -> None:
    peers = Peers(pair)
    peers.exchange()
    head = HEAD.pack(*{**GOOD, "sequence": 2, **bad}.values())
    ctypes.memmove(peers.ring() + 8 * 64, head + b"junk!" + bytes(59), 128)
    peers.immediate(2, REQUEST | PORT << 24 | 8)
    until(lambda: pair.nodes[2].stats()["peers"][1]["state"] == "broken")
    assert pair.nodes[2].stats()["messages_dropped"] == 1
    assert peers.server.receive(PORT, flags=Flag.NO_WAIT)[0].status == errors.TimedOut.code
    peers.recover()
    peers.clean_up()


@pytest.mark.parametrize("seed", range(4))
def test_random_ring_contents_harm_nobody(pair: Pair, seed: int) -> None:
    chance = random.Random(seed)
    peers = Peers(pair)
    for _ in range(60):
        if pair.nodes[2].stats()["peers"][1]["state"] != "connected" or pair.nodes[1].stats()["peers"][2]["state"] != (
            "connected"
        ):
            pair.connect()
        if pair.nodes[2].stats()["rings_in"] == 0:
            peers.send(timeout_ms=500)
        offset = chance.choice((0, 1, 8, 64, 4095, 4096, 2**24 - 1))
        fields = {**GOOD, "kind": chance.choice((0, 1, 2, 3)), "sequence": chance.randrange(6),
                  "length": chance.choice((0, 5, 4096, 4097)), "skipped": chance.choice((0, 64, 4096)),
                  "max_reply": chance.choice((0, 100, 2**22)), "slot": chance.choice((0, 1, 2**30)),
                  "rkey": chance.randrange(2**16), "address": chance.randrange(2**64)}  # fmt: skip
        head = HEAD.pack(*fields.values()) if chance.random() < 0.8 else chance.randbytes(64)
        if pair.nodes[2].stats()["rings_in"] and offset <= 4000:
            ctypes.memmove(peers.ring() + offset * 64, head, 64)
        opcode = chance.choice((REQUEST, REQUEST, REPLY, BARE_REPLY))
        peers.immediate(2, opcode | PORT << 24 | offset, chance.choice((0, 15, 64)))
        reply, _ = peers.server.receive(PORT, 4096, timeout_ms=20)
        if reply.status == 0 and reply.value:  # a call, whose caller wants the answer somewhere
            assert peers.server.reply(reply.value, b"to nowhere"[: fields["max_reply"]]) in (
                0, errors.Freed.code, errors.NodeUnreachable.code, errors.MessageTooLarge.code)  # fmt: skip
    peers.recover()
    peers.clean_up()


@pytest.mark.parametrize(
    "word", [2**64 - 1, 1 << 47, 1 << 48, 1 << 48 | 1 << 47, 1 << 48 | 12345, 2 << 48 | 1 << 47 | 64]
)
def test_a_head_that_makes_no_sense_holds_nobody_up_for_ever(pair: Pair, word: int) -> None:
    peers = Peers(pair)
    peers.exchange()
    place = pair.addresses[1]["heads"] + 8 * PORT
    ctypes.memmove(place, struct.pack("<Q", word), 8)
    named = {0, errors.RingFull.code, errors.TimedOut.code, errors.NodeUnreachable.code, errors.PortClosed.code}
    for _ in range(5):
        assert peers.send(timeout_ms=50) in named
    peers.recover()
    peers.clean_up()


@pytest.mark.parametrize(
    ("status", "ticket", "length"), [(0, 1, 5), (0, 0, 9), (0, 0, 2**63), (7, 0, 0), (-(2**31), 0, 0)]
)
def test_a_malformed_reply_breaks_with_its_sender(pair: Pair, status: int, ticket: int, length: int) -> None:
    """`ticket`: how much it is off."""
    peers = Peers(pair)
    peers.exchange()
    tag = peers.caller.post(Op.CALL, b"q", handle=2, arg0=PORT, arg1=8, length=1, flags=3)
    until(lambda: pair.nodes[2].stats()["messages_in"] == 3)
    fields = dict(zip(GOOD, HEAD.unpack(ctypes.string_at(peers.ring() + 4 * 64, HEAD.size)), strict=True))
    assert (fields["magic"], fields["kind"]) == (GOOD["magic"], 1)
    assert peers.server.receive(PORT)[1] == b"q"
    reply = struct.pack("<iIQ", status, fields["ticket"] + ticket, length)
    pair.nodes[2].write(1, fields["address"], fields["rkey"], reply + b"junk!" if length == 5 else reply)
    peers.immediate(1, REPLY | fields["slot"], 21)
    answer, _ = peers.caller.next()
    if status < 0:  # an error is the server's to choose; one without a name is passed on as it is
        assert (answer.tag, answer.status) == (tag, status)
    else:
        assert (answer.tag, answer.status) == (tag, errors.NodeUnreachable.code)
        until(lambda: pair.nodes[1].stats()["peers"][2]["state"] == "broken")
    peers.recover()
    peers.clean_up()


@pytest.mark.parametrize(("ticket", "length"), [(1, 5), (0, 9), (0, 0)])
def test_a_malformed_reply_without_a_head_breaks_with_its_sender(pair: Pair, ticket: int, length: int) -> None:
    """`ticket`: how much it is off."""
    peers = Peers(pair)
    peers.exchange()
    tag = peers.caller.post(Op.CALL, b"q", handle=2, arg0=PORT, arg1=8, length=1, flags=3)
    until(lambda: pair.nodes[2].stats()["messages_in"] == 3)
    fields = dict(zip(GOOD, HEAD.unpack(ctypes.string_at(peers.ring() + 4 * 64, HEAD.size)), strict=True))
    assert peers.server.receive(PORT)[1] == b"q"
    peers.immediate(1, BARE_REPLY | (fields["ticket"] + ticket) % 2**18 << 12 | fields["slot"], length)
    answer, _ = peers.caller.next()
    assert (answer.tag, answer.status) == (tag, errors.NodeUnreachable.code)
    until(lambda: pair.nodes[1].stats()["peers"][2]["state"] == "broken")
    peers.recover()
    peers.clean_up()


def test_the_rack_survives_a_program_that_says_half_a_hello(rack: Rack) -> None:
    for packet in (b'{"op":"hello"', b'{"op":"hello","token":7}', b'{"op":"hello","token":"\\ud800"}', b'{"op":[]}'):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
            stranger.connect(str(rack["mb0"].tier.settings.socket))
            stranger.send(packet)
            assert json.loads(stranger.recv(65536))["code"] in errors.ERRORS
    Program(rack["mb0"]).kill()
    works(rack)
