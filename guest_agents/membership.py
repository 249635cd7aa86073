"""Who is in the rack: the manager blade keeps the list, every agent joins it over the fabric and beats.

LITE's cluster manager hands out ids but knows no heartbeat (lite-and-hotpot.md, 1.2); here a silent member is
shown as ``silent`` after five missed beats. The control channel's handshake keeps strangers out.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from guest_agents import control
from guest_agents.control import Message

HEARTBEAT_SECONDS = 2.0
SILENT_AFTER_SECONDS = 5 * HEARTBEAT_SECONDS  # a blade without KVM may well be busy for some seconds
_RETRY_SECONDS = 0.2

log = logging.getLogger("rackless.membership")


@dataclass
class Member:
    """A blade that has joined."""

    node_id: int
    name: str
    kind: str
    address: str  # on the fabric
    management: str
    seen: float = field(default_factory=time.monotonic)

    def describe(self) -> Message:
        """What others are told of it."""
        silent = time.monotonic() - self.seen > SILENT_AFTER_SECONDS
        return {"node_id": self.node_id, "name": self.name, "kind": self.kind, "address": self.address,
                "management": self.management, "state": "silent" if silent else "alive"}  # fmt: skip


class Manager:
    """The list of members, on the manager blade."""

    def __init__(self, own: Message) -> None:
        """``own`` is this blade's join request: it is always the first member, also after a restart."""
        self._members: dict[str, Member] = {}
        self._lock = threading.Lock()
        self.join(own)

    def handlers(self) -> dict[str, control.Handler]:
        """Control operations ``member.join``, ``member.beat``, ``member.list``."""
        return {"member.join": self.join, "member.beat": self.beat, "member.list": self.list}

    def join(self, request: Message) -> Message:
        """A blade joins, or joins again after a restart of itself or of this manager: then it keeps its id."""
        name = request["name"]
        with self._lock:
            known = self._members.get(name)
            used = {m.node_id for m in self._members.values()}
            before = request.get("node_id")  # a restarted manager learns the ids it gave from their holders
            wanted = [before] if before else []
            free = next(n for n in (*wanted, *range(1, len(used) + 2)) if n not in used)
            node_id = known.node_id if known else free
            self._members[name] = Member(node_id, name, request["kind"], request["address"], request["management"])
        log.info("%s joined as node %d", name, node_id)
        return {"node_id": node_id, **self.list(request)}

    def beat(self, request: Message) -> Message:
        """A member is alive. ``known`` false asks it to join anew (this manager was restarted)."""
        with self._lock:
            member = self._members.get(request["name"])
            if member is not None:
                member.seen = time.monotonic()
        return {"known": member is not None, **self.list(request)}

    def list(self, _request: Message) -> Message:
        """All members."""
        with self._lock:
            return {"members": [m.describe() for m in sorted(self._members.values(), key=lambda m: m.node_id)]}


class Membership:
    """A blade's side: joins, keeps joined, knows the others."""

    def __init__(self, manager: tuple[str, int], secret: bytes, about: dict[str, Any]) -> None:
        self._manager = manager
        self._secret = secret
        self._about = about
        self.joined = threading.Event()
        self.node_id: int | None = None
        self.members: list[Message] = []
        self._client: control.ControlClient | None = None

    def start(self) -> None:
        """Join and keep joined in a thread of its own."""
        threading.Thread(target=self._run, name="membership", daemon=True).start()

    def of_kind(self, kind: str) -> list[Message]:
        """The members of a kind that are alive, by node id: as the manager says now, or last said if it is silent."""
        client = self._client
        if client is not None:
            with suppress(control.ControlError):
                self.members = client.call("member.list", SILENT_AFTER_SECONDS)["members"]
        return [m for m in self.members if m["kind"] == kind and m["state"] == "alive"]

    def _run(self) -> None:
        while True:
            try:
                with control.ControlClient(self._manager, self._secret, SILENT_AFTER_SECONDS) as client:
                    self._client = client
                    self._stay(client)
            except control.ControlError as error:
                if self.joined.is_set():
                    log.warning("lost the manager: %s", error)
                self.joined.clear()
                time.sleep(_RETRY_SECONDS)

    def _stay(self, client: control.ControlClient) -> None:
        known = False
        while True:
            op = "member.beat" if known else "member.join"
            reply = client.call(op, **self._about, node_id=self.node_id)
            self.members = reply["members"]
            if not known:
                self.node_id = reply["node_id"]
            known = reply.get("known", True)
            if known:
                if not self.joined.is_set():
                    log.info("joined as node %d", self.node_id)
                self.joined.set()
                time.sleep(HEARTBEAT_SECONDS)
