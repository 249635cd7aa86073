"""Who is in the rack: the manager blade keeps the list, every agent joins it over the fabric and beats.

LITE's cluster manager hands out ids but knows no heartbeat, no leaving and no return (lite-and-hotpot.md, 1.2). Here:

- A **node id** is the blade's place in the rack (1 for index 0), which also fixes its addresses. So no manager,
  however freshly started, can give one id to two living blades.
- Every join begins a new **life** of that node, with a higher **incarnation**. Whoever remembers (id, incarnation)
  can tell a blade from the one that had the id before, or from itself before it was declared dead.
- A member that does not beat for `dead_after` seconds is declared **dead**, for good: when it comes back (it was
  paused, say) its beat is refused, and it joins anew, as a new life with clean books.
- A beat waits at the manager until there is news or a heartbeat has passed: members learn of deaths at once.
- A manager that was restarted knows nobody. Members claim the lives they have, and tell which ones are dead; lives
  that were known to them and that nobody claims within `dead_after` are declared dead.

The control channel's handshake keeps strangers out.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from guest_agents import control
from guest_agents.control import Message

_HISTORY = 1000
"""Events that a manager remembers."""
_RETRY_SECONDS = 0.2
_LEAVE_SECONDS = 2.0

log = logging.getLogger("rackless.membership")


@dataclass(frozen=True)
class Timing:
    """How often members beat, and how long they may be silent; seconds.

    A blade without KVM may well be busy for some seconds: the defaults are patient.
    """

    heartbeat: float = 1.0
    dead_after: float = 10.0


@dataclass(frozen=True)
class Life:
    """One life of a node: other lives of the same node have other incarnations."""

    node: int
    incarnation: int


@dataclass
class Member:
    """A blade that has joined."""

    life: Life
    name: str
    kind: str
    address: str  # on the fabric
    management: str
    state: str = "alive"
    seen: float = field(default_factory=time.monotonic)

    def describe(self) -> Message:
        """What others are told of it."""
        return {"node_id": self.life.node, "incarnation": self.life.incarnation, "name": self.name, "kind": self.kind,
                "address": self.address, "management": self.management, "state": self.state}  # fmt: skip


class Books:
    """What else a manager keeps about members, such as LITE's directory; does nothing by itself."""

    def joined(self, member: Member, report: Message) -> None:
        """A life joins, or claims to go on after a restart of the manager; `report` is what it holds. Be quick."""

    def died(self, member: Member) -> None:
        """A life is over; called in order, from a thread of its own, and may take its time."""


class SeveralBooks(Books):
    """Books by name; each gets the part of a member's report that has its name (see SeveralFollowers)."""

    def __init__(self, parts: Mapping[str, Books]) -> None:
        self._parts = parts

    def joined(self, member: Member, report: Message) -> None:
        """A life joins."""
        for name, part in self._parts.items():
            part.joined(member, report.get(name, {}))

    def died(self, member: Member) -> None:
        """A life is over."""
        for name, part in self._parts.items():
            try:
                part.died(member)
            except Exception:
                log.exception("the books of %s about %s are not settled", name, member.name)


