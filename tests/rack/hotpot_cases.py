"""Which crashes the matrix on blades has: every step of every protocol, by everybody who does it, with every fate."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

MANAGER = "gm0"
OWNERS = ("mb0", "mb1", "mb2")
BLADES = (MANAGER, *OWNERS)
FATES = ("reboot", "lost", "away", "partition")
"""reboot: it comes back with its persistent memory. lost: without. away: with it, when others have taken over."""
MODES = ("mrmw", "mrsw")
_WHENS = ("send", "serve", "served", "sent")
_BOTH = [
    *(f"{when} {op}" for op in ("commit_now", "release", "replica", "seed", "synced", "update", "beat", "caching")
      for when in _WHENS),
    *(f"persist {media}" for media in ("log", "log-copies", "intents", "home", "copies", "datasets", "node")),
]  # fmt: skip
_OWN = {
    "mrmw": [f"{when} {op}" for op in ("prepare", "commit") for when in _WHENS],
    "mrsw": [f"{when} {op}" for op in ("acquire", "let_go") for when in _WHENS],
}
_AT_MANAGER = {"synced", "beat", "acquire", "let_go"}
"""Operations that the manager serves, and others ask for."""
_BY_OWNER = {"replica", "seed", "synced", "update"}
_AT_OWNER = {"commit_now", "release", "prepare", "commit", "caching"}
_EARLY = {"seed", "caching", "synced", "node", "datasets"}
"""What happens when a dataset is new, and then seldom."""


@dataclass(frozen=True)
class Case:
    """What happens to whom."""

    mode: str
    fate: str
    step: str
    count: int
    seed: int

    @property
    def words(self) -> str:
        """As the command line takes it."""
        return f"{self.mode} {self.fate} {self.step.replace(' ', '_')} {self.count} {self.seed}"

    @property
    def rand(self) -> random.Random:
        """What is by lot in it."""
        return random.Random(self.words)

    @property
    def victim(self) -> str:
        """A blade that does this step."""
        when, what = self.step.split()
        if what == "datasets" or (when.startswith("serve") and what in _AT_MANAGER):
            return MANAGER
        at_owner = when.startswith("serve") and what in _AT_OWNER
        by_owner = when.startswith("sen") and what in (_BY_OWNER | _AT_MANAGER)
        if at_owner or by_owner or what in ("home", "log"):
            return self.rand.choice(OWNERS)
        return self.rand.choice(BLADES)

    @property
    def degrees(self) -> tuple[int, ...]:
        """Copies that commits ask for: at least two, where one place is going to be lost."""
        survives = self.fate in ("reboot", "partition") and self.victim != MANAGER
        return (1, 2, 3) if survives else (2, 2, 3)

    @property
    def early(self) -> bool:
        """Whether the step is waited for from the beginning."""
        return self.step.split()[1] in _EARLY

    @property
    def survive(self) -> float:
        """Probability that a line which was not persisted is there all the same."""
        return self.rand.choice([0.0, 0.5, 1.0])


def parse(words: list[str]) -> Case:
    """From the command line: MODE FATE STEP COUNT SEED."""
    mode, fate, step, count, seed = words
    return Case(mode, fate, step.replace("_", " ", 1), int(count), int(seed))


def matrix() -> list[Case]:
    """Every step with every fate, once, in an order that mixes them; those of both modes in each mode by turns."""
    both = [(MODES[sum(divmod(number, len(FATES))) % 2], step, fate)
            for number, (step, fate) in enumerate(itertools.product(_BOTH, FATES))]  # fmt: skip
    own = [(mode, step, fate) for mode in MODES for step, fate in itertools.product(_OWN[mode], FATES)]
    cases = [Case(mode, fate, step, 1 + number % 3, number) for number, (mode, step, fate) in enumerate(both + own)]
    random.Random(2017).shuffle(cases)
    return cases


def chosen(count: int, first: int = 0) -> list[Case]:
    """`count` cases from the `first` one on: those of the matrix, then others by lot."""
    cases = matrix()
    rand = random.Random(0)
    while len(cases) < first + count:
        mode = rand.choice(MODES)
        step = rand.choice([*_BOTH, *_OWN[mode]])
        cases.append(Case(mode, rand.choice(FATES), step, rand.randint(1, 8), 1000 + len(cases)))
    return cases[first : first + count]
