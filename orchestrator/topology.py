"""Changes of a rack that is up, each an edit of its file and an `up` of only the blades it is about.

So the file stays the one truth of what should be: editing it by hand and `rackless up` gives the same. Everything is
checked first: what is refused has touched neither the file nor a blade. A change that is there already changes
nothing, and `undo` takes one back.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator import drain, engine, holdings, journal, rackedit, rackfile
from orchestrator.engine import UpResult
from orchestrator.errors import RacklessError
from orchestrator.events import Emit, ignore, step
from orchestrator.faults.inject import inject
from orchestrator.fields import KINDS, did_you_mean
from orchestrator.hypervisor import balloon
from orchestrator.model import Rack
from orchestrator.plan import Action, Observed
from orchestrator.settings import RackPaths, Settings
from orchestrator.status import status
from orchestrator.units import format_size

USUAL: dict[str, dict[str, Any]] = {
    "manager": {"cpus": 1, "memory": "256 MiB"},
    "processor": {"cpus": 1, "memory": "512 MiB", "excache": "64 MiB"},
    "memory": {"cpus": 1, "memory": "512 MiB"},
    "storage": {"cpus": 1, "memory": "256 MiB", "disk": {"size": "1 GiB"}},
}
"""What a new blade of a kind is like where the rack has none of that kind to be like."""

PREFIXES = {"manager": "gm", "processor": "pb", "memory": "mb", "storage": "sb"}


@dataclass(frozen=True)
class Change:
    """What is to be changed, or was: the file before and after, and what that makes of blades that run."""

    blade: str
    file: Path
    before: str
    after: str
    rack: Rack
    actions: tuple[Action, ...] = ()
    """What has to be done to blades of the rack that is up; nothing when it is not up."""
    result: UpResult | None = None
    moved: int = 0
    """Bytes that moved to other blades before, or would."""

    @property
    def changed(self) -> bool:
        """Whether anything differs."""
        return self.before != self.after or bool(self.actions)

    @property
    def diff(self) -> str:
        """The change of the file."""
        return rackedit.diff(self.before, self.after, str(self.file))

    def to_json(self) -> dict[str, Any]:
        """As the commands print it with --json."""
        return {
            "rack": self.rack.name,
            "blade": self.blade,
            "changed": self.changed,
            "file": str(self.file),
            "diff": self.diff,
            "actions": [action.to_json() for action in self.actions],
            "moved": self.moved,
            "result": self.result.to_json() if self.result else None,
        }

    def lines(self) -> list[str]:
        """For people."""
        if not self.changed:
            return [f"{self.blade}: nothing to do"]
        verbs = {"update": "changed while it runs", "create": "added", "recreate": "made anew", "remove": "removed"}
        done = [f"{a.blade}: {verbs[a.kind]} ({'; '.join(a.reasons)})" for a in self.actions]
        if self.moved:
            done.insert(0, f"{self.blade}: {format_size(self.moved)} moved to other blades")
        return done or [f"{self.blade}: {self.file} is changed; no blade that is up has to be"]


def add(settings: Settings, file: Path, kind: str, name: str | None, fields: Mapping[str, Any], dry: bool = False,
        emit: Emit = ignore) -> Change:  # fmt: skip
    """Add a blade; undone by `remove`. What `fields` do not say is as in the rack's first blade of that kind.

    Without a name it gets the next free one, such as mb2. Raises RacklessError when there is another blade of that
    name, and for what a rack file may not say.
    """
    before, rack = _read(file)
    if kind not in KINDS:
        raise RacklessError(f"no kind of blade is called {kind}", hint=did_you_mean(kind, KINDS))
    name = name or next(free for free in (f"{PREFIXES[kind]}{n}" for n in range(1000)) if free not in rack.blades)
    said = rack.model_dump(mode="json", exclude_none=True)["blades"]
    if name in said:
        given = {key: value for key, value in {"kind": kind, **fields}.items() if value is not None}
        for key, value in given.items():
            if said[name]["kind"] != kind or _edited(before, ("blades", name), {key: value}) != before:
                raise RacklessError(f"blade {name} is there already, with another {key}",
                                    hint=f"`rackless blade resize {name}`, or choose another name")  # fmt: skip
        after = before
    else:
        like: dict[str, Any] = next((blade for blade in said.values() if blade["kind"] == kind), {})
        usual = {key: like.get(key, value) for key, value in USUAL[kind].items()}
        after = rackedit.put(before, ("blades", name), {"kind": kind, **_with(usual, fields)})
    return _carry_out(settings, file, name, before, after, False, dry, emit)


def remove(settings: Settings, file: Path, name: str, force: bool = False, dry: bool = False, emit: Emit = ignore,
           missing_ok: bool = False) -> Change:  # fmt: skip
    """Remove a blade, with its link; undone by `undo`.

    It is drained first: memory and files move to other blades. Refused when something else would be lost with it (see
    drain.py), unless by `force`, which drains nothing. Never removed is the manager that keeps the books. With
    `missing_ok` it may be gone already.
    """
    before, rack = _read(file)
    there = {name for name, seen in engine.observe(settings, rack.name).items() if seen.state != "absent"}
    if name not in rack.blades and name not in there and not missing_ok:
        raise RacklessError(f"no blade {name} in rack {rack.name}", hint=did_you_mean(name, [*rack.blades]))
    managers = [other for other, blade in rack.blades.items() if blade.kind == "manager"]
    if managers == [name]:
        raise RacklessError(f"{name} is the last manager: a rack needs one", hint="`rackless down` removes the rack")
    if managers[:1] == [name]:
        raise RacklessError(f"{name} keeps the rack's books: other blades would not find {managers[1]}",
                            hint="`rackless down`, edit the rack file, `rackless up`")  # fmt: skip
    after = rackedit.drop(rackedit.drop(before, ("links", name)), ("blades", name))
    return _carry_out(settings, file, name, before, after, force, dry, emit)


def resize(settings: Settings, file: Path, name: str, fields: Mapping[str, Any], force: bool = False,
           dry: bool = False, emit: Emit = ignore) -> Change:  # fmt: skip
    """Change memory, cpus, cpu_quota, excache, pmem or disk of a blade; a None takes the key out of the file.

    What cannot change while it runs makes the blade anew; refused when something would be lost by that, unless by
    `force`. Undone by `undo`.
    """
    before, rack = _read(file)
    if name not in rack.blades:
        raise RacklessError(f"no blade {name} in rack {rack.name}", hint=did_you_mean(name, [*rack.blades]))
    return _carry_out(settings, file, name, before, _edited(before, ("blades", name), fields), force, dry, emit)


def set_link(settings: Settings, file: Path, name: str, fields: Mapping[str, Any], dry: bool = False,
             emit: Emit = ignore) -> Change:  # fmt: skip
    """Change latency, jitter, bandwidth or loss of a blade's link, while it runs; None is the default again."""
    before, rack = _read(file)
    if name not in rack.blades:
        raise RacklessError(f"no blade {name} in rack {rack.name}", hint=did_you_mean(name, [*rack.blades]))
    return _carry_out(settings, file, name, before, _edited(before, ("links", name), fields), False, dry, emit)


