"""What Hotpot refuses, by which name, and that nothing committed is harmed by it; over stand-in verbs."""

from __future__ import annotations

import json
import os
import socket
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest_agents import lite
from guest_agents.hotpot import blocks
from guest_agents.hotpot.blocks import STRIDE, Copy
from guest_agents.hotpot.book import Book
from guest_agents.hotpot.errors import BadArgument, Corrupt, NoSpace, OldMedia, Retry, TooLarge
from guest_agents.hotpot.log import Log, State
from guest_agents.hotpot.media import Media
from guest_agents.hotpot.messages import pack, unpack
from guest_agents.hotpot.service import Service
from tests.unit import lite_pair
from tests.unit.hotpot_rack import Blade, Shell, rack, shells

pytestmark = pytest.mark.long

needs_lite = pytest.mark.skipif(lite_pair.missing() is not None, reason=str(lite_pair.missing()))
Rack = dict[str, Blade]
PAGE = 4096


@pytest.fixture(scope="module")
def blades(tmp_path_factory: pytest.TempPathFactory, lite_core: Path) -> Iterator[Rack]:
    with rack(tmp_path_factory.mktemp("hotpot"), lite_core, "gm0", "mb0", "mb1") as made:
        yield made


@pytest.fixture(scope="module")
def running(blades: Rack) -> Iterator[list[Shell]]:
    """Programs on mb0 and mb1."""
    with shells(blades["mb0"], blades["mb1"]) as made:
        yield made


@pytest.fixture
def programs(running: list[Shell]) -> Iterator[list[Shell]]:
    """They have `d` open, a dataset of four pages, where b"safe" is committed with two copies."""
    running[0].do(f"d = session.create('set', {4 * PAGE}, chunk={PAGE})")
    running[1].do("d = session.open('set')")
    running[0].do("d.memory[:4] = b'safe'\nd.commit((0, 4), replicas=2)")
    yield running
    for program in running:
        program.do("t = v = None")
        program.do("d.close()")
    running[0].do("session.delete('set')")


@needs_lite
@pytest.mark.parametrize(("text", "error"), [
    ("session.create('set', 4096)", "DatasetExists"),
    ("session.create('x', 0)", "BadArgument"),
    ("session.create('x', -1)", "BadArgument"),
    ("session.create('', 4096)", "BadArgument"),
    ("session.create('a/b', 4096)", "BadArgument"),
    ("session.create('x' * 129, 4096)", "BadArgument"),
    ("session.create('x', 4096, mode='mrxw')", "BadArgument"),
    ("session.create('x', 4096, chunk=5000)", "BadArgument"),
    ("session.create('x', 4096, owners=[77])", "NoSpace"),
    ("session.create('x', 1 << 39, chunk=4096)", "BadArgument"),
    ("session.create('x', 1 << 30)", "NoSpace"),
    ("session.create('x', 1 << 41, chunk=1 << 38)", "NoSpace"),
    ("session.open('y')", "NoSuchDataset"),
    ("session.open('set')", "BadArgument"),
    ("session.delete('y')", "NoSuchDataset"),
    ("session.delete('set')", "DatasetBusy"),
    ("d.commit()", "BadArgument"),
    ("d.commit((0, 0))", "BadArgument"),
    ("d.commit((0, 1.5))", "BadArgument"),
    ("d.commit((0, 1, 2))", "BadArgument"),
    ("d.commit(('a', True))", "BadArgument"),
    ("d.commit((-1, 4))", "NotMapped"),
    ("d.commit((16380, 8))", "NotMapped"),
    ("d.commit((0, 8), (4, 8))", "Overlap"),
    ("d.commit((0, 8), replicas=0)", "BadArgument"),
    ("d.commit((0, 8), replicas=True)", "BadArgument"),
    ("d.memory[0] = 1\nd.commit((0, 8), replicas=9)", "TooFewNodes"),
    ("with d.transaction(): pass", "BadArgument"),
    ("with d.transaction() as t: t.acquire(4095, 9); t.acquire(4100, 1)", "Overlap"),
    ("with d.transaction() as t: t.acquire(1 << 40, 9)", "NotMapped"),
    ("d.memory[0] = 1\nwith d.transaction() as t: t.acquire(10, 9)", "NotClean"),
    ("with d.transaction() as t: t.acquire(10, 9); d.discard((0, 1))", "NotClean"),
    ("t = d.transaction()\nt.abort()\nt.commit()", "NoSuchTransaction"),
    ("with d.transaction(replicas=9) as t: t.acquire(0, 4)[:] = b'lost'", "TooFewNodes"),
    ("v = d.memory[:9]\nd.close()", "ViewsInUse"),
    ("session.ask('commit')", "BadArgument"),
    ("session.ask('commit', xid=1, replicas=1)", "NoSuchTransaction"),
    ("session.ask('nonsense')", "BadArgument"),
    ("session.ask('begin', dataset=99)", "NotMapped"),
    ("hotpot.connect('/nowhere')", "NotJoined"),
])  # fmt: skip
def test_refused(programs: list[Shell], text: str, error: str) -> None:
    assert programs[0].refused(text).split(":")[0] == error
    programs[0].do("t = None\nd.discard((0, d.size))")
    for program in programs:
        assert program.do("bytes(d.memory[:5])") == b"safe\0"
    assert [about["name"] for about in programs[1].do("session.datasets()")] == ["set"]
    programs[0].do("d.run(lambda t: t.acquire(4, 1).__setitem__(0, 7), replicas=2)")
    assert programs[1].do("bytes(d.memory[:5])") == b"safe\7"


