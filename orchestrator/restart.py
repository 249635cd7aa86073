"""Restart agents or whole blades of a running rack one after the other, and only as long as all others are well."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator import engine, holdings, journal
from orchestrator.errors import RacklessError
from orchestrator.events import Emit, ignore, step
from orchestrator.faults import inject
from orchestrator.fields import did_you_mean
from orchestrator.settings import RackPaths, Settings
from orchestrator.ssh import client
from orchestrator.status import status

What = Literal["agents", "blades"]

_RESTART = "sv -w 30 restart /etc/rackless/services/agent"
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Turn:
    """One blade of a rolling restart."""

    blade: str
    address: str
    uptime: float
    """Seconds that its agent has run."""


def turns(settings: Settings, rack: str, names: Collection[str], older_than: float) -> list[Turn]:
    """Whose turn it is: of the named blades, or of all, those whose agent has run longer than `older_than` seconds.

    RacklessError when a blade is not there, or any blade of the rack is not well.
    """
    blades = _well(settings, rack)
    for name in names:
        if name not in blades:
            raise RacklessError(f"no blade {name} in rack {rack}", hint=did_you_mean(name, [*blades]))
    chosen = [blade for name, blade in blades.items() if name in names or not names]
    found = [Turn(b["name"], b["mgmt_address"], float(b["agents"]["uptime_seconds"])) for b in chosen]
    return [turn for turn in found if turn.uptime > older_than]


def rolling(
    settings: Settings,
    rack: str,
    what: What,
    names: Collection[str] = (),
    older_than: float = 0.0,
    force: bool = False,
    dry: bool = False,
    emit: Emit = ignore,
) -> list[str]:
    """Restart agents, or blades by cutting their power; the blades whose turn it was. It has no undo.

    Before each, and after the last, all blades of the rack must be well. Refused, with nothing touched, when memory
    or programs would be lost with one of them, unless by `force`.
    """
    todo = turns(settings, rack, names, older_than)
    observed = engine.observe(settings, rack)
    paths = RackPaths(settings.scaled("tcg"), rack)  # how slow blades answer is not known here
    for turn in todo if not force else ():
        lost = holdings.lost_with(paths, observed, turn.blade, keeps_files=True)
        if lost:
            raise RacklessError(f"restarting {turn.blade} would lose {' and '.join(lost)}",
                                hint="wait until it is unused, or force it")  # fmt: skip
    for turn in todo if not dry else ():
        with step(journal.recording(paths, emit), rack, "restart", turn.blade):
            if what == "blades":
                inject.reset(settings, rack, turn.blade, emit)  # which records by itself
            else:
                with client.connect(paths, turn.blade, turn.address) as connection:
                    client.run(connection, _RESTART)
            _wait(paths, settings, rack)
    return [turn.blade for turn in todo]


def _well(settings: Settings, rack: str) -> dict[str, dict[str, Any]]:
    """The blades of the rack, which are all well. RacklessError otherwise."""
    blades = {str(blade["name"]): blade for blade in status(settings, rack)["blades"]}
    if not blades:
        raise RacklessError(f"rack {rack} is not up", hint="bring it up with `rackless up`")
    for name, blade in blades.items():
        if blade["state"] != "ready":
            raise RacklessError(f"{name} is {blade['state']}: no other blade is restarted now",
                                hint=f"`rackless heal {name}`, `rackless blade replace {name}`")  # fmt: skip
    return blades


def _wait(paths: RackPaths, settings: Settings, rack: str) -> None:
    deadline = time.monotonic() + paths.settings.ready_seconds
    while True:
        try:
            _well(settings, rack)
            return
        except RacklessError:
            if time.monotonic() > deadline:
                raise
        time.sleep(_POLL_SECONDS)