class Manager:
    """The list of members, on the manager blade.

    own_name -- this blade: it is not declared dead by itself
    expected -- names of all blades the rack has: when these have joined, nobody else can have anything to claim
    """

    def __init__(
        self, own_name: str, timing: Timing | None = None, expected: Callable[[], Collection[str]] = lambda: ()
    ) -> None:
        self.timing = timing or Timing()
        self.books = Books()
        self._expected = expected
        self._members: dict[int, Member] = {}
        self._dead: dict[int, int] = {}  # node -> highest incarnation that is over
        self._departed: dict[str, Member] = {}  # by name, until a blade of that name joins
        self._missed: set[Life] = set()  # lives that members remember and that have not claimed to go on
        self._started: float | None = None
        self._settled = False
        # Higher than any that a manager before this one can have given, at less than one join per second.
        self._incarnation = int(time.time())
        self._version = 0
        self._history: deque[Message] = deque(maxlen=_HISTORY)
        self._happened = 0
        self._life = time.time_ns()
        self._change = threading.Condition()
        self._burials: queue.Queue[Member] = queue.Queue()
        self._own_name = own_name

    def handlers(self) -> dict[str, control.Handler]:
        """Control operations ``member.join``, ``member.beat``, ``member.leave``, ``member.list``, ``member.events``."""
        return {"member.join": self.join, "member.beat": self.beat, "member.leave": self.leave,
                "member.list": self.list, "member.events": self.events}  # fmt: skip

    def start(self) -> None:
        """Watch over the members, in threads of their own; call it when they can be heard: now their time begins."""
        self._started = time.monotonic()
        threading.Thread(target=self._watch, name="members", daemon=True).start()
        threading.Thread(target=self._bury, name="burials", daemon=True).start()

    def join(self, request: Message) -> Message:
        """A blade joins, or claims to go on living because this manager was restarted.

        `incarnation` is the life it claims (None: it has just started); `dead` and `others` are what it knows of
        others, `report` what it holds. The reply's incarnation differs from the claim when that life is over.
        """
        wanted = Life(int(request["node_id"]), int(request.get("incarnation") or 0))
        member = Member(wanted, str(request["name"]), request["kind"], request["address"], request["management"])
        with self._change:
            for node, incarnation in request.get("dead", []):
                self._end(int(node), int(incarnation), "other members say so")
            others = {Life(int(node), int(incarnation)) for node, incarnation in request.get("others", [])}
            self._incarnation = max(self._incarnation, *(life.incarnation for life in (wanted, *others)))
            current = self._members.get(wanted.node)
            goes_on = wanted.incarnation > self._dead.get(wanted.node, 0) and (
                current.life == wanted if current is not None else not self._settled
            )
            if not goes_on:
                if current is not None:
                    self._end(wanted.node, current.life.incarnation, f"{member.name} joins in its place")
                self._incarnation += 1
                member.life = Life(wanted.node, self._incarnation)
            # Lives of this node before this one are over, also those that no manager has buried.
            self._dead[wanted.node] = max(self._dead.get(wanted.node, 0), member.life.incarnation - 1)
            for namesake in [m for m in self._members.values() if m.name == member.name and m.life != member.life]:
                self._end(namesake.life.node, namesake.life.incarnation, "it moved to another place")
            # Its report first: whoever sees `all_here` has all reports.
            self.books.joined(member, request.get("report", {}) if goes_on else {})
            self._members[wanted.node] = member
            self._departed.pop(member.name, None)
            self._happens(member, "joined", "it goes on after a restart of the manager" if goes_on else "a new life")
            self._missed = {life for life in self._missed | others if not self._is_known(life)}
            self._changed()
        log.info("%s joined as node %d, incarnation %d", member.name, member.life.node, member.life.incarnation)
        return {"node_id": member.life.node, "incarnation": member.life.incarnation, **self.list(request)}

    def beat(self, request: Message) -> Message:
        """A member is alive. Answers when there is news since `version`, at the latest after a heartbeat.

        ``known`` false asks it to join anew: it was declared dead, or this manager was restarted.
        """
        life = Life(int(request["node_id"]), int(request["incarnation"]))
        with self._change:
            member = self._member(life)
            if member is not None:
                member.seen = time.monotonic()
                self._change.wait_for(lambda: self._version != request.get("version"), self.timing.heartbeat)
                member = self._member(life)
        return {"known": member is not None, **self.list(request)}

    def leave(self, request: Message) -> Message:
        """A member ends in good order: nobody has to wait for its silence."""
        with self._change:
            if self._member(Life(int(request["node_id"]), int(request["incarnation"]))):
                self._end(int(request["node_id"]), int(request["incarnation"]), "it left", "left")
        return {}

    def list(self, _request: Message) -> Message:
        """All members, those that died or left and have not come back, and which incarnations are over."""
        with self._change:
            everyone = [*self._members.values(), *self._departed.values()]
            return {
                "members": [m.describe() for m in sorted(everyone, key=lambda m: (m.life.node, m.life.incarnation))],
                "dead": sorted(self._dead.items()),
                "version": self._version,
            }

    def events(self, request: Message) -> Message:
        """Who joined, died and left, from the event with number `since` on, as far as this manager remembers.

        `life` is this manager's: another one counts anew. `time` is seconds since the epoch by this blade's clock, and
        `now` what that clock says.
        """
        with self._change:
            since = int(request.get("since", 0))
            return {"life": self._life, "events": [e for e in self._history if e["number"] >= since],
                    "next": self._happened, "now": time.time()}  # fmt: skip

    def _happens(self, member: Member, state: str, why: str) -> None:
        self._history.append({"number": self._happened, "time": round(time.time(), 3), "blade": member.name,
                              "state": state, "why": why, **asdict(member.life)})  # fmt: skip
        self._happened += 1

    def alive(self) -> dict[int, Member]:
        """The living by node id."""
        with self._change:
            return dict(self._members)

    def is_alive(self, life: Life) -> bool:
        """Whether this life of a node is a member now."""
        with self._change:
            return self._member(life) is not None

    def all_here(self) -> bool:
        """Whether every member there can be has joined: before that, books that members bring may be incomplete.

        True also when `dead_after` has passed since the start: who has not claimed its life by then has lost it, and
        begins anew when it comes.
        """
        with self._change:
            if not self._settled:
                complete = {m.name for m in self._members.values()} >= set(self._expected())
                self._settled = (complete or self._is_late(time.monotonic())) and not self._missed
            return self._settled

    def _is_late(self, now: float) -> bool:
        return self._started is not None and now - self._started > self.timing.dead_after

    def _member(self, life: Life) -> Member | None:
        member = self._members.get(life.node)
        return member if member is not None and member.life == life else None

    def _is_known(self, life: Life) -> bool:
        return life.incarnation <= self._dead.get(life.node, 0) or self._member(life) is not None

    def _end(self, node: int, incarnation: int, why: str, state: str = "dead") -> None:
        """This life of a node, and all before it, are over."""
        if incarnation <= self._dead.get(node, 0):
            return
        self._dead[node] = incarnation
        self._incarnation = max(self._incarnation, incarnation)
        member = self._members.get(node)
        if member is not None and member.life.incarnation <= incarnation:
            del self._members[node]
            member.state = state
            self._departed[member.name] = member
            self._burials.put(member)
            self._happens(member, state, why)
            log.warning("%s (node %d, incarnation %d) is dead: %s", member.name, node, member.life.incarnation, why)
        self._changed()

    def _changed(self) -> None:
        self._version += 1
        self._change.notify_all()

    def _watch(self) -> None:
        """Declare dead who is silent. If this very thread was held up, so were beats: that time does not count."""
        before = time.monotonic()
        while True:
            pause = self.timing.heartbeat / 2
            time.sleep(pause)
            now = time.monotonic()
            held_up = max(0.0, now - before - 2 * pause)
            before = now
            with self._change:
                for member in list(self._members.values()):
                    member.seen += held_up
                    if now - member.seen > self.timing.dead_after and member.name != self._own_name:
                        self._end(member.life.node, member.life.incarnation, f"silent for {now - member.seen:.1f} s")
                if self._started is not None:
                    self._started += held_up
                if self._missed and self._is_late(now):
                    for life in self._missed:
                        self._end(life.node, life.incarnation, "it did not come back to this manager")
                    self._missed.clear()

    def _bury(self) -> None:
        while True:
            member = self._burials.get()
            try:
                self.books.died(member)
            except Exception:
                log.exception("the books of %s are not settled", member.name)


