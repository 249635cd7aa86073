"""One thread's connection to the agent of its blade: control messages, and the data channel that comes with it."""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from typing import Any

from guest_agents.lite.channel import Channel, Regions
from guest_agents.lite.errors import BadMessage, NotJoined, from_reply

SOCKET = "/run/rackless/lite.sock"
"""Where the agent listens; the environment variable RACKLESS_LITE names another place."""

MAX_REPLY = 256 << 10

Message = dict[str, Any]


class Connection:
    """A control socket (one request at a time) and its data channel. Not for use by two threads at once."""

    def __init__(self, path: str, token: str | None, regions: Regions) -> None:
        """Connect and say hello. `token` makes this one more connection of a process that has one.

        regions -- the registered buffers of the process. NotJoined when no agent with LITE listens.
        """
        self._unread = 0
        self._pid = os.getpid()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            try:
                self._socket.connect(path)
            except OSError as failure:
                raise NotJoined(
                    f"no LITE at {path}: {failure.strerror}",
                    hint="is this a blade of a rack, and its agent running? see `rackless status`",
                ) from None
            self.about, descriptor = self.call_for_descriptor("hello", **({} if token is None else {"token": token}))
        except BaseException:
            self._socket.close()
            raise
        self.channel = Channel(socket.socket(fileno=descriptor), regions)

    def call(self, op: str, **fields: Any) -> Message:
        """One control request; the reply's fields. The error that the agent names is raised."""
        reply, descriptors = self._exchange({"op": op, **fields})
        for descriptor in descriptors:
            os.close(descriptor)
        return reply

    def call_for_descriptor(self, op: str, **fields: Any) -> tuple[Message, int]:
        """A control request whose reply brings an open file."""
        reply, descriptors = self._exchange({"op": op, **fields})
        if len(descriptors) != 1:
            for descriptor in descriptors:
                os.close(descriptor)
            raise BadMessage(f"{op} brought {len(descriptors)} descriptors instead of 1")
        return reply, descriptors[0]

    def close(self) -> None:
        """Let the agent know that this thread is done; what it had in flight ends first."""
        with suppress(OSError):
            self.channel.close()
        self._socket.close()

    def interrupt(self) -> None:
        """From another thread: whoever waits here gets NotJoined."""
        with suppress(OSError):
            self.channel.interrupt()
            self._socket.shutdown(socket.SHUT_RDWR)

    def abandon(self) -> None:
        """Drop a connection that a fork copied, without a word: it is the parent's."""
        self.channel.abandon()
        self._socket.close()

    def __del__(self) -> None:  # a thread has ended
        if not hasattr(self, "channel"):
            return
        if self._pid == os.getpid():
            self.close()
        else:  # garbage of the parent, which the collector has found after a fork
            self.abandon()

    def _exchange(self, request: Message) -> tuple[Message, list[int]]:
        try:
            self._socket.send(json.dumps(request).encode())
            self._unread += 1
            while True:
                packet, descriptors, _flags, _from = socket.recv_fds(self._socket, MAX_REPLY, 1)
                self._unread -= 1
                if not self._unread:
                    break
                for descriptor in descriptors:  # the reply to a request whose wait was interrupted
                    os.close(descriptor)
        except OSError as failure:
            raise _gone() from failure
        if not packet:
            raise _gone()
        try:
            reply = json.loads(packet)
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict):
            raise BadMessage(f"the agent answered {packet[:60]!r}")
        if not reply.pop("ok", False):
            raise from_reply(reply)
        return reply, descriptors


def _gone() -> NotJoined:
    return NotJoined("the agent has closed the connection", hint="it was restarted or has died; connect again")
