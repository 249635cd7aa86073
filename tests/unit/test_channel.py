"""The host's end of the provisioning channel, against a socket that plays QEMU."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from orchestrator.channel import open_channel
from orchestrator.errors import RacklessError

Script = Callable[[socket.socket, dict[str, Any]], None]


class Qemu:
    """A listening socket; each connection gets one request, which the script answers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.script: Script = reply(ok=True)
        self.requests: list[dict[str, Any]] = []
        self.greeting = b""
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen(1)
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            with suppress(BrokenPipeError), client, client.makefile("rb") as lines:
                client.sendall(self.greeting)
                for line in lines:
                    self.requests.append(json.loads(line))
                    self.script(client, self.requests[-1])

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def line(message: object) -> bytes:
    return json.dumps(message).encode() + b"\n"


def reply(**fields: Any) -> Script:
    return lambda client, request: client.sendall(line({**fields, "id": request["id"]}))


@pytest.fixture
def qemu(tmp_path: Path) -> Iterator[Qemu]:
    running = Qemu(tmp_path / "agent")
    yield running
    running.close()


def ask(path: Path, seconds: float = 5.0, **fields: Any) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    with open_channel(path, "mb0", deadline) as channel:
        return channel.request({"op": "hello", **fields}, deadline)


def test_a_reply(qemu: Qemu) -> None:
    qemu.script = reply(ok=True, version="1", identified=False)
    assert ask(qemu.path, name="é") == {"version": "1", "identified": False}
    assert qemu.requests[0]["op"] == "hello"
    assert qemu.requests[0]["name"] == "é"


def test_several_requests_on_one_channel(qemu: Qemu) -> None:
    qemu.script = lambda client, request: reply(ok=True, number=request["number"])(client, request)
    deadline = time.monotonic() + 5
    with open_channel(qemu.path, "mb0", deadline) as channel:
        answers = [channel.request({"op": "x", "number": n}, deadline)["number"] for n in range(5)]
    assert answers == [0, 1, 2, 3, 4]
    assert len({request["id"] for request in qemu.requests}) == 5


def test_a_refusal(qemu: Qemu) -> None:
    qemu.script = reply(ok=False, error="no disk", hint="plug one in")
    with pytest.raises(RacklessError) as caught:
        ask(qemu.path)
    assert (caught.value.message, caught.value.hint) == ("mb0: no disk", "plug one in")


@pytest.mark.parametrize(
    "noise",
    [
        line({"ok": True, "id": "of an earlier host", "version": "stale"}),
        line({"ok": False, "error": "stale", "id": None}),
        b'rsion": "1", "id": "x"}\n',  # an earlier host read the first half of this line
        b"\n\n",
        b"\xff\xfe garbage\n",
        b"null\n7\n[]\n",
        line({"ok": False, "error": "stale", "id": "x"}) * 3000,
    ],
    ids=["stale", "stale refusal", "half a line", "empty lines", "garbage", "no objects", "a lot"],
)
def test_what_earlier_hosts_left_is_skipped(qemu: Qemu, noise: bytes) -> None:
    qemu.greeting = noise
    qemu.script = reply(ok=True, version="fresh")
    assert ask(qemu.path) == {"version": "fresh"}


def test_a_reply_in_pieces(qemu: Qemu) -> None:
    def in_pieces(client: socket.socket, request: dict[str, Any]) -> None:
        for byte in line({"ok": True, "text": "é" * 20, "id": request["id"]}):
            client.sendall(bytes([byte]))

    qemu.script = in_pieces
    assert ask(qemu.path) == {"text": "é" * 20}


def test_a_large_reply(qemu: Qemu) -> None:
    qemu.script = reply(ok=True, text="x" * 500_000)
    assert len(ask(qemu.path)["text"]) == 500_000


def _close(client: socket.socket, _request: dict[str, Any]) -> None:
    client.shutdown(socket.SHUT_RDWR)


def _half_and_close(client: socket.socket, request: dict[str, Any]) -> None:
    client.sendall(line({"ok": True, "id": request["id"]})[:-9])
    client.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("script", [_close, _half_and_close])
def test_a_blade_that_dies(qemu: Qemu, script: Script) -> None:
    qemu.script = script
    with pytest.raises(RacklessError, match="mb0 went away"):
        ask(qemu.path)


def test_a_blade_that_dies_before_it_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "agent"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(1)
        deadline = time.monotonic() + 5
        with open_channel(path, "mb0", deadline) as channel:
            listening.accept()[0].close()
            with pytest.raises(RacklessError, match="mb0 went away"):
                channel.request({"op": "hello", "much": "x" * 1_000_000}, deadline)


def test_a_silent_blade(qemu: Qemu) -> None:
    qemu.script = lambda _client, _request: None
    started = time.monotonic()
    with pytest.raises(RacklessError, match="mb0 does not answer"):
        ask(qemu.path, seconds=0.3)
    assert 0.3 <= time.monotonic() - started < 3


def test_a_blade_that_only_talks_about_something_else(qemu: Qemu) -> None:
    def chatter(client: socket.socket, _request: dict[str, Any]) -> None:
        for _ in range(50):
            client.sendall(line({"id": "other"}))
            time.sleep(0.02)

    qemu.script = chatter
    started = time.monotonic()
    with pytest.raises(RacklessError):
        ask(qemu.path, seconds=0.3)
    assert time.monotonic() - started < 3


def test_a_blade_that_does_not_read(tmp_path: Path) -> None:
    path = tmp_path / "agent"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(1)
        with pytest.raises(RacklessError, match="does not answer"):
            ask(path, seconds=0.3, much="x" * 5_000_000)


def test_a_socket_that_comes_late(tmp_path: Path) -> None:
    late: list[Qemu] = []
    timer = threading.Timer(0.3, lambda: late.append(Qemu(tmp_path / "agent")))
    timer.start()
    assert ask(tmp_path / "agent") == {}
    timer.join()
    late[0].close()


def test_a_socket_that_never_comes(tmp_path: Path) -> None:
    with pytest.raises(RacklessError, match="mb0 has no provisioning channel"):
        ask(tmp_path / "agent", seconds=0.2)


def test_a_socket_nobody_listens_on(tmp_path: Path) -> None:
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(tmp_path / "agent"))
    dead.close()
    with pytest.raises(RacklessError, match="mb0 has no provisioning channel"):
        ask(tmp_path / "agent", seconds=0.2)


def test_a_channel_that_another_host_keeps(tmp_path: Path) -> None:
    """QEMU serves one host at a time; the next ones wait in its backlog, which holds one."""
    path = tmp_path / "agent"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(0)
        others = [socket.socket(socket.AF_UNIX) for _ in range(3)]
        for other in others:
            other.setblocking(False)
            try:
                other.connect(str(path))
            except BlockingIOError:
                break
        started = time.monotonic()
        with pytest.raises(RacklessError):
            ask(path, seconds=0.3)
        assert time.monotonic() - started < 3
        for other in others:
            other.close()
