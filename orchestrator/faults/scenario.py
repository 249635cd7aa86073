"""Scenarios: what is broken and healed when, from a YAML file.

    seed: 7                                   # for what is random; may be left out
    steps:
      - at 10 s kill mb0
      - at 12 s to 18 s pause any processor   # some time in between, one of them
      - at 20 s heal

Everything random is drawn before the first step, from the seed: the same file, seed and rack give the same steps.
And all steps are rehearsed before: a scenario that would be refused at its end has touched nothing.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator import journal, yamltext
from orchestrator.errors import RacklessError
from orchestrator.events import Emit, Note
from orchestrator.faults import inject
from orchestrator.faults.inject import Transform
from orchestrator.faults.model import POWER
from orchestrator.fields import KINDS, did_you_mean
from orchestrator.settings import RackPaths, Settings
from orchestrator.units import parse_duration

_WORD = re.compile(r"[+-]?[0-9.]+ ?(?:%|[A-Za-zµ][A-Za-z/]*)|\S+")
_LINK = ("latency", "jitter", "loss", "corruption", "duplication", "bandwidth")
_HINT = 'steps look like "at 10 s kill mb0"; docs/operate.md has them all'


@dataclass(frozen=True)
class Step:
    """One line of a scenario. Between `earliest` and `latest` seconds after the start it happens."""

    earliest: float
    latest: float
    words: tuple[str, ...]
    where: str
    """File and line, for errors."""


@dataclass(frozen=True)
class Act:
    """One thing that happens: `at` seconds after the start."""

    at: float
    text: str
    transforms: tuple[Transform, ...]

    def to_json(self) -> dict[str, Any]:
        """When, and what."""
        return {"at": round(self.at, 3), "step": self.text}

    def __str__(self) -> str:
        return f"{self.at:8.2f} s  {self.text}"


@dataclass(frozen=True)
class Scenario:
    """The steps of a file, and the seed for what is random in them."""

    seed: int
    steps: tuple[Step, ...]

    def acts(self, kinds: dict[str, str]) -> list[Act]:
        """What happens, in order of time, on a rack with these blades. RacklessError for a step that cannot be."""
        chance = random.Random(self.seed)
        acts = []
        for step in self.steps:
            at = chance.uniform(step.earliest, step.latest)
            words = _drawn(step, kinds, chance)
            if "survive" in words and "seed" not in words:
                words += ["seed", str(chance.getrandbits(31))]
            try:
                acts.append(Act(at, " ".join(words), _transforms(words)))
            except RacklessError as error:
                raise _wrong(step.where, error.message, error.hint) from None
        return sorted(acts, key=lambda act: act.at)


def load(file: Path, seed: int | None = None) -> Scenario:
    """Read a scenario; `seed` counts in place of the file's. Raises RacklessError that names the line."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "this is not UTF-8 text"
        raise RacklessError(f"{file}: {reason}", hint=_HINT) from None
    document = yamltext.read(text)
    for line, _, message in document.problems:
        raise _wrong(f"{file}:{line}", message)
    data = document.data
    if not isinstance(data, dict) or "steps" not in data:
        raise _wrong(f"{file}:1", "there are no steps")
    for key in data:
        if key not in ("steps", "seed"):
            raise _wrong(f"{file}:{document.line((key,))}", f'unknown key "{key}"; write steps or seed')
    said = data.get("seed", 0)
    if not isinstance(said, int):
        raise _wrong(f"{file}:{document.line(('seed',))}", "the seed is not a whole number")
    steps = data["steps"]
    lines = steps.split(";") if isinstance(steps, str) else steps
    if not isinstance(lines, list) or not lines or not all(isinstance(line, str) for line in lines):
        raise _wrong(f"{file}:{document.line(('steps',))}", "the steps are not a list of lines")
    places = [f"{file}:{document.line(('steps', str(n)))}" for n in range(len(lines))]
    return Scenario(said if seed is None else seed, tuple(map(_step, lines, places)))


def rehearse(settings: Settings, rack: str, scenario: Scenario) -> list[Act]:
    """What will happen. RacklessError, with nothing touched, when a step of it would be refused."""
    acts: list[Act] = []

    def one_by_one(kinds: dict[str, str]) -> list[Transform]:
        acts.extend(scenario.acts(kinds))
        return [_told(act, transform) for act in acts for transform in act.transforms]

    inject.rehearse(settings, rack, one_by_one)
    return acts


def play(settings: Settings, rack: str, acts: list[Act], emit: Emit) -> list[dict[str, Any]]:
    """Do what was rehearsed, each when its time has come or those before it are done; when each began and ended."""
    started = time.monotonic()
    told = journal.recording(RackPaths(settings, rack), emit)
    done = []
    for act in acts:
        time.sleep(max(0.0, started + act.at - time.monotonic()))
        begun = time.monotonic() - started
        told(Note(f"{rack}: {act.text}"))
        for transform in act.transforms:
            inject.change(settings, rack, transform, emit=emit)  # which records by itself
        done.append({**act.to_json(), "begun": round(begun, 3), "ended": round(time.monotonic() - started, 3)})
    return done