def restore(settings: Settings, file: Path, name: str, force: bool = False, dry: bool = False,
            emit: Emit = ignore) -> Change:  # fmt: skip
    """Make one blade as the file says, if it is not so: after it died, say. Disks are kept."""
    before, rack = _read(file)
    if name not in rack.blades:
        raise RacklessError(f"no blade {name} in rack {rack.name}", hint=did_you_mean(name, [*rack.blades]))
    return _carry_out(settings, file, name, before, before, force, dry, emit)


def replace_blade(settings: Settings, file: Path, name: str, anew: bool = False, force: bool = False,
                  dry: bool = False, emit: Emit = ignore) -> Change:  # fmt: skip
    """Make a blade anew if it died, hangs or differs from the file; with `anew` also if it is well. Disks are kept."""
    change = restore(settings, file, name, force, dry, emit)
    states = {blade["name"]: blade["state"] for blade in status(settings, change.rack.name)["blades"]}
    if change.changed or name not in states or (states[name] == "ready" and not anew):
        return change
    old = engine.observe(settings, change.rack.name)[name].spec
    reason = f"it is {states[name]}" + (", and to be replaced" if anew else "")
    change = replace(change, actions=(Action("recreate", name, old, old, (reason,)),))
    if not force and states[name] == "ready":  # of one that hangs nobody gets anything any more
        _refuse_losses(settings, change, engine.observe(settings, change.rack.name))
    if dry:
        return change
    inject(settings, change.rack.name, {name: {"killed": True}}, emit=emit)
    return replace(change, result=restore(settings, file, name, force, emit=emit).result)