def living(before: Collection[Message], members: Collection[Message], dead: Mapping[int, int]) -> list[Message]:
    """The members that are alive, by node id, after news (see Follower.news); `before`: those before the news.

    A manager that was restarted does not know everybody yet: who is missing in its list, and not dead, is alive.
    """
    lives = {m["node_id"]: m for m in (*before, *members)
             if m["state"] == "alive" and m["incarnation"] > dead.get(m["node_id"], 0)}  # fmt: skip
    return [lives[node] for node in sorted(lives)]


class Follower:
    """Who wants to know what happens to this blade's membership; does nothing by itself.

    `report` and `reborn` are called by the membership thread and must be quick.
    """

    def report(self) -> Message:
        """What this life holds, for a manager that was restarted."""
        return {}

    def reborn(self, life: Life) -> None:
        """This blade begins a new life; everything it had from an earlier one is void."""

    def news(self, members: list[Message], dead: dict[int, int]) -> None:
        """Members came or went. `dead`: node -> highest incarnation that is over."""


class SeveralFollowers(Follower):
    """Followers by name, that hear all in order; what they report goes to the books of the same name."""

    def __init__(self, parts: Mapping[str, Follower]) -> None:
        self._parts = parts

    def report(self) -> Message:
        """What this life holds, by name."""
        return {name: part.report() for name, part in self._parts.items()}

    def reborn(self, life: Life) -> None:
        """This blade begins a new life."""
        for part in self._parts.values():
            part.reborn(life)

    def news(self, members: list[Message], dead: dict[int, int]) -> None:
        """Members came or went."""
        for part in self._parts.values():
            part.news(members, dead)


