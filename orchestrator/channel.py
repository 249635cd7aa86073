"""The host's end of a blade's provisioning channel: a Unix socket that QEMU joins to a port in the blade.

It works before the blade has an address; see guest_agents/provision.py for the messages.
"""

from __future__ import annotations

import json
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator.errors import RacklessError

_RETRY_SECONDS = 0.05


class Channel:
    """One open channel; requests are answered one at a time."""

    def __init__(self, connection: socket.socket, blade: str) -> None:
        self._socket = connection
        self._blade = blade
        self._buffer = b""

    def request(self, message: dict[str, Any], deadline: float) -> dict[str, Any]:
        """Send ``message``, return the reply's fields. RacklessError when refused or after ``deadline``."""
        mark = uuid.uuid4().hex  # tells the reply from one that an earlier, interrupted host asked for
        try:
            self._wait_until(deadline)
            self._socket.sendall(json.dumps({**message, "id": mark}).encode() + b"\n")
            reply = self._reply(mark, deadline)
        except TimeoutError:
            raise RacklessError(f"{self._blade} does not answer", hint="its console may tell why") from None
        except (OSError, EOFError):
            raise RacklessError(f"{self._blade} went away", hint="its console may tell why") from None
        if not reply.pop("ok", False):
            raise RacklessError(f"{self._blade}: {reply.get('error')}", hint=reply.get("hint"))
        return reply

    def _reply(self, mark: str, deadline: float) -> dict[str, Any]:
        while True:
            line = self._line(deadline)
            try:
                reply = json.loads(line)
            except ValueError:
                continue  # the rest of a line that an earlier host read half of
            if isinstance(reply, dict) and reply.pop("id", None) == mark:
                return reply

    def _line(self, deadline: float) -> bytes:
        while b"\n" not in self._buffer:
            self._wait_until(deadline)
            chunk = self._socket.recv(1 << 16)
            if not chunk:
                raise EOFError
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _wait_until(self, deadline: float) -> None:
        self._socket.settimeout(max(0.001, deadline - time.monotonic()))


@contextmanager
def open_channel(path: Path, blade: str, deadline: float) -> Iterator[Channel]:
    """Connect to the blade's channel; QEMU has until ``deadline`` (time.monotonic) to make the socket."""
    while True:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            connection.connect(str(path))
            break
        # Not there yet, nobody listens yet, or an earlier host is still being served.
        except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
            connection.close()
            if time.monotonic() > deadline:
                raise RacklessError(f"{blade} has no provisioning channel at {path}") from None
            time.sleep(_RETRY_SECONDS)
    with connection:
        yield Channel(connection, blade)
