"""The process monitor of a processor blade: programs' remote memory, and their files under /vnode."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

from guest_agents import control
from guest_agents.config import AgentConfig
from guest_agents.splitkernel.process.desk import Desk
from guest_agents.splitkernel.process.memory import Lender
from guest_agents.splitkernel.process.patience import Patient
from guest_agents.splitkernel.process.vnode import Vnode
from guest_agents.verbs.rpc import Client

SOCKET = Path("/run/rackless/split.sock")
JOBS = Path("/run/rackless/jobs")
CONNECT_SECONDS = 10.0
"""A storage blade that takes longer to answer counts as away, and is tried again."""
log = logging.getLogger("rackless.process")


def handlers(config: AgentConfig, port: int = control.PORT) -> dict[str, control.Handler]:
    """Start the process monitor of this blade; what it adds to the agent's control server.

    port -- where other agents' control servers listen
    """
    SOCKET.parent.mkdir(parents=True, exist_ok=True)
    vnode = _vnode(config, port)
    threading.Thread(target=_serve, args=(vnode, config.vnode), name="vnode", daemon=True).start()

    def storage() -> dict[str, Any]:
        names = sorted(config.peers("storage"))[:1]
        return {name: dict(vnode.counts) for name in names}

    lender = Lender(config.name, config.secret, lambda: config.peers("memory"), port)
    config.watch("memory", lender.members)
    desk = Desk(SOCKET, JOBS, config.excache, lender, storage)
    desk.start()

    def stats(request: control.Message) -> control.Message:
        del request
        return {"programs": desk.programs, "storage": storage()}

    return {"process.stats": stats}


def _vnode(config: AgentConfig, port: int, blade: str | None = None, top: str = "") -> Vnode:
    """The files of a storage blade, or a subtree `top` of them; without `blade` of the first there is."""
    client = Client(config.node, "storage", lambda: _storage(config, port, blade))
    return Vnode(Patient(client), config.name, top)


def _storage(config: AgentConfig, port: int, blade: str | None) -> control.ControlClient:
    blades = config.peers("storage")
    if not blades:
        raise control.ControlError("the rack has no storage blade", "add one to have files under /vnode")
    name = blade or min(blades)
    if name not in blades:
        raise control.ControlError(f"storage blade {name} is not there", "is it up?")
    return control.ControlClient((blades[name], port), config.secret, CONNECT_SECONDS)


def _serve(vnode: Vnode, where: Path) -> None:
    try:
        vnode.serve(where)
    except OSError:
        log.exception("no %s on this blade", where)
