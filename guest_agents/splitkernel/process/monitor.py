"""The process monitor of a processor blade: programs' remote memory, and their files under /vnode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from guest_agents import control
from guest_agents.config import AgentConfig
from guest_agents.splitkernel.process.desk import Desk
from guest_agents.splitkernel.process.memory import Lender

SOCKET = Path("/run/rackless/split.sock")
JOBS = Path("/run/rackless/jobs")


def handlers(config: AgentConfig, port: int = control.PORT) -> dict[str, control.Handler]:
    """Start the process monitor of this blade; what it adds to the agent's control server.

    port -- where other agents' control servers listen
    """
    lender = Lender(config.name, config.secret, lambda: config.peers("memory"), port)
    storage: dict[str, Any] = {}
    desk = Desk(SOCKET, JOBS, config.excache, lender, lambda: storage)
    desk.start()

    def stats(request: control.Message) -> control.Message:
        del request
        return {"programs": desk.programs, "storage": storage}

    return {"process.stats": stats}