@needs_lite
def test_a_commit_larger_than_a_message_is_refused_as_a_whole(running: list[Shell]) -> None:
    running[0].do("d = session.create('large', 3 << 20, chunk=2 << 20, owners=[1, 2])")
    running[0].do("d.memory[:] = b'x' * d.size")
    assert running[0].refused("d.commit((0, d.size))").startswith("TooLarge")
    running[1].do("d = session.open('large')")
    assert running[1].do("any(d.memory)") is False
    running[0].do("for at in range(0, d.size, 1 << 19): d.commit((at, 1 << 19), replicas=2)")
    assert running[1].do("bytes(d.memory) == b'x' * d.size")
    for program in running:
        program.do("d.close()")
    running[0].do("session.delete('large')")


@needs_lite
def test_a_closed_dataset_is_refused(running: list[Shell]) -> None:
    running[0].do("d = session.create('shut', 4096)\nd.close()")
    for text in ("d.transaction()", "d.commit((0, 1))", "d.discard((0, 1))"):
        assert running[0].refused(text).startswith("NotMapped")
    running[0].do("session.delete('shut')")


@needs_lite
def test_corrupt_media_are_found_and_not_used(blades: Rack, programs: list[Shell]) -> None:
    home = blades["gm0"].service.owner.homes()[0]
    assert home.record.owner(0) == 1
    good = home.media.read(0, 1)
    home.media.write(0, b"?")
    answer = programs[0].refused("d.memory[4] = 1\nd.commit((4, 1))")
    assert answer.startswith("Corrupt")
    assert "page 0 of set" in answer
    home.media.write(0, good)
    programs[0].do("d.commit((4, 1))")
    assert programs[1].do("bytes(d.memory[:5])") == b"safe\1"


@needs_lite
def test_a_corrupt_copy_is_not_used(blades: Rack, programs: list[Shell]) -> None:
    programs[0].do("d.memory[4096:4100] = b'more'\nd.commit((4096, 4), replicas=3)")
    number = blades["gm0"].service.owner.homes()[0].record.id
    [media] = [store.media for key, store in blades["mb1"].service.copies._stores.items() if key == number]
    media.write(STRIDE, b"?")
    assert programs[1].do("bytes(d.memory[4096:4100])") == b"more"


@needs_lite
def test_a_program_of_another_version_is_refused(blades: Rack) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as program:
        program.connect(str(blades["mb0"].socket))
        program.send(json.dumps({"op": "hello", "settings": {"protocol": 7}}).encode())
        assert json.loads(program.recv(9999))["error"] == "VersionMismatch"
        for packet in (b"nonsense", b"[]", b'{"op": 5}', b'{"op": "hello"}'):
            program.send(packet)
            assert json.loads(program.recv(9999))["error"] == "BadArgument"


@needs_lite
def test_the_process_of_the_service_cannot_map(blades: Rack) -> None:
    """It would wait for itself."""
    from guest_agents import hotpot

    with pytest.raises(BadArgument):
        hotpot.connect(str(blades["mb0"].socket))


@needs_lite
def test_media_of_somebody_else_are_refused_and_left_alone(blades: Rack, tmp_path: Path) -> None:
    (tmp_path / "home-1").write_bytes(b"precious")
    with pytest.raises(OldMedia):
        Service(blades["mb0"].service.node, tmp_path, 1)
    assert (tmp_path / "home-1").read_bytes() == b"precious"


def test_a_corrupt_log_record_is_found_and_not_used(tmp_path: Path) -> None:
    media = Media(tmp_path / "log", 65536)
    log = Log(media)
    decided, torn, whole = (log.append(xid, State.PREPARED, bytes([xid]) * 5000) for xid in (7, 8, 9))
    log.set_state(decided, State.COMMITTED)
    for place in (decided, torn):
        media.write(place + 4500, b"?")
    again = Log(media)
    assert [kept.xid for kept in again.found] == [9]
    assert [kept.place for kept in again.found] == [whole]
    assert again.corrupt == ["log: the record of transaction 7 is corrupt"], "the other's writing was interrupted"
    assert again.append(10, State.NOW, b"z" * 5000) == decided
    media.write(0, b"?")
    with pytest.raises(Corrupt, match="log"):
        Log(media)