class Membership:
    """A blade's side: joins, keeps joined, knows the others."""

    def __init__(
        self, manager: tuple[str, int], secret: bytes, about: dict[str, Any], timing: Timing | None = None
    ) -> None:
        self._manager = manager
        self._secret = secret
        self._about = about
        self.timing = timing or Timing()
        self.follower = Follower()
        self.joined = threading.Event()
        self.node_id = int(about["node_id"])
        self.incarnation: int | None = None
        self.members: list[Message] = []
        self.dead: dict[int, int] = {}
        self.living: list[Message] = []
        """The members that are alive; see the function of that name."""
        self._version: int | None = None
        self._left = False
        self._watchers: list[Callable[[], None]] = []

    def start(self) -> None:
        """Join and keep joined in a thread of its own."""
        threading.Thread(target=self._run, name="membership", daemon=True).start()

    def of_kind(self, kind: str) -> list[Message]:
        """The members of a kind that are alive, by node id; managers tell news at once."""
        return [m for m in self.living if m["kind"] == kind]

    def watch(self, changed: Callable[[], None]) -> None:
        """Have `changed` called whenever members come or go, by the membership thread: it must be quick."""
        self._watchers.append(changed)

    def leave(self) -> None:
        """Tell the manager that this blade's agent ends."""
        self._left = True
        if self.incarnation is not None:
            with suppress(control.ControlError):
                control.call(self._manager, self._secret, "member.leave", _LEAVE_SECONDS, node_id=self.node_id,
                             incarnation=self.incarnation)  # fmt: skip

    def _patience(self) -> float:
        return self.timing.heartbeat + self.timing.dead_after

    def _run(self) -> None:
        while not self._left:
            try:
                with control.ControlClient(self._manager, self._secret, self._patience()) as client:
                    self._stay(client)
            except control.ControlError as error:
                if self.joined.is_set():
                    log.warning("lost the manager: %s", error)
                self.joined.clear()
                time.sleep(_RETRY_SECONDS)

    def _stay(self, client: control.ControlClient) -> None:
        while not self._left:
            self._join(client)
            while not self._left:
                reply = client.call("member.beat", node_id=self.node_id, incarnation=self.incarnation,
                                    version=self._version)  # fmt: skip
                if not reply["known"]:
                    self.joined.clear()
                    break
                self._hear(reply)

    def _join(self, client: control.ControlClient) -> None:
        others = [(m["node_id"], m["incarnation"]) for m in self.members if m["state"] == "alive"]
        reply = client.call("member.join", **self._about, incarnation=self.incarnation, others=others,
                            dead=sorted(self.dead.items()), report=self.follower.report())  # fmt: skip
        if reply["incarnation"] != self.incarnation:
            if self.incarnation is not None:
                log.warning("this blade was declared dead; it begins anew")
            self.incarnation = reply["incarnation"]
            self.follower.reborn(Life(self.node_id, reply["incarnation"]))
        self._hear(reply)
        log.info("joined as node %d, incarnation %d", self.node_id, reply["incarnation"])
        self.joined.set()

    def _hear(self, reply: Message) -> None:
        self._version = reply["version"]
        dead = {int(node): int(incarnation) for node, incarnation in reply["dead"]}
        if reply["members"] != self.members or dead != self.dead:
            self.members, self.dead = reply["members"], dead
            self.living = living(self.living, self.members, dead)
            self.follower.news(self.members, dead)
            for changed in self._watchers:
                changed()
