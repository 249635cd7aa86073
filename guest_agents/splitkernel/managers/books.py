"""The global managers of a rack on its manager blade: what users and blades ask of them, and how they come back.

They hold nothing that nobody else has. The ledger of vNodes is kept by every blade (holder.py): a change is told to
all that live before it is answered, and a manager that was restarted takes the newest that any blade brings. The list
of programs is rebuilt from the processor blades, the loads from the reports of memory blades.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from difflib import get_close_matches

from guest_agents.control import ControlError, Handler, Message
from guest_agents.lite.errors import LiteError, NodeDead, NodeUnreachable
from guest_agents.lite.links import Links
from guest_agents.membership import Books, Life, Manager, Member
from guest_agents.splitkernel.managers import storage
from guest_agents.splitkernel.managers.files import FileMoves
from guest_agents.splitkernel.managers.memory import PLACEMENTS, MemoryManager
from guest_agents.splitkernel.managers.process import RUNNING, ProcessManager
from guest_agents.splitkernel.managers.vnode import DEFAULT, Ledger, VNode, check_name
from guest_agents.splitkernel.opcodes import CONTROL, Tally

LOST_KEPT = 32
"""How many lost programs are remembered."""
_READY_POLL = 0.05

log = logging.getLogger("rackless.managers")


class GlobalManagers(Books):
    """GPM, GMM and GSM.

    links -- to the holders of all blades
    addresses -- those that vNodes may have, in the order in which they are given
    """

    def __init__(self, manager: Manager, links: Links, addresses: Callable[[], Iterable[str]]) -> None:
        self._manager = manager
        self._links = links
        self._addresses = addresses
        self._ledger = Ledger()
        self._adopting = threading.Lock()
        self._changing = threading.Lock()
        self._ready = threading.Event()
        self._tally = Tally()
        self.process = ProcessManager()
        self.memory = MemoryManager()
        self.files = FileMoves(self._lives, links.call, self._change, lambda: self._ledger)

    def handlers(self) -> dict[str, Handler]:
        """What the host asks of the managers."""
        counted = self._tally.counting({
            op: self._when_ready(action)
            for op, action in {
                "vnode.create": self.create, "vnode.delete": self.delete, "vnode.list": self.list,
                "program.place": self.place, "program.list": self.programs, **self.files.handlers(),
            }.items()
        })  # fmt: skip
        return {**counted, "managers.stats": self.stats}

    def member_handlers(self) -> dict[str, Handler]:
        """What blades ask of them; `guarded` is put around these."""
        return self._tally.counting({
            "managers.hear": self._hear, "managers.load": self._load, "managers.region": self._region,
            "managers.programs": self._when_ready(self.programs),
            "managers.moved": self._when_ready(self.files.moved),
        })  # fmt: skip

    def start(self) -> None:
        """Take over when all members are here."""
        threading.Thread(target=self._settle, name="managers", daemon=True).start()

    # Membership

    def joined(self, member: Member, report: Message) -> None:
        """What a blade that goes on living knows of the last manager's books."""
        if report:
            self._take(member.life, member.name, report)

    def died(self, member: Member) -> None:
        """Its programs are lost."""
        self._links.end(member.life.node, member.life.incarnation)
        self.memory.forget(member.name)
        self.files.leaving.discard(member.name)
        lost = self.process.died(member.life)
        if lost:
            log.warning("%s has died with %d programs", member.name, len(lost))
            self._change(lambda old: replace(old, lost=(*old.lost, *lost)[-LOST_KEPT:]))

    # Requests of the host

    def create(self, request: Message) -> Message:
        """vnode.create: name, and optionally processors, memory, storage, placement."""
        placement = str(request.get("placement") or "round-robin")
        if placement not in PLACEMENTS:
            raise ControlError(f"there is no placement {placement!r}", f"there are: {', '.join(PLACEMENTS)}")
        chosen = {kind: self._chosen(request.get(field) or (), kind)
                  for kind, field in (("processor", "processors"), ("memory", "memory"), ("storage", "storage"))
                  }  # fmt: skip
        if not chosen["processor"] or not chosen["memory"]:
            missing = "processor" if not chosen["processor"] else "memory"
            raise ControlError(f"the rack has no {missing} blade that lives", "see `rackless status`")
        if len(request.get("storage") or ()) > 1:
            raise ControlError("a vNode has its files on one storage blade", "name one")
        staying = [blade for blade in chosen["storage"] if blade not in self.files.leaving]
        if request.get("storage") and not staying:
            raise ControlError(f"{chosen['storage'][0]} is being removed", "name another storage blade")

        def add(old: Ledger) -> Ledger:
            name = str(request["name"])
            check_name(name, old.vnodes)
            taken = {vnode.address for vnode in old.vnodes.values()}
            address = next((address for address in self._addresses() if address not in taken), None)
            blade = storage.choose(staying, old.vnodes.values())
            made = VNode(name, old.next_id, address, chosen["processor"], chosen["memory"], blade, placement)
            return replace(old, next_id=old.next_id + 1, vnodes={**old.vnodes, name: made})

        return {"vnode": self._change(add).vnodes[str(request["name"])].to_json()}

    def delete(self, request: Message) -> Message:
        """vnode.delete: name. Its files stay on the storage blade."""
        name = str(request["name"])
        if name == DEFAULT:
            raise ControlError("the default vNode is the whole rack: it cannot be deleted", None)

        def remove(old: Ledger) -> Ledger:
            old.find(name)
            ids = [program["id"] for program in self.process.running(name)]
            if ids:
                raise ControlError(f"vNode {name} has running programs: {', '.join(ids)}",
                                   f"end them first: rackless kill {ids[0]}")  # fmt: skip
            return replace(old, vnodes={other: vnode for other, vnode in old.vnodes.items() if other != name})

        self._change(remove)
        return {}

    def list(self, request: Message) -> Message:
        """vnode.list: all, the default one first, or the one called `name`; with how many programs run in each."""
        vnodes = [self._default(), *self._ledger.vnodes.values()]
        if request.get("name") is not None:
            vnodes = [self._vnode(str(request["name"]))]
        return {"vnodes": [{**vnode.to_json(), "programs": len(self.process.running(vnode.name))} for vnode in vnodes]}

    def place(self, request: Message) -> Message:
        """program.place: the processor blade for a program of `vnode`; `on` if that is one of its blades."""
        vnode = self._vnode(str(request.get("vnode") or DEFAULT))
        wanted = request.get("on")
        if wanted is not None and wanted not in vnode.processors:
            raise ControlError(f"{wanted} is not a processor blade of vNode {vnode.name}",
                               f"these are: {', '.join(vnode.processors)}")  # fmt: skip
        living = self._living("processor")
        blades = [wanted] if wanted is not None else [name for name in vnode.processors if name in living]
        if not blades:
            raise ControlError(f"vNode {vnode.name} has no processor blade that lives", "see `rackless status`")
        return {"blade": self.process.place(blades), "vnode": vnode.to_json()}

    def programs(self, _request: Message) -> Message:
        """program.list: the programs of all blades that live, and those that were lost with others."""
        told = self.process.programs()
        again = {(program["id"], program["started"]) for program in told}
        lost = [program for program in self._ledger.lost if (program["id"], program["started"]) not in again]
        return {"programs": [*lost, *told]}

    def stats(self, _request: Message) -> Message:
        """managers.stats: what the managers know of each kind of blade, and requests so far by opcode."""
        running = Counter(p["blade"] for p in self.process.programs() if p["state"] == RUNNING)
        vnodes = Counter(vnode.storage for vnode in self._ledger.vnodes.values() if vnode.storage is not None)
        return {
            "ready": self._ready.is_set(),
            "process": {blade: {"programs": running[blade]} for blade in sorted(self._living("processor"))},
            "memory": {blade: {"free": load.free, "requests": load.requests, "age_seconds": round(load.age, 2)}
                       for blade, load in sorted(self.memory.loads().items())},
            "storage": {blade: {"vnodes": vnodes[blade]} for blade in sorted(self._living("storage"))},
            "lost_programs": len(self._ledger.lost),
            "ledger_version": self._ledger.version,
            "requests": self._tally.counts(),
        }  # fmt: skip

    # Requests of blades

    def _hear(self, request: Message) -> Message:
        """A blade begins a life, or its programs came or went."""
        caller = self._caller(request)
        self._take(caller.life, caller.name, request)
        return {"ledger": self._ledger.to_json()}

    def _load(self, request: Message) -> Message:
        """How a memory blade is: bytes `free`, `requests` so far."""
        self.memory.report(self._caller(request).name, int(request["free"]), int(request["requests"]))
        return {}

    def _region(self, request: Message) -> Message:
        """On which of `blades` the copies of a region of a program of `vnode` shall go, in order."""
        self._caller(request)
        vnode = self._ledger.vnodes.get(request["vnode"])
        placement = vnode.placement if vnode is not None else "round-robin"
        size, copies = int(request["size"]), int(request["copies"])
        return {"blades": self.memory.order(placement, request["vnode"], request["blades"], size, copies)}

    # Inside

    def _caller(self, request: Message) -> Member:
        """Who asks. NODE_DEAD if that life is over: it may not know it yet."""
        life = Life(*request["life"])
        member = self._manager.alive().get(life.node)
        if member is None or member.life != life:
            raise NodeDead(f"node {life.node} is not a member (any more)")
        return member

    def _take(self, life: Life, name: str, told: Message) -> None:
        with self._adopting:
            ledger = Ledger.from_json(told["ledger"])
            if ledger.version > self._ledger.version:
                self._ledger = ledger
        self.process.hear(life, name, int(told["sequence"]), told["programs"])

    def _change(self, change: Callable[[Ledger], Ledger]) -> Ledger:
        """Change the ledger, and return when every blade that lives knows it."""
        with self._changing:
            with self._adopting:
                changed = change(self._ledger)
                # Higher than what an earlier manager may have told somebody who did not bring it here.
                version = max(self._ledger.version + 1, time.time_ns() // 1_000_000)
                self._ledger = changed = replace(changed, version=version)
            self._tell_all()
            return changed

    def _tell_all(self) -> None:
        ledger = self._ledger.to_json()
        for member in self._manager.alive().values():
            while self._manager.is_alive(member.life):
                try:
                    self._links.call(member.life, "holder.keep", ledger=ledger)
                    self._tally.add(CONTROL["holder.keep"])
                    break
                except NodeDead:
                    break
                except NodeUnreachable:
                    log.warning("the managers wait for %s", member.name)
                    time.sleep(self._manager.timing.heartbeat / 2)
                except LiteError:
                    log.exception("%s does not keep the ledger; others do", member.name)
                    break

    def _default(self) -> VNode:
        living = {kind: tuple(sorted(self._living(kind))) for kind in ("processor", "memory", "storage")}
        return VNode(DEFAULT, 0, None, living["processor"], living["memory"], self._ledger.home(living["storage"]),
                     "round-robin")  # fmt: skip

    def _vnode(self, name: str) -> VNode:
        return self._default() if name == DEFAULT else self._ledger.find(name)

    def _living(self, kind: str) -> set[str]:
        return set(self._lives(kind))

    def _lives(self, kind: str) -> dict[str, Life]:
        return {member.name: member.life for member in self._manager.alive().values() if member.kind == kind}

    def _chosen(self, names: Sequence[str], kind: str) -> tuple[str, ...]:
        """The blades of those names, which live and are of that kind; all there are without names."""
        if not names:
            return tuple(sorted(self._living(kind)))
        members = {member["name"]: member for member in self._manager.list({})["members"]}
        for name in names:
            if name not in members:
                close = get_close_matches(name, members, n=1)
                raise ControlError(f"there is no blade {name}", f"did you mean {close[0]}?" if close else
                                   f"there are: {', '.join(members)}")  # fmt: skip
            if members[name]["kind"] != kind:
                there = ", ".join(sorted(m["name"] for m in members.values() if m["kind"] == kind)) or "none"
                raise ControlError(f"{name} is a {members[name]['kind']} blade, not a {kind} blade",
                                   f"{kind} blades: {there}")  # fmt: skip
            if members[name]["state"] != "alive":
                raise ControlError(f"{name} is {members[name]['state']}", "`rackless up` mends it")
        return tuple(dict.fromkeys(names))

    def _when_ready(self, action: Handler) -> Handler:
        def handle(request: Message) -> Message:
            if not self._ready.wait(2 * self._manager.timing.dead_after):
                raise ControlError("the manager was restarted and still waits for members", "see `rackless status`")
            return action(request)

        return handle

    def _settle(self) -> None:
        while not self._manager.all_here():
            time.sleep(_READY_POLL)
        self._tell_all()  # an earlier manager may have been in the middle of it
        self._ready.set()
