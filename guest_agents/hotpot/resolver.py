"""What an owner does about commits that do not come to an end: their node has died, or this one had.

It asks the node that commits, if that is alive with the media on which it noted what it intends. If not, the owners
agree among themselves: each that is asked obeys that node no more (`frozen`), so what they find does not change under
them, and everyone who asks all of them finds the same. If one of them has seen the decision, or (MRSW) all have done
their part, it is committed, else undone: nobody was told that it is committed.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress

from guest_agents.hotpot.atlas import Atlas
from guest_agents.hotpot.errors import HotpotError, NodeLost, NotOwner
from guest_agents.hotpot.home import Claim, Entry, Home, Origin
from guest_agents.hotpot.log import State
from guest_agents.hotpot.messages import LEAF, PORT, Handler, Links, Message
from guest_agents.hotpot.owner import Owner

log = logging.getLogger("rackless.hotpot")
_COMMITTED = {"committed", "ended"}


class Resolver:
    """For all entries of an owner."""

    def __init__(self, links: Links, owner: Owner, atlas: Atlas) -> None:
        self._links = links
        self._owner = owner
        self._atlas = atlas

    def handlers(self) -> dict[str, Handler]:
        """What other owners may ask, on PORT."""
        return {"status": self._status, "settle": self._settle}

    def look(self) -> None:
        """Go on with what can go on."""
        living: set[int] | None = None
        for entry in self._owner.entries():
            if not entry.home.ready or entry.busy.locked():
                continue
            old = time.monotonic() - entry.since > self._owner.lease.timing.settle
            with suppress(HotpotError):
                if entry.state in (State.NOW, State.UNDO) or (entry.outcome is None and entry.state in (
                        State.COMMITTED, State.DONE)):  # fmt: skip
                    self._owner.finish_now(entry)
                if entry.state in (State.NOW, State.UNDO):
                    continue
                if living is None:
                    living = self._links.living()
                if old or entry.origin.node not in living:
                    self._resolve(entry)
        for home in self._owner.homes():
            for xid, claim in list(home.claims.items()):
                if home.ready and self._owner.entry(xid, home) is None:
                    with suppress(HotpotError):
                        self._look_at(home, xid, claim)

    def _look_at(self, home: Home, xid: int, claim: Claim) -> None:
        """A commit that was under way when this became the home has not come. HotpotError: not known yet."""
        said = self._origin_says(claim.origin, xid, time.monotonic())
        if said in ("active", "commit"):
            return
        if said == "lost":
            for part in claim.parts:
                if part != home.part and self._ask(home, xid, part, "status", {})["state"] in _COMMITTED:
                    if claim.origin.node in self._links.living():
                        log.error("transaction %x was lost with its node and an owner: %s has only a part of it", xid,
                                  home.record.name)  # fmt: skip
                        break
                    return  # it is committed, and its node has to come back and say it here too
        self._owner.refuse(xid, home)
        self._owner.disclaim(home, xid)

    def _resolve(self, entry: Entry) -> None:
        if entry.state == State.ENDED:
            if self._nobody_waits(entry):
                self._owner.forget(entry)
            return
        said = self._origin_says(entry.origin, entry.xid, entry.since)
        if said == "active":
            return
        if said == "lost" or entry.frozen:
            self._agree(entry)
        elif said == "abort" or (said == "unknown" and entry.state == State.PREPARED):
            self._owner.end(entry, abort=True)
        elif said == "unknown":  # it is over, and has been committed: of one that is not, all owners have to hear
            self._owner.end(entry, abort=False)
        elif said == "commit" and entry.state == State.PREPARED:
            self._owner.decide(entry)

    def _origin_says(self, origin: Origin, xid: int, since: float) -> str:
        if origin.node not in self._links.living():
            return "lost"
        try:
            reply = self._links.call(origin.node, "outcome", {"xid": xid, "media": origin.media}, port=LEAF)
        except NodeLost:
            patience = self._owner.lease.timing.patience + self._owner.lease.timing.promote
            return "lost" if time.monotonic() - since > patience else "active"
        return str(reply["outcome"])

    def _agree(self, entry: Entry) -> None:
        """Ask all owners, tell all owners. HotpotError: not all can be asked now."""
        entry.frozen = True
        states = {entry.home.part: _state(entry)}
        for part in entry.parts:
            if part not in states:
                states[part] = str(self._ask(entry.home, entry.xid, part, "status", {})["state"])
        commit = any(state in _COMMITTED for state in states.values()) or all(s == "done" for s in states.values())
        log.info("transaction %x of a lost node: %s, so %s", entry.xid, states, "committed" if commit else "undone")
        for part in entry.parts:
            if part != entry.home.part:
                self._ask(entry.home, entry.xid, part, "settle", {"commit": commit})
        self._carry(entry, commit)

    def _ask(self, home: Home, xid: int, part: int, op: str, more: Message) -> Message:
        header = {"xid": xid, "dataset": home.record.id, "part": part, **more}
        record = self._atlas.latest(home.record)
        try:
            return self._links.call(record.homes[part], op, header, port=PORT)
        except (NotOwner, NodeLost):
            self._atlas.refresh(record.id)
            raise

    def _carry(self, entry: Entry, commit: bool) -> None:
        if not commit:
            self._owner.end(entry, abort=True)
            return
        if entry.state == State.PREPARED:
            self._owner.decide(entry)
        self._owner.end(entry, abort=False, keep=True)

    def _nobody_waits(self, entry: Entry) -> bool:
        """Whether no other owner has still to learn that it is committed."""
        for part in entry.parts:
            if part != entry.home.part:
                state = self._ask(entry.home, entry.xid, part, "status", {"look": True})["state"]
                if state in ("prepared", "done", "committed"):
                    return False
        return True

    def _status(self, _source: int, header: Message, _payload: memoryview) -> Message:
        """How far a commit has come here. It goes no further by the word of its node; what is not known never will."""
        home = self._owner.home(header["dataset"], header["part"])
        entry = self._owner.entry(header["xid"], home)
        if entry is None and header["xid"] in home.xids:
            return {"state": "ended"}
        if header.get("look"):
            return {"state": "unknown" if entry is None else _state(entry)}
        if not home.ready:
            raise NodeLost("the home is being recovered")
        if home.leave is not None and home.leave.frozen:
            raise NotOwner("its next home has to say that, and would not know what is promised here now")
        if entry is None and header["xid"] in home.claims:
            return {"state": "claimed"}
        if entry is None and self._owner.refuse(header["xid"], home):
            return {"state": "unknown"}
        entry = entry or self._owner.entry(header["xid"], home)
        if entry is None:
            return {"state": "unknown"}
        entry.frozen = True
        return {"state": _state(entry)}

    def _settle(self, _source: int, header: Message, _payload: memoryview) -> Message:
        """What the owners have agreed."""
        home = self._owner.home(header["dataset"], header["part"])
        entry = self._owner.entry(header["xid"], home)
        if entry is not None and entry.state != State.ENDED:
            self._carry(entry, header["commit"])
        elif entry is None and not header["commit"]:
            self._owner.refuse(header["xid"], home)
            self._owner.disclaim(home, header["xid"])
        return {}


def _state(entry: Entry) -> str:
    return {State.PREPARED: "prepared", State.DONE: "done", State.UNDO: "unknown", State.ENDED: "ended",
            State.COMMITTED: "committed"}.get(entry.state, "unknown")  # fmt: skip
