"""Break blades of a running rack, and heal them. What is broken is in each blade's metadata, before it is broken.

Every change goes the same way: the faults that blades have, those they would have, whether that can be, and then only
what differs. So a change that is there already changes nothing, and one that is refused has touched nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from orchestrator import engine, journal, lock, pmem
from orchestrator.errors import RacklessError
from orchestrator.events import Broken, Emit, Note, ignore, step
from orchestrator.faults import model, settle
from orchestrator.faults.model import Faults
from orchestrator.fields import did_you_mean
from orchestrator.hypervisor import domain, hosts
from orchestrator.hypervisor.domain import Owned
from orchestrator.hypervisor.hosts import Hosts
from orchestrator.parallel import together
from orchestrator.privilege import require_root
from orchestrator.settings import RackPaths, Settings
from orchestrator.spec import BladeSpec

Many = dict[str, Faults]
"""Faults by blade."""


@dataclass(frozen=True)
class Outcome:
    """Faults before and after a change, by blade."""

    rack: str
    before: Many
    after: Many

    @property
    def changed(self) -> tuple[str, ...]:
        """Blades whose faults are others now."""
        return tuple(name for name, faults in self.after.items() if faults != self.before[name])

    def to_json(self) -> dict[str, Any]:
        """As the commands print it with --json."""
        faults = {name: faults.to_json() for name, faults in self.after.items() if faults}
        return {"rack": self.rack, "changed": list(self.changed), "faults": faults}

    def lines(self) -> list[str]:
        """For people: the changed blades, with what is broken of each now."""
        return [f"{name}: {', '.join(self.after[name].shown()) or 'no faults'}" for name in self.changed]


@dataclass(frozen=True)
class Blades:
    """The blades of a rack that is up, with what libvirt says of each."""

    hosts: Hosts
    owned: Mapping[str, Owned]
    specs: Mapping[str, BladeSpec]
    faults: Many

    @property
    def paths(self) -> RackPaths:
        return self.hosts.paths

    @property
    def addresses(self) -> dict[str, str]:
        """Fabric addresses by name."""
        return {name: spec.fabric_address for name, spec in self.specs.items()}

    def must_have(self, name: str) -> None:
        """Raise RacklessError unless there is such a blade, and it is whole."""
        if name not in self.specs:
            raise RacklessError(f"no blade {name} in rack {self.paths.name}",
                                hint=did_you_mean(name, [*self.specs]))  # fmt: skip
        if not self.owned[name].metadata.get("ready"):
            raise RacklessError(f"blade {name} is not whole", hint="`rackless up` makes it anew")


def faults(settings: Settings, rack: str) -> Many:
    """The faults of every blade. Empty when the rack is not up."""
    with hosts.opened(RackPaths(settings, rack)) as machines:
        owned = _owned(machines)
    return {name: model.of(found.state, found.metadata) for name, found in owned.items()}


Transform = Callable[[Blades], Many]
"""Which blades shall have which faults, seeing what there is; RacklessError when that cannot be."""


def inject(settings: Settings, rack: str, wanted: Mapping[str, Mapping[str, Any]], dry: bool = False,
           emit: Emit = ignore) -> Outcome:  # fmt: skip
    """Give blades more faults: {"mb0": {"latency": "20 ms", "paused": True}}, units as in a rack file.

    Undone by `heal`. With `dry` everything is checked and nothing done. Raises RacklessError, before anything is
    touched, for an unknown blade or fault, a value that cannot be, and faults that contradict each other.
    """
    return change(settings, rack, breaking(wanted), dry, emit)


def partition(settings: Settings, rack: str, groups: list[list[str]], dry: bool = False,
              emit: Emit = ignore) -> Outcome:  # fmt: skip
    """Part the fabric into groups of blades; who is in none stays with the (first) manager. Undone by `heal`."""
    return change(settings, rack, parting(groups), dry, emit)


def heal(settings: Settings, rack: str, blades: list[str], names: tuple[str, ...] = (), dry: bool = False,
         emit: Emit = ignore) -> Outcome:  # fmt: skip
    """Undo faults of some blades, or of all when none is named; `names` are the faults, all when none is named."""
    return change(settings, rack, healing(blades, names), dry, emit)


def reset(settings: Settings, rack: str, name: str, emit: Emit = ignore, **how: Any) -> Outcome:
    """Cut a blade's power and bring it back, as pressing its button would: disks are kept, memory is not.

    how -- `survive` and `seed`, for its persistent memory: see faults/model.py
    """
    inject(settings, rack, {name: {"killed": True, **how}}, emit=emit)
    return heal(settings, rack, [name], ("killed",), emit=emit)


def breaking(wanted: Mapping[str, Mapping[str, Any]]) -> Transform:
    """More faults: see `inject`."""

    def add(blades: Blades) -> Many:
        for name in wanted:
            blades.must_have(name)
        for other in (other for more in wanted.values() for other in more.get("deaf_to", ())):
            blades.must_have(other)
        return {name: blades.faults[name].having(**more) for name, more in wanted.items()}

    for more in wanted.values():
        model.check_names(tuple(more))
    return add


def deafening(source: str, target: str) -> Transform:
    """One way less: `target` does not get what `source` sends. The other way, and other blades, are left alone."""

    def deafen(blades: Blades) -> Many:
        blades.must_have(target)
        return breaking({target: {"deaf_to": sorted({*blades.faults[target].deaf_to, source})}})(blades)

    return deafen


def parting(groups: list[list[str]]) -> Transform:
    """A partition: see `partition`."""

    def part(blades: Blades) -> Many:
        for name in (name for group in groups for name in group):
            blades.must_have(name)
        kinds = {name: spec.kind for name, spec in blades.specs.items()}
        manager = min((s for s in blades.specs.values() if s.kind == "manager"), key=lambda s: s.index).name
        sides = model.sides(groups, kinds, manager)
        parted = {name: faults.side for name, faults in blades.faults.items() if faults.side is not None}
        if parted and any(parted.get(name, 0) != side for name, side in sides.items()):
            raise RacklessError(f"rack {blades.paths.name} is parted already, in another way",
                                hint="`rackless heal --all --only side` first")  # fmt: skip
        return {name: blades.faults[name].having(side=side) for name, side in sides.items()}

    return part


def healing(blades: list[str], names: tuple[str, ...] = ()) -> Transform:
    """Fewer faults: see `heal`."""

    def less(found: Blades) -> Many:
        for name in blades:
            found.must_have(name)
        return {name: found.faults[name].without(*names) for name in blades or found.specs}

    model.check_names(names)
    return less


def change(settings: Settings, rack: str, transform: Transform, dry: bool = False, emit: Emit = ignore) -> Outcome:
    """Give blades the faults that `transform` says; the others keep theirs."""
    require_root("break blades")
    paths = RackPaths(settings, rack)
    with lock.hold(paths), _blades(paths) as blades:
        outcome = _outcome(blades, transform)
        if dry or not outcome.changed:
            return outcome
        emit, shown = journal.recording(paths, emit), emit
        returning = {name for name in outcome.changed if _returns(blades.faults[name], outcome.after[name])}
        with step(emit, rack, "faults"):
            _carry_out(blades, outcome, returning, emit)
            for name in outcome.changed:
                emit(Broken(rack, name, tuple(outcome.after[name].shown())))
        wanted = engine.as_it_is(dict(blades.owned), rack, hosts.noted(paths))
    if returning:
        engine.up(settings, wanted, shown, only=returning)  # which records by itself
    return outcome


def rehearse(settings: Settings, rack: str, acts: Callable[[dict[str, str]], list[Transform]]) -> None:
    """Check a series of changes, each after the ones before it. RacklessError for the first that would be refused.

    `acts` gives them, when told the blades with their kinds.
    """
    with _blades(RackPaths(settings, rack)) as blades:
        for transform in acts({name: spec.kind for name, spec in blades.specs.items()}):
            blades = replace(blades, faults=_outcome(blades, transform).after)


def _outcome(blades: Blades, transform: Transform) -> Outcome:
    outcome = Outcome(blades.paths.name, blades.faults, {**blades.faults, **transform(blades)})
    for name in outcome.changed:
        model.check(name, blades.faults[name], outcome.after[name], blades.specs[name])
    return outcome


@contextmanager
def _blades(paths: RackPaths) -> Iterator[Blades]:
    with hosts.opened(paths) as machines:
        owned = _owned(machines)
        if not owned:
            raise RacklessError(f"rack {paths.name} is not up", hint="bring it up with `rackless up`")
        accelerator = str(next(iter(owned.values())).metadata.get("accelerator"))
        specs: dict[str, BladeSpec] = {}
        for name, blade in owned.items():
            with suppress(ValueError):  # another version of Rackless made it: of that nothing can be broken
                specs[name] = blade.spec()
        faults = {name: model.of(owned[name].state, owned[name].metadata) for name in specs}
        scaled = replace(machines, paths=RackPaths(paths.settings.scaled(accelerator), paths.name))
        yield Blades(scaled, owned, specs, faults)


def _owned(machines: Hosts) -> dict[str, Owned]:
    """The rack's blades in the order of their places; none when it is not up."""
    found = machines.owned()

    def place(name: str) -> tuple[int, str]:
        spec = found[name].metadata.get("spec")
        return int(spec.get("index", 0)) if isinstance(spec, dict) else 0, name

    return {name: found[name] for name in sorted(found, key=place) if not domain.is_template(found[name])}


