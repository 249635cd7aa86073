"""Does a blade's persistent memory lose what was not persisted, and only that? Found out by cutting its power."""

from __future__ import annotations

import secrets
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator import agents, engine, holdings
from orchestrator.errors import RacklessError
from orchestrator.events import Emit, ignore
from orchestrator.faults import inject
from orchestrator.settings import RackPaths, Settings
from orchestrator.spec import BladeSpec

_LINE = 64


@dataclass(frozen=True)
class Verdict:
    """What a power failure left of two lines, of which one was persisted, and whether that is as it must be."""

    blade: str
    survive: float
    persisted_stayed: bool
    other_stayed: bool

    @property
    def honest(self) -> bool:
        """Persisted is kept. The other line is lost at 0 %, kept at 100 %, and may be either between."""
        return self.persisted_stayed and (0.0 < self.survive < 1.0 or self.other_stayed == (self.survive >= 1.0))

    def to_json(self) -> dict[str, Any]:
        """As `rackless pmem test --json` prints it."""
        return {**asdict(self), "honest": self.honest}

    def __str__(self) -> str:
        kept = {True: "is still there", False: "is gone"}
        return (f"{self.blade}: {'as it must be' if self.honest else 'NOT HONEST'}: the persisted line "
                f"{kept[self.persisted_stayed]}, the line that was only stored {kept[self.other_stayed]}")  # fmt: skip


def power_test(settings: Settings, rack: str, blade: str, survive: float = 0.0, seed: int = 0, force: bool = False,
               emit: Emit = ignore) -> Verdict:  # fmt: skip
    """Store two lines, persist one, cut the blade's power, start it again, and look.

    The lines are in a page that is nobody's. Refused when memory of the blade is in use, unless by `force`.
    RacklessError: no such blade, no persistent memory, not in a mode with lines, or it does not come back.
    """
    observed = engine.observe(settings, rack)
    spec = _spec(observed.get(blade), rack, blade)
    paths = RackPaths(settings.scaled("tcg"), rack)  # how slow blades answer is not known here
    if not force and (lost := holdings.lost_with(paths, observed, blade, keeps_files=True)):
        raise RacklessError(f"cutting the power of {blade} would lose {' and '.join(lost)}",
                            hint="wait until it is unused, or force it")  # fmt: skip

    def ask(op: str, **fields: Any) -> dict[str, Any]:
        return agents.call(paths, blade, spec.mgmt_address, op, paths.settings.control_seconds, **fields)

    line = secrets.token_hex(_LINE)
    ask("pmem.mark", line=line)
    if ask("pmem.look")["lines"] != [line, line]:
        raise RacklessError(f"{blade} does not have what was just stored", hint="this is a defect, please report it")
    inject.reset(settings, rack, blade, emit, survive=f"{survive * 100:g} %", seed=seed)
    persisted, other = (found == line for found in ask("pmem.look")["lines"])
    return Verdict(blade, survive, persisted, other)


def _spec(seen: Any, rack: str, blade: str) -> BladeSpec:
    if seen is None or seen.spec is None or seen.state != "running":
        raise RacklessError(f"no blade {blade} runs in rack {rack}", hint="see `rackless status`")
    spec: BladeSpec = seen.spec
    if not spec.pmem:
        raise RacklessError(f"{blade} has no persistent memory", hint="give it `pmem` in the rack file")
    return spec