def _step(line: str, where: str) -> Step:
    words = _WORD.findall(line)
    if len(words) < 3 or words[0] != "at":
        raise _wrong(where, f'"{line.strip()}" does not begin with a time')
    span = words[1:4:2] if words[2] == "to" else words[1:2]
    try:
        times = [parse_duration(word) for word in span]
    except ValueError as error:
        raise _wrong(where, str(error)) from None
    if times[0] > times[-1]:
        raise _wrong(where, f"{span[0]} is after {span[-1]}")
    return Step(times[0], times[-1], tuple(words[2 * len(times) :]), where)


def _drawn(step: Step, kinds: dict[str, str], chance: random.Random) -> list[str]:
    """The words of a step, each "any" (and the kind behind it) replaced by a blade."""
    words, drawn = list(step.words), []
    while words:
        word = words.pop(0)
        if word == "any":
            kind = words.pop(0) if words and words[0] in KINDS else None
            choice = [name for name in sorted(kinds) if kind in (None, kinds[name])]
            if not choice:
                raise _wrong(step.where, f"the rack has no {kind} blade")
            word = chance.choice(choice)
        drawn.append(word)
    return drawn


def _transforms(words: list[str]) -> tuple[Transform, ...]:
    """What the words of a step mean. RacklessError when they mean nothing."""
    verb, rest = words[0], words[1:]
    if verb not in _VERBS:
        raise RacklessError(f'nothing is called "{verb}"', hint=did_you_mean(verb, [*_VERBS]))
    made = _VERBS[verb](rest)
    if made is None:
        raise RacklessError(f'"{" ".join(words)}" has too few or too many words', hint=_HINT)
    return made if isinstance(made, tuple) else (made,)


def _flag(name: str) -> Callable[[list[str]], Transform | None]:
    return lambda blades: inject.breaking({blade: {name: True} for blade in blades}) if blades else None


def _value(name: str) -> Callable[[list[str]], Transform | None]:
    return lambda words: inject.breaking({words[0]: {name: words[1]}}) if len(words) == 2 else None


def _kill(words: list[str]) -> Transform | None:
    """BLADE... [survive SHARE] [seed NUMBER]: how the power fails is said last."""
    end = next((number for number, word in enumerate(words) if word in POWER), len(words))
    blades, names, values = words[:end], words[end::2], words[end + 1 :: 2]
    if not blades or len(names) != len(values) or not {*names} <= {*POWER}:
        return None
    how: dict[str, Any] = {"killed": True, **dict(zip(names, values, strict=True))}
    return inject.breaking(dict.fromkeys(blades, how))


def _reset(words: list[str]) -> tuple[Transform, ...] | None:
    kill = _kill(words)
    if kill is None or (len(words) > 1 and words[1] not in POWER):
        return None
    return kill, inject.healing(words[:1], ("killed",))


def _several(flags: Mapping[str, str], values: Mapping[str, str]) -> Callable[[list[str]], Transform | None]:
    """A verb with several faults after its blade: words that stand alone, and words with a value; by fault."""

    def parse(words: list[str]) -> Transform | None:
        wanted: dict[str, Any] = {}
        rest = words[1:]
        while rest:
            name = rest.pop(0)
            if name in flags:
                wanted[flags[name]] = True
            elif name in values and rest:
                wanted[values[name]] = rest.pop(0)
            else:
                return None
        return inject.breaking({words[0]: wanted}) if wanted else None

    return parse


_VERBS: dict[str, Callable[[list[str]], Transform | tuple[Transform, ...] | None]] = {
    "kill": _kill,
    "pause": _flag("paused"),
    "resume": lambda blades: inject.healing(blades, ("paused",)) if blades else None,
    "reset": _reset,
    "slow": _value("cpu"),
    "pressure": _value("memory"),
    "clock": _value("clock"),
    "disk": _several({"full": "disk_full"}, {"latency": "disk_latency", "errors": "disk_errors"}),
    "link": _several({"down": "down"}, {name: name for name in _LINK}),
    "one-way": lambda pair: inject.deafening(*pair) if len(pair) == 2 else None,
    "partition": lambda groups: inject.parting([group.split(",") for group in groups]) if groups else None,
    "heal": lambda blades: inject.healing(blades),
}


def _told(act: Act, transform: Transform) -> Transform:
    """The same, whose errors say at which step."""

    def tell(blades: inject.Blades) -> inject.Many:
        try:
            return transform(blades)
        except RacklessError as error:
            raise _wrong(f"at {act.at:.1f} s {act.text}", error.message, error.hint) from None

    return tell


def _wrong(where: str, message: str, hint: str | None = _HINT) -> RacklessError:
    return RacklessError(f"{where}: {message}", hint=hint)
