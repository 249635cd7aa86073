"""The channel by which the host reaches a blade that has no address yet: a virtio port, JSON lines.

Requests ``{"op": "hello"}`` and ``{"op": "identify", ...identity}``; each gets one reply,
``{"ok": true, ...}`` or ``{"ok": false, "error", "hint"}``. Everything later goes over the control channel.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from guest_agents import control, version

PORT_NAME = "rackless.agent"
_POLL_FRESH = 0.05  # seconds between looks at a port that nobody holds open, in a blade that waits for its identity
_POLL_KNOWN = 1.0


def serve(identify: Callable[[dict[str, Any]], dict[str, Any]], identified: bool = False) -> None:
    """Answer the host for ever. ``identify`` gets the identity and returns the fields of the reply.

    identified -- the agent was started anew in a blade that has its identity
    """
    port = os.open(_device(), os.O_RDWR)
    state = {"identified": identified}

    def hello(_request: dict[str, Any]) -> dict[str, Any]:
        return {"version": version.VERSION, "identified": state["identified"], "uptime": time.monotonic()}

    def take(request: dict[str, Any]) -> dict[str, Any]:
        reply = identify(request)
        state["identified"] = True
        return reply

    handlers: dict[str, control.Handler] = {"hello": hello, "identify": take}
    for line in _lines(port, lambda: _POLL_KNOWN if state["identified"] else _POLL_FRESH):
        try:
            request = json.loads(line)
        except ValueError:
            continue  # half a line of a host that went away in the middle of it
        if not isinstance(request, dict):
            continue
        reply = control.dispatch(handlers, request)
        os.write(port, json.dumps({**reply, "id": request.get("id")}).encode() + b"\n")


def _lines(port: int, pause: Callable[[], float]) -> Iterator[bytes]:
    """Lines from the port. While no host holds it open, reads return nothing at once: look after a pause."""
    buffer = b""
    while True:
        chunk = os.read(port, 1 << 16)
        if not chunk:
            buffer = b""
            time.sleep(pause())
            continue
        *lines, buffer = (buffer + chunk).split(b"\n")
        yield from lines


def _device() -> Path:
    while True:
        for name in Path("/sys/class/virtio-ports").glob("*/name"):
            if name.read_text().strip() == PORT_NAME:
                return Path("/dev") / name.parent.name
        time.sleep(_POLL_FRESH)
