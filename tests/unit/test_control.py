"""The control channel: framing, authentication, errors, clean-up. No VM."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from guest_agents import control

SECRET = b"s" * 32


def _boom(request: dict[str, Any]) -> dict[str, Any]:
    raise ValueError("two\nlines")


def _slow(request: dict[str, Any]) -> dict[str, Any]:
    time.sleep(2)
    return {}


def _coded(request: dict[str, Any]) -> dict[str, Any]:
    raise control.ControlError("no such name", None, -7)


def _refuse(request: dict[str, Any]) -> dict[str, Any]:
    raise control.ControlError("no", "try less")


class Gone(threading.Event):
    """Set once the client that asked `watch` has disconnected."""

    def watch(self, request: dict[str, Any]) -> dict[str, Any]:
        peer = control.current_peer()
        assert peer is not None
        peer.on_close(self.set)
        return {}


@pytest.fixture
def gone() -> Gone:
    return Gone()


@pytest.fixture
def server(gone: Gone) -> Iterator[control.Server]:
    handlers = {
        "echo": lambda request: {"text": request["text"]},
        "boom": _boom,
        "refuse": _refuse,
        "slow": _slow,
        "coded": _coded,
        "watch": gone.watch,
    }
    with control.Server(("127.0.0.1", 0), SECRET, handlers).start() as running:
        yield running


def test_many_requests_on_one_connection(server: control.Server) -> None:
    with control.ControlClient(server.address, SECRET) as client:
        for number in range(20):
            assert client.call("echo", text=f"é{number}") == {"text": f"é{number}"}


@pytest.mark.parametrize(
    ("op", "error", "hint"),
    [
        ("boom", "boom: ValueError: two lines", None),
        ("refuse", "no", "try less"),
        ("echo", "echo: field 'text' is missing", None),
        ("none", "unknown operation 'none'", "this agent knows: boom, coded, echo, refuse, slow, watch"),
    ],
)
def test_errors_are_replies(server: control.Server, op: str, error: str, hint: str | None) -> None:
    with control.ControlClient(server.address, SECRET) as client:
        with pytest.raises(control.ControlError) as caught:
            client.call(op)
        assert (caught.value.error, caught.value.hint) == (error, hint)
        assert client.call("echo", text="still here") == {"text": "still here"}


def test_wrong_secret(server: control.Server) -> None:
    with pytest.raises(control.ControlError, match="another secret"):
        control.call(server.address, b"x" * 32, "echo", text="")


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = taken.getsockname()
    with pytest.raises(control.ControlError, match="no agent answers"):
        control.call(address, SECRET, "echo", text="")


def test_a_silent_client_does_not_stop_others(server: control.Server) -> None:
    with socket.create_connection(server.address):
        assert control.call(server.address, SECRET, "echo", text="x") == {"text": "x"}


def test_a_silent_server_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(control.ControlError):
        control.ControlClient(silent.getsockname(), SECRET, timeout=0.3)


def test_no_reply_in_time(server: control.Server) -> None:
    client = control.ControlClient(server.address, SECRET)
    with pytest.raises(control.ControlError, match="no reply"):
        client.call("slow", timeout=0.2)
    with pytest.raises(control.ControlError):
        client.call("echo", text="a late reply must not answer this")


def test_a_request_that_another_thread_waits_for_can_be_ended(server: control.Server) -> None:
    client = control.ControlClient(server.address, SECRET)
    threading.Timer(0.2, client.abort).start()
    begun = time.monotonic()
    with pytest.raises(control.LostError, match="has gone"):
        client.call("slow")
    assert time.monotonic() - begun < 1
    client.close()
    client.abort()


def test_a_connection_that_was_closed_over_there_is_stale(server: control.Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            plain, _ = listener.accept()
            control._authenticated(plain, SECRET, server=True).close()

        threading.Thread(target=serve).start()
        client = control.ControlClient(listener.getsockname(), SECRET)
        time.sleep(0.2)
        assert client.stale()
    client = control.ControlClient(server.address, SECRET)
    assert not client.stale()
    client.close()
    assert client.stale()


def test_codes_of_errors_arrive(server: control.Server) -> None:
    with control.ControlClient(server.address, SECRET) as client:
        with pytest.raises(control.ControlError) as caught:
            client.call("coded")
        assert caught.value.code == -7
        with pytest.raises(control.ControlError) as caught:
            client.call("refuse")
        assert caught.value.code is None


def test_a_dead_client_is_noticed(server: control.Server, gone: Gone) -> None:
    with control.ControlClient(server.address, SECRET) as client:
        client.call("watch")
        assert not gone.is_set()
    assert gone.wait(5)


@pytest.mark.parametrize(
    "junk", [b"", b"\x00", b"\xff" * 64, b"\x7f\xff\xff\xff" + b"a" * 100, b"GET / HTTP/1.1\r\n\r\n"]
)
def test_junk_is_survived(server: control.Server, junk: bytes) -> None:
    with socket.create_connection(server.address) as client:
        client.sendall(junk)
    assert control.call(server.address, SECRET, "echo", text="alive") == {"text": "alive"}