def _carry_out(blades: Blades, outcome: Outcome, returning: set[str], emit: Emit) -> None:
    """What changes on blades, all at once, and then who is on which side."""
    together({name: name for name in outcome.changed},
             lambda name: _one(blades, name, outcome, name in returning, emit))  # fmt: skip
    indexes = {name: blades.specs[name].index for name in outcome.changed}
    sides = {indexes[name]: outcome.after[name].side or 0 for name in outcome.changed
             if outcome.after[name].side != outcome.before[name].side}  # fmt: skip
    if sides:
        settle.side(blades.hosts, sides)


def _returns(old: Faults, new: Faults) -> bool:
    """Is it started again: it was killed, or has to be so that its disk can be used."""
    return not new.killed and (old.killed or model.shuts_files(old, new))


def _one(blades: Blades, name: str, outcome: Outcome, returns: bool, emit: Emit) -> None:
    """Change one blade. Its metadata name a fault before it is there, and until it is gone."""
    old, new = outcome.before[name], outcome.after[name]
    owned, spec = blades.owned[name], blades.specs[name]

    def note(faults: Faults) -> None:
        metadata = {**owned.metadata, "faults": faults.to_json()}
        domain.explain(f"mark {name}", lambda: domain.write_metadata(owned.domain, metadata))

    note(Faults.model_validate({**old.to_json(), **new.to_json()}))
    if returns and not old.killed:
        _cut_power(blades, owned, spec, new, emit)
    elif not old.killed:
        try:
            _act(blades, owned, spec, old, new, emit)
        except RacklessError:
            if set(new.names) - set(old.names):  # it is refused: the blade is as it was
                with suppress(RacklessError):
                    _act(blades, owned, spec, new, old, emit)
                note(old)
            raise
    # One that returns is made anew with what its metadata say, and is killed until then.
    note(new.having(killed=True) if returns else new)


