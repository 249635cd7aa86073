"""Calls from the host to the agents in the blades, over the control channel of guest_agents/control.py."""

from __future__ import annotations

from typing import Any

from guest_agents import control
from orchestrator.errors import RacklessError
from orchestrator.network import place
from orchestrator.settings import RackPaths
from orchestrator.ssh.keys import ensure_secret


def client(paths: RackPaths, address: str, timeout: float) -> control.ControlClient:
    """An open control connection to the agent at a management address; ControlError when there is none."""

    def connect(where: tuple[str, int], seconds: float) -> Any:
        return place.of(paths).connect(where[0], where[1], seconds)

    return control.ControlClient((address, paths.settings.control_port), ensure_secret(paths), timeout, connect)


def call(paths: RackPaths, blade: str, address: str, op: str, timeout: float, **fields: Any) -> dict[str, Any]:
    """One request to one agent. RacklessError names the blade and says what was wrong."""
    try:
        with client(paths, address, timeout) as agent:
            return agent.call(op, timeout, **fields)
    except control.ControlError as error:
        hint = error.hint or f"see `rackless logs {blade}`"
        raise RacklessError(f"{blade}: {error.error}", hint=hint, log=paths.blade(blade).console) from None
