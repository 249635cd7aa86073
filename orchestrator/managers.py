"""What the host asks of the splitkernel's global managers: vNodes, where programs run, signals to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator import agents
from orchestrator.errors import RacklessError
from orchestrator.settings import RackPaths
from orchestrator.spec import BladeSpec


def ask(paths: RackPaths, blades: Mapping[str, BladeSpec], op: str, **fields: Any) -> dict[str, Any]:
    """One request to the managers, on the first manager blade of the running `blades`.

    Raises RacklessError with what they say against it, or if nobody answers.
    """
    managers = sorted((spec for spec in blades.values() if spec.kind == "manager"), key=lambda spec: spec.index)
    if not managers:
        raise RacklessError("no manager blade runs", hint="see `rackless status`; `rackless up` mends it")
    seconds = paths.settings.managers_seconds
    return agents.call(paths, managers[0].name, managers[0].mgmt_address, op, seconds, **fields)


def place(paths: RackPaths, blades: Mapping[str, BladeSpec], vnode: str | None, on: str | None) -> str:
    """The processor blade for a program of `vnode` (None: the default one); `on`, if that is one of its blades."""
    return str(ask(paths, blades, "program.place", vnode=vnode, on=on)["blade"])


def send_signal(paths: RackPaths, blade: BladeSpec, program: str, name: str) -> None:
    """Send a signal (TERM, 9) to a program (BLADE.PID) that runs on `blade`. Raises RacklessError if it does not."""
    seconds = paths.settings.control_seconds
    agents.call(paths, blade.name, blade.mgmt_address, "process.kill", seconds, id=program, signal=name)
