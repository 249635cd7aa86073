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
        self._socket.sendall(json.dumps({**message, "id": mark}).encode() + b"\n")
        while True:
            reply = json.loads(self._line(deadline) or "null")
            if isinstance(reply, dict) and reply.pop("id", None) == mark:
                break
        if not reply.pop("ok", False):
            raise RacklessError(f"{self._blade}: {reply.get('error')}", hint=reply.get("hint"))
        return reply

    def _line(self, deadline: float) -> bytes:
        while b"\n" not in self._buffer:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                chunk = self._socket.recv(1 << 16)
            except TimeoutError:
                raise RacklessError(
                    f"{self._blade} does not answer", hint="its console may tell why"
                ) from None
            if not chunk:
                raise RacklessError(f"{self._blade} went away", hint="its console may tell why")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line


@contextmanager
def open_channel(path: Path, blade: str, deadline: float) -> Iterator[Channel]:
    """Connect to the blade's channel; waits for QEMU to make the socket until ``deadline`` (time.monotonic)."""
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(path))
            break
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            if time.monotonic() > deadline:
                raise RacklessError(f"{blade} has no provisioning channel at {path}") from None
            time.sleep(_RETRY_SECONDS)
    with connection:
        yield Channel(connection, blade)