def _act(blades: Blades, owned: Owned, spec: BladeSpec, old: Faults, new: Faults, emit: Emit) -> None:
    running, was, shall = owned.domain, old.to_json(), new.to_json()

    def differs(*names: str) -> bool:
        return any(was.get(name) != shall.get(name) for name in names)

    if old.paused and not new.paused:
        domain.explain(f"resume {spec.name}", running.resume)
    if differs(*model.INSIDE):
        settle.inside(blades.hosts, spec, new, blades.addresses)
    if differs("down"):
        settle.cable(running, spec, new)
    if differs("cpu"):
        settle.cpus(running, spec, new)
    if new.paused and not old.paused:
        domain.explain(f"pause {spec.name}", running.suspend)
    if new.killed and not old.killed:
        _cut_power(blades, owned, spec, new, emit)


def _cut_power(blades: Blades, owned: Owned, spec: BladeSpec, faults: Faults, emit: Emit) -> None:
    domain.explain(f"kill {spec.name}", partial(domain.cut_power, owned.domain))
    if spec.pmem:
        crash = blades.hosts.do(owned.host, "pull_power", name=spec.name, survive=faults.survive or 0.0,
                                seed=faults.seed or 0)  # fmt: skip
        emit(Note(f"{spec.name}: {pmem.Crash(**crash)}"))
