"""LITE's directory and tiers: allocation, names, rights, moving, death. In-process blades with real control servers."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from guest_agents.control import Message
from guest_agents.lite import errors
from guest_agents.lite.links import Links
from guest_agents.lite.records import cut
from guest_agents.membership import Life
from tests.unit.lite_blades import Program, Rack, eventually

ALL = 31
R, W, SHARE, ADMIN = 1, 2, 4, 8


@pytest.fixture
def rack(tmp_path: Path) -> Iterator[Rack]:
    made = Rack(tmp_path, ["gm0", "mb0", "mb1", "mb2"])
    yield made
    made.close()


def test_a_named_lmr_is_shared(rack: Rack) -> None:
    one, two = rack["mb0"].client(), rack["mb1"].client()
    made = one.call("malloc", size=100_000, name="box", permissions=R | W | SHARE)
    assert made["blocks"] == [{"node": "mb0", "length": 100_000}]
    one.write(made["handle"], 5, b"hello")
    mapped = two.call("map", name="box")
    assert (mapped["size"], mapped["permissions"]) == (100_000, R | W | SHARE)
    assert two.read(mapped["handle"], 4, 7) == b"\0hello\0"
    with pytest.raises(errors.BadHandle):
        rack["mb1"].client().read(mapped["handle"], 0, 1)
    with pytest.raises(errors.BadHandle):
        rack["mb1"].client().call("free", handle=mapped["handle"])


def test_the_last_handle_takes_the_lmr_along_unless_it_is_kept(rack: Rack) -> None:
    before = rack["mb1"].free
    one = rack["mb0"].client()
    gone = one.call("malloc", size=4096, name="gone", nodes=["mb1"])
    kept = one.call("malloc", size=4096, name="kept", nodes=["mb1"], keep=True, permissions=ALL)
    assert rack["mb1"].free == before - (1 << 20)
    one.call("unmap", handle=gone["handle"])
    with pytest.raises(errors.NoSuchName):
        one.call("map", name="gone")
    one.call("unmap", handle=kept["handle"])
    again = one.call("map", name="kept")
    one.call("free", handle=again["handle"])
    assert rack["mb1"].free == before
    with pytest.raises(errors.Freed):
        one.read(again["handle"], 0, 1)
    with pytest.raises(errors.NoSuchName):
        one.call("map", name="kept")


def test_free_tells_mappers_and_returns_memory(rack: Rack) -> None:
    before = {name: blade.free for name, blade in rack.blades.items()}
    one, two = rack["mb0"].client(), rack["mb1"].client()
    made = one.call("malloc", size=10 << 20, name="big", nodes=["mb1", "mb2"], spread=True, permissions=ALL)
    assert [block["node"] for block in made["blocks"]] == ["mb1", "mb2", "mb1"]
    mapped = two.call("map", name="big", permissions=R | W)
    with pytest.raises(errors.PermissionDenied):
        two.call("free", handle=mapped["handle"])
    one.call("free", handle=made["handle"])
    with pytest.raises(errors.Freed):
        two.read(mapped["handle"], 0, 1)
    two.call("unmap", handle=mapped["handle"])
    assert {name: blade.free for name, blade in rack.blades.items()} == before
    assert rack["mb1"].core.lmrs == {}


def test_bad_arguments_have_names(rack: Rack) -> None:
    one = rack["mb0"].client()
    one.call("malloc", size=1, name="taken")
    cases: list[tuple[type[errors.LiteError], str, dict[str, object]]] = [
        (errors.NameTaken, "malloc", {"size": 1, "name": "taken"}),
        (errors.BadArgument, "malloc", {"size": 0}),
        (errors.BadArgument, "malloc", {"size": "many"}),
        (errors.BadArgument, "malloc", {}),
        (errors.BadArgument, "malloc", {"size": 1, "name": "x" * 200}),
        (errors.NoSuchNode, "malloc", {"size": 1, "nodes": ["mb9"]}),
        (errors.NoMemory, "malloc", {"size": 17 << 20}),
        (errors.NoMemory, "malloc", {"size": 60 << 20, "spread": True}),
        (errors.NoSuchName, "map", {"name": "nothing"}),
        (errors.BadHandle, "unmap", {"handle": 999}),
        (errors.BadHandle, "free", {"handle": None}),
        (errors.BadMessage, "dance", {}),
        (errors.NotHeld, "unlock", {"name": "nothing"}),
        (errors.NoSuchName, "lock", {"name": "nothing"}),
    ]
    for kind, op, fields in cases:
        with pytest.raises(kind):
            one.call(op, **fields)
    assert rack["mb0"].tier.blocks.stat()["blocks"] == 1


def test_spread_uses_nodes_that_have_room(rack: Rack) -> None:
    one = rack["mb0"].client()
    one.call("malloc", size=15 << 20, nodes=["mb1"])
    made = one.call("malloc", size=8 << 20, spread=True)
    assert {block["node"] for block in made["blocks"]} == {"mb0", "mb2"}
    assert sum(block["length"] for block in made["blocks"]) == 8 << 20


def test_how_lmrs_are_cut() -> None:
    assert cut(100, 1) == [100]
    assert cut(9 << 20, 1) == [4 << 20, 4 << 20, 1 << 20]
    assert cut(65536, 4) == [16384] * 4
    assert cut(10000, 2) == [8192, 1808]
    assert cut(100 << 20, 3) == [4 << 20] * 25


def test_grant_and_revoke(rack: Rack) -> None:
    one, two, three = rack["mb0"].client(), rack["mb1"].client(), rack["mb2"].client()
    made = one.call("malloc", size=4096, name="box", permissions=0)
    with pytest.raises(errors.PermissionDenied):
        two.call("map", name="box", permissions=R)
    one.call("grant", handle=made["handle"], permissions=R | W | SHARE, to="mb1")
    mapped = two.call("map", name="box", permissions=R | W)["handle"]
    two.write(mapped, 0, b"x")
    with pytest.raises(errors.PermissionDenied):
        two.call("grant", handle=mapped, permissions=R, to="*")
    with pytest.raises(errors.PermissionDenied):
        three.call("map", name="box", permissions=R)
    one.call("revoke", handle=made["handle"], permissions=W, to="mb1")
    assert two.read(mapped, 0, 1) == b"x"
    with pytest.raises(errors.PermissionDenied):
        two.write(mapped, 0, b"y")
    one.call("revoke", handle=made["handle"], permissions=ALL, to="*")
    with pytest.raises(errors.Revoked):
        two.read(mapped, 0, 1)
    one.write(made["handle"], 0, b"z")


def test_several_masters(rack: Rack) -> None:
    one, two = rack["mb0"].client(), rack["mb1"].client()
    made = one.call("malloc", size=4096, name="box", permissions=SHARE)
    one.call("grant", handle=made["handle"], permissions=ADMIN, to=f"mb1/{two.number}")
    with pytest.raises(errors.PermissionDenied):
        rack["mb1"].client().call("map", name="box", permissions=ADMIN)
    second = two.call("map", name="box", permissions=ADMIN)["handle"]
    one.kill()
    eventually(lambda: len(rack["mb0"].tier.clients.all()) == 0)
    two.call("grant", handle=second, permissions=R, to="*")
    two.call("free", handle=second)
    with pytest.raises(errors.NoSuchName):
        two.call("map", name="box", permissions=R)


def test_a_killed_program_leaves_nothing(rack: Rack) -> None:
    before = {name: blade.free for name, blade in rack.blades.items()}
    one, two = rack["mb0"].client(), rack["mb1"].client()
    made = one.call("malloc", size=1 << 20, name="box", nodes=["mb2"], permissions=ALL)
    mapped = two.call("map", name="box")["handle"]
    two.call("lock_create", name="door")
    two.call("lock", name="door")
    two.kill()
    one.call("lock_create", name="door")
    one.call("lock", name="door", timeout_ms=5000)
    assert (two.number, mapped) not in rack["mb1"].core.handles
    assert one.read(made["handle"], 0, 1) == b"\0"
    one.kill()
    eventually(lambda: {name: blade.free for name, blade in rack.blades.items()} == before)
    for blade in rack.blades.values():
        assert (blade.core.lmrs, blade.core.handles, blade.core.clients) == ({}, {}, {})


@pytest.mark.parametrize("late", [False, True])
def test_an_answer_that_was_lost_leaves_nothing(rack: Rack, monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    """The directory carries out what the tier does not hear of any more, before or after the tier has regretted it."""
    before = rack["mb2"].free
    tier = rack["mb0"].tier
    ask = tier.directory
    lost: list[threading.Thread] = []

    def directory(op: str, timeout: float = 60.0, /, **fields: object) -> Message:
        if op != "malloc":
            return ask(op, timeout, **fields)

        def carry_out() -> None:
            if late:
                time.sleep(0.5)
            with suppress(errors.Cancelled):
                ask(op, timeout, **fields)

        lost.append(threading.Thread(target=carry_out))
        lost[0].start()
        if not late:
            lost[0].join()
        raise errors.ManagerLost

    monkeypatch.setattr(tier, "directory", directory)
    with pytest.raises(errors.ManagerLost):
        rack["mb0"].client().call("malloc", size=4096, name="box", nodes=["mb2"])
    lost[0].join()
    eventually(lambda: rack["mb2"].free == before)
    assert rack["mb1"].client().call("malloc", size=1, name="box")
    assert rack["mb0"].core.lmrs == {}


def test_threads_of_a_program_share_what_it_has(rack: Rack) -> None:
    one = rack["mb0"].client()
    made = one.call("malloc", size=4096)
    again = Program(rack["mb0"], one.token)
    assert again.number == one.number
    one.kill()
    again.call("free", handle=made["handle"])
    with pytest.raises(errors.NotJoined):
        Program(rack["mb0"], "nonsense")


@pytest.mark.parametrize("junk", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 60000, b'{"op": 7}', b'{"op": "hi"}'])
def test_junk_on_the_control_socket(rack: Rack, junk: bytes) -> None:
    one = rack["mb0"].client()
    one.socket.send(junk)
    if junk:
        assert json.loads(one.socket.recv(65536))["code"] == errors.BadMessage.code
        assert one.call("nodes")["nodes"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.connect(str(rack["mb0"].tier.settings.socket))
        stranger.send(junk or b"x")
        assert stranger.recv(65536)
    assert rack["mb0"].client().call("nodes")["nodes"]


def test_a_moving_lmr_loses_no_write(rack: Rack) -> None:
    one, two = rack["mb0"].client(), rack["mb1"].client()
    made = one.call("malloc", size=64 << 10, name="box", nodes=["mb0"], permissions=ALL)
    handles = [(one, made["handle"]), (two, two.call("map", name="box")["handle"])]
    over = threading.Event()
    counts = [0, 0]
    problems: list[BaseException] = []

    def write(turn: int) -> None:
        program, handle = handles[turn]
        try:
            while not over.is_set():
                counts[turn] += 1
                where = 8 * (2 * (counts[turn] % 4000) + turn)
                program.write(handle, where, counts[turn].to_bytes(8, "little"))
                assert int.from_bytes(program.read(handle, where, 8), "little") == counts[turn]
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=write, args=(turn,)) for turn in (0, 1)]
    for thread in threads:
        thread.start()
    places = []
    for node in ["mb1", "mb2", "mb0", "gm0"] * 3:
        moved = one.call("move", handle=made["handle"], to=[node])
        places.append(moved["blocks"][0]["node"])
    over.set()
    for thread in threads:
        thread.join()
    assert problems == []
    assert places == ["mb1", "mb2", "mb0", "gm0"] * 3
    for turn in (0, 1):
        for back in range(min(3000, counts[turn])):
            number = counts[turn] - back
            where = 8 * (2 * (number % 4000) + turn)
            assert int.from_bytes(one.read(made["handle"], where, 8), "little") == number
    assert [blade.tier.blocks.stat()["blocks"] for blade in rack.blades.values()] == [1, 0, 0, 0]


def test_a_block_moves_alone(rack: Rack) -> None:
    one = rack["mb0"].client()
    made = one.call("malloc", size=9 << 20, nodes=["mb0"])
    one.write(made["handle"], (4 << 20) - 2, b"seam")
    moved = one.call("move", handle=made["handle"], to=["mb2"], block=1)
    assert [block["node"] for block in moved["blocks"]] == ["mb0", "mb2", "mb0"]
    assert one.read(made["handle"], (4 << 20) - 3, 6) == b"\0seam\0"
    with pytest.raises(errors.BadArgument):
        one.call("move", handle=made["handle"], to=["mb2"], block=3)


def test_memset_and_copies_across_blocks_and_nodes(rack: Rack) -> None:
    one = rack["gm0"].client()
    size = 40960
    a = one.call("malloc", size=size, nodes=["mb0", "mb1"], spread=True)["handle"]
    b = one.call("malloc", size=size, nodes=["mb1", "mb2", "gm0"], spread=True)["handle"]
    model = bytearray(size)
    pattern = bytes(i % 251 for i in range(size))
    one.write(a, 0, pattern)
    one.call("memcpy", source=a, soffset=100, target=b, toffset=7000, length=30000)
    model[7000:37000] = pattern[100:30100]
    one.call("memset", handle=b, offset=12280, length=9000, byte=0xA5)
    model[12280:21280] = b"\xa5" * 9000
    for soffset, toffset, length in [(0, 5000, 30000), (9000, 1000, 31000), (100, 101, 20000), (3, 3, 10), (0, 0, 0)]:
        one.call("memmove", source=b, soffset=soffset, target=b, toffset=toffset, length=length)
        model[toffset : toffset + length] = bytes(model[soffset : soffset + length])
        assert one.read(b, 0, size) == bytes(model)
    with pytest.raises(errors.OutOfRange):
        one.call("memset", handle=a, offset=size - 1, length=2, byte=0)
    with pytest.raises(errors.BadArgument):
        one.call("memset", handle=a, offset=0, length=2, byte=256)


def test_memory_given_out_again_is_zero(rack: Rack) -> None:
    one = rack["mb0"].client()
    one.call("malloc", size=64)
    made = one.call("malloc", size=4096)
    one.write(made["handle"], 0, b"secret" * 600)
    one.call("free", handle=made["handle"])
    assert one.read(one.call("malloc", size=4096)["handle"], 0, 4096) == bytes(4096)


def test_a_dead_node_takes_only_what_was_there(rack: Rack) -> None:
    before = rack["mb0"].free
    one, other = rack["mb0"].client(), rack["mb2"].client()
    made = one.call("malloc", size=16384, name="half", nodes=["mb0", "mb1"], spread=True, permissions=ALL)
    theirs = rack["mb1"].client().call("malloc", size=4096, name="theirs", nodes=["mb0"], permissions=ALL)
    assert theirs["blocks"][0]["node"] == "mb0"
    mapped = other.call("map", name="half")["handle"]
    begun = time.monotonic()
    rack["mb1"].kill()
    eventually(lambda: _state(rack, "mb1") == "dead")
    assert time.monotonic() - begun < 2 * rack.timing.dead_after + 1
    eventually(lambda: _error(lambda: other.read(mapped, 10000, 1)) is errors.NodeDead)
    assert other.read(mapped, 0, 8192) == bytes(8192)
    eventually(lambda: _error(lambda: one.call("map", name="theirs")) is errors.NoSuchName)
    with pytest.raises(errors.NodeDead):
        one.call("malloc", size=1, nodes=["mb1"])
    one.call("free", handle=made["handle"])
    assert rack["mb0"].free == before


def test_a_new_life_does_not_answer_for_the_old(rack: Rack) -> None:
    one = rack["mb0"].client()
    made = one.call("malloc", size=8192, name="half", nodes=["mb0", "mb1"], spread=True, permissions=ALL)
    old = rack["mb1"].membership.incarnation
    fresh = rack.restart("mb1", 2)
    assert fresh.membership.incarnation is not None
    assert old is not None
    assert fresh.membership.incarnation > old
    again = fresh.client().call("malloc", size=4096, permissions=ALL)
    assert again["blocks"] == [{"node": "mb1", "length": 4096}]
    eventually(lambda: _error(lambda: one.read(made["handle"], 4096, 1)) is errors.NodeDead)
    assert one.read(made["handle"], 0, 1) == b"\0"
    mapped = fresh.client().call("map", name="half")["handle"]
    assert mapped


def test_a_blade_that_was_paused_begins_anew(rack: Rack, monkeypatch: pytest.MonkeyPatch) -> None:
    one, paused = rack["mb0"].client(), rack["mb1"].client()
    made = one.call("malloc", size=4096, name="box", permissions=ALL)
    mine = paused.call("malloc", size=4096, name="mine", permissions=ALL)
    mapped = paused.call("map", name="box")["handle"]
    paused.call("lock_create", name="door", home="mb0")
    paused.call("lock", name="door")
    life = rack["mb1"].membership.incarnation
    rack["mb1"].declare_dead()
    eventually(lambda: rack["mb1"].membership.incarnation != life and rack["mb1"].membership.joined.is_set())
    for handle in (mapped, mine["handle"]):
        with pytest.raises(errors.NodeDead):
            paused.read(handle, 0, 1)
    with pytest.raises(errors.NodeDead):
        paused.call("free", handle=mine["handle"])
    with pytest.raises(errors.NotHeld):
        paused.call("unlock", name="door")
    one.call("lock_create", name="door")
    one.call("lock", name="door", timeout_ms=5000)
    again = paused.call("map", name="box")["handle"]
    one.write(made["handle"], 0, b"new life")
    assert paused.read(again, 0, 8) == b"new life"
    paused.call("unmap", handle=mapped)
    paused.call("unmap", handle=mine["handle"])
    eventually(lambda: rack["mb1"].tier.blocks.stat()["blocks"] == 0)
    assert len(rack["mb1"].core.lmrs) == 1


def test_books_survive_a_restart_of_the_manager(rack: Rack) -> None:
    one, two = rack["mb0"].client(), rack["mb1"].client()
    made = one.call("malloc", size=12 << 10, name="box", nodes=["mb1", "mb2"], spread=True, permissions=ALL)
    kept = one.call("malloc", size=4096, name="kept", nodes=["mb2"], keep=True, permissions=ALL)
    one.call("unmap", handle=kept["handle"])
    mapped = two.call("map", name="box", permissions=R)["handle"]
    one.call("grant", handle=made["handle"], permissions=ADMIN, to="mb2")
    one.call("lock_create", name="door")
    one.call("lock", name="door")
    lives = {name: blade.membership.incarnation for name, blade in rack.blades.items() if name != "gm0"}
    rack.restart("gm0", 0)
    assert two.call("map", name="box", permissions=R)
    assert {name: blade.membership.incarnation for name, blade in rack.blades.items() if name != "gm0"} == lives
    with pytest.raises(errors.NameTaken):
        two.call("malloc", size=1, name="kept")
    assert rack["mb2"].client().call("map", name="box", permissions=ADMIN)
    again = two.call("map", name="kept")["handle"]
    two.call("free", handle=again)
    two.call("lock_create", name="door")
    with pytest.raises(errors.TimedOut):
        two.call("lock", name="door", timeout_ms=200)
    one.call("free", handle=made["handle"])
    with pytest.raises(errors.Freed):
        two.read(mapped, 0, 1)
    assert all(blade.tier.blocks.stat()["blocks"] == (blade.name == "mb0") for blade in rack.blades.values())


def test_what_ends_while_the_manager_is_away_is_settled_when_it_is_back(rack: Rack) -> None:
    before = rack["mb2"].free
    one = rack["mb0"].client()
    one.call("malloc", size=4096, name="box", nodes=["mb2"], permissions=ALL)
    rack["gm0"].kill()
    one.kill()
    eventually(lambda: not rack["mb0"].tier.clients.all())
    two = rack["mb1"].client()
    rack.restart("gm0", 0)
    eventually(lambda: rack["mb2"].free == before)
    with pytest.raises(errors.NoSuchName):
        two.call("map", name="box")


def _state(rack: Rack, name: str) -> str:
    manager = rack["gm0"].manager
    assert manager is not None
    return next(str(m["state"]) for m in manager.list({})["members"] if m["name"] == name)


def _error(action: object) -> type[BaseException] | None:
    assert callable(action)
    try:
        action()
    except errors.LiteError as failure:
        return type(failure)
    return None


def test_a_connection_that_is_being_made_ends_with_the_life_it_is_for() -> None:
    """A blade without power refuses nothing: it is silent, while one connects and while one says who one is."""
    with socket.socket() as full, socket.socket() as silent:
        for listening in (full, silent):
            listening.bind(("127.0.0.1", 0))
            listening.listen(0)
        with socket.create_connection(full.getsockname()):  # now its queue is full: nobody else gets an answer
            for listening in (full, silent):
                links = Links(b"s" * 32, lambda: None, lambda _life, to=listening: to.getsockname())  # type: ignore[misc]
                outcome: list[type[BaseException]] = []

                def ask(links: Links = links, outcome: list[type[BaseException]] = outcome) -> None:
                    try:
                        links.call(Life(3, 7), "lite.wake")
                    except errors.LiteError as failure:
                        outcome.append(type(failure))

                asking = threading.Thread(target=ask)
                asking.start()
                eventually(lambda links=links: links._opening)  # type: ignore[misc]
                time.sleep(0.1)
                assert asking.is_alive()
                links.end(3, 7)
                asking.join(5)
                assert outcome == [errors.NodeDead]
                assert not links._opening