def undo(settings: Settings, change: Change, force: bool = False, emit: Emit = ignore) -> Change:
    """Take back a change: the file is as before, and its blade too. RacklessError if the file is another by now."""
    if _read(change.file)[0] != change.after:
        raise RacklessError(f"{change.file} has been changed since", hint="edit it by hand, then `rackless up`")
    return _carry_out(settings, change.file, change.blade, change.after, change.before, force, False, emit)


def _carry_out(settings: Settings, file: Path, name: str, before: str, after: str, force: bool, dry: bool,
               emit: Emit) -> Change:  # fmt: skip
    """Check the file as it would be, what would be lost, and then do it."""
    rack = rackfile.parse(after, str(file))
    engine.check_room(rack)
    observed = engine.observe(settings, rack.name)
    change = Change(name, file, before, after, rack)
    drained = False
    if observed:
        change = replace(change, actions=engine.plan(settings, rack).only({name}).of("remove", "recreate", "create",
                                                                                   "update"))  # fmt: skip
        if not force:
            _refuse_losses(settings, change, observed)
            if any(action.kind == "remove" and action.blade in observed for action in change.actions):
                paths = RackPaths(settings.scaled("tcg"), rack.name)
                if dry:
                    change = replace(change, moved=drain.movable(paths, observed, name))
                else:
                    with step(journal.recording(paths, emit), rack.name, "drain", name):
                        change = replace(change, moved=drain.drain(paths, observed, name))
                    drained = True
    if dry or not change.changed:
        return change
    try:
        if before != after:
            rackedit.write(file, after)
        result = engine.up(settings, rack, emit, only={name}) if change.actions else None
    except BaseException:
        if drained:
            _use_again(settings, rack.name, name)
        raise
    if name in rack.blades and name in observed and name not in rackfile.parse(before, str(file)).blades:
        _use_again(settings, rack.name, name)  # its removal was begun, and is taken back
    return replace(change, result=result)


def _use_again(settings: Settings, rack: str, name: str) -> None:
    """Take back a drain of a blade that was not removed then."""
    with suppress(RacklessError):  # why it was not is what the user has to hear
        drain.cancel(RackPaths(settings.scaled("tcg"), rack), engine.observe(settings, rack), name)


def _refuse_losses(settings: Settings, change: Change, observed: Mapping[str, Observed]) -> None:
    # How slow blades answer here is known only when there is one; without KVM all are.
    paths = RackPaths(settings.scaled("tcg"), change.rack.name)
    for action in change.actions:
        spec, old = action.spec, action.old
        shrinks = spec is not None and old is not None and spec.memory < old.memory
        if action.kind == "update" and shrinks and observed[action.blade].state == "running":
            assert spec is not None
            assert old is not None
            balloon.check(paths, spec, old.memory, spec.memory)
        if action.kind not in ("remove", "recreate") or action.blade not in observed:
            continue
        kept = action.kind == "recreate" and not action.loses
        try:
            if action.kind == "remove":
                lost = drain.lost_with(paths, observed, action.blade)
            else:
                lost = holdings.lost_with(paths, observed, action.blade, keeps_files=kept)
        except RacklessError as error:
            raise RacklessError(f"cannot tell what would be lost with {action.blade}: {error.message}",
                                hint="see `rackless status`; --force asks nobody") from None  # fmt: skip
        lost += [what for what in action.loses if action.kind == "recreate" and what not in lost]
        if lost:
            verb = "removing" if action.kind == "remove" else f"making anew ({'; '.join(action.reasons)})"
            raise RacklessError(f"{verb} {action.blade} would lose {' and '.join(lost)}",
                                hint="wait until it is unused, or --force")  # fmt: skip


def _edited(text: str, path: tuple[str, ...], fields: Mapping[str, Any]) -> str:
    """The file with these values at a path; the same file when it says so already in other words (1 GiB, 1024 MiB)."""
    edited = text
    for key, value in fields.items():
        if isinstance(value, Mapping):
            edited = _edited(edited, (*path, key), value)
        elif value is None:
            edited = rackedit.drop(edited, (*path, key))
        else:
            edited = rackedit.put(edited, (*path, key), value)
    return text if rackfile.parse(edited) == rackfile.parse(text) else edited


def _with(usual: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """What is usual with the fields in place of it, also within `disk`."""
    made = dict(usual)
    for key, value in fields.items():
        if isinstance(value, Mapping):
            made[key] = _with(made.get(key, {}), value)
        elif value is not None:
            made[key] = value
    return made


def _read(file: Path) -> tuple[str, Rack]:
    rack = rackfile.load(file)
    return file.read_text(encoding="utf-8"), rack