def test_what_a_program_commits_is_never_taken_for_a_log_record(tmp_path: Path) -> None:
    media = Media(tmp_path / "log", 65536)
    log = Log(media)
    log.drop(log.append(1, State.COMMITTED, b""))
    forged = media.read(4096, 4096)[:8] + bytes([State.COMMITTED]) + media.read(4096, 4096)[9:]
    outer = log.append(2, State.NOW, bytes(4064) + forged)
    log.drop(outer)
    assert Log(media).found == []


def test_a_book_has_always_a_whole_page(tmp_path: Path) -> None:
    media = Media(tmp_path / "book", 8192)
    assert Book(media).document is None
    book = Book(media)
    book.save({"a": 1})
    book.save({"a": 2})
    with pytest.raises(NoSpace):
        book.save({"a": "x" * 8192})
    assert Book(media).document == {"a": 2}
    media.write(28, b"?")
    assert Book(media).document == {"a": 1}
    assert Book(media).damaged
    media.write(4096 + 28, b"?")
    with pytest.raises(Corrupt, match="book"):
        Book(media)


@needs_lite
def test_services_refuse_nonsense(blades: Rack) -> None:
    node = blades["mb0"].service.node
    for message in (b"", b"\xff\xff\xff\xff", pack({"op": "fly"}), pack({}), b"\2\0\0\0[]"):
        for port in (60, 61):
            reply, _ = unpack(node.call("gm0", port, message))
            assert reply["error"] == "BadArgument"
    reply, _ = unpack(node.call("gm0", 61, pack({"op": "register", "settings": {}})))
    assert reply["error"] == "VersionMismatch"
    assert isinstance(node, lite.Node)


def test_a_page_is_only_what_has_its_checksum() -> None:
    assert blocks.unseal(bytes(STRIDE)) == Copy(0, bytes(PAGE))
    copy = Copy(7, os.urandom(PAGE))
    block = blocks.seal(copy)
    assert (len(block), blocks.unseal(block)) == (STRIDE, copy)
    for place in (0, PAGE - 1, PAGE, PAGE + 8):
        with pytest.raises(Corrupt):
            blocks.unseal(block[:place] + bytes([block[place] ^ 1]) + block[place + 1 :])
    other = blocks.seal(Copy(8, os.urandom(PAGE)))
    with pytest.raises(Corrupt):
        blocks.unseal(block[:1024] + other[1024:])


def test_log_records_live_until_they_are_dropped(tmp_path: Path) -> None:
    media = Media(tmp_path / "log", 4096 + 16384)
    log = Log(media)
    first = log.append(1, State.PREPARED, b"a" * 5000)
    second = log.append(2, State.COMMITTED, b"b")
    log.set_state(first, State.COMMITTED)
    assert sorted(log.records()) == [(1, State.COMMITTED), (2, State.COMMITTED)]
    with pytest.raises(Retry):
        log.append(3, State.PREPARED, b"c" * 5000)
    with pytest.raises(TooLarge):
        log.append(3, State.PREPARED, b"c" * 16384)
    log.drop(first)
    third = log.append(3, State.PREPARED, b"c" * 5000)
    assert sorted(log.records()) == [(2, State.COMMITTED), (3, State.PREPARED)]
    again = Log(media)
    assert [(kept.xid, kept.state, kept.body) for kept in sorted(again.found, key=lambda kept: kept.xid)] == [
        (2, State.COMMITTED, b"b"), (3, State.PREPARED, b"c" * 5000)]  # fmt: skip
    assert (again.used, again.corrupt) == (log.used, [])
    log.drop(second)
    log.drop(third)
    assert (log.records(), log.used) == ([], 0)
    log.close()


def test_media_that_are_full_say_so(tmp_path: Path) -> None:
    with pytest.raises(NoSpace):
        Media(tmp_path / "media", 1 << 60)
    assert not (tmp_path / "media").exists()


def test_half_a_page_of_records_that_have_checksums_themselves_is_found() -> None:
    """A CRC of the page would not: to replace one record with its CRC by another leaves it as it is."""
    def page(count: int) -> bytes:
        record = struct.pack("<QQ", count, 7)
        return (record + zlib.crc32(record).to_bytes(4, "little")).ljust(64, b"\0") * 64

    old, new = (blocks.seal(blocks.Copy(5, page(count), 9, 2)) for count in (1, 2))
    assert blocks.unseal(new).data == page(2)
    with pytest.raises(Corrupt):
        blocks.unseal(new[:2048] + old[2048:4096] + new[4096:])
