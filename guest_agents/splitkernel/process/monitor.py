"""The process monitor of a processor blade: programs' remote memory, and their files under /vnode."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from guest_agents import control
from guest_agents.config import AgentConfig
from guest_agents.splitkernel.managers.storage import buffers
from guest_agents.splitkernel.memory.buffers import SERVICE as BUFFERS
from guest_agents.splitkernel.process import figures
from guest_agents.splitkernel.process.belonging import Belonging
from guest_agents.splitkernel.process.buffers import Buffered
from guest_agents.splitkernel.process.desk import Desk, Stock
from guest_agents.splitkernel.process.following import Following
from guest_agents.splitkernel.process.memory import Lender
from guest_agents.splitkernel.process.patience import Patient
from guest_agents.splitkernel.process.roots import Roots
from guest_agents.splitkernel.process.swap import Swap
from guest_agents.splitkernel.process.vnode import Vnode
from guest_agents.verbs.rpc import Client

SOCKET = Path("/run/rackless/split.sock")
JOBS = Path("/run/rackless/jobs")
CONNECT_SECONDS = 10.0
"""A storage blade that takes longer to answer counts as away, and is tried again."""
BUFFER_SECONDS = 45.0
"""A memory blade waits for a storage blade no longer than that: when it is given up, nothing is under way there."""
log = logging.getLogger("rackless.process")


class Mounted:
    """The files of a storage blade, and the way their data takes.

    blade -- the storage blade that has them now
    """

    def __init__(self, data: Buffered, client: str, blade: Callable[[], str | None]) -> None:
        self.data = data
        self.blade = blade
        self.vnode = Vnode(Patient(data), client)

    def counts(self) -> tuple[Counter[str], Counter[str]]:
        """Requests of the kernel, bytes and what buffers answered; what was asked of blades, by opcode."""
        by_opcode = Counter(self.vnode.tally.counts())
        by_opcode.update(self.data.tally.counts())
        return Counter({**self.vnode.counts, **self.data.counts}), by_opcode


def handlers(config: AgentConfig, port: int = control.PORT) -> dict[str, control.Handler]:
    """Start the process monitor of this blade; what it adds to the agent's control server.

    port -- where other agents' control servers listen
    """
    mounts: dict[str, Mounted] = {}
    SOCKET.parent.mkdir(parents=True, exist_ok=True)
    lender = Lender(config.name, config.secret, lambda: config.peers("memory"), port, config.node.introduction,
                    config.node.device)  # fmt: skip
    config.watch("memory", lender.members)

    def mounted(client: str, blade: Callable[[], str | None]) -> Mounted:
        """The files of a storage blade, wherever they are now; no two mounts are of one `client`."""

        def home(path: str) -> tuple[str, str] | None:
            storage = blade()
            living = [name for name in config.peers("memory") if lender.stays(name)]
            memory = buffers(config.holder.ledger.vnodes, storage, path, living) if storage is not None else None
            return (storage, memory) if storage is not None and memory is not None else None

        def caller(memory: str) -> Client:
            return Client(config.node, BUFFERS, lambda: _agent(config, port, "memory", memory), BUFFER_SECONDS)

        storage = Following(blade, lambda name: Client(config.node, "storage",
                                                       lambda: _agent(config, port, "storage", name)))  # fmt: skip
        return Mounted(Buffered(storage, home, caller), client, blade)

    first = mounted(config.name, lambda: config.holder.ledger.home(config.peers("storage")))
    threading.Thread(target=_serve, args=(first.vnode, config.vnode), name="vnode", daemon=True).start()

    def serve_blade(blade: str, where: Path) -> None:
        # Not under the name that /vnode has, which may be of the same blade: each empties the attic of its own name.
        ledger = config.holder.ledger
        made = mounts[where.name] = mounted(f"{config.name}.{where.name}",
                                            lambda: config.holder.ledger.followed(blade, ledger))  # fmt: skip
        _serve(made.vnode, where)

    def call(blade: str, op: str, **fields: Any) -> control.Message:
        address = config.peers("processor").get(blade)
        if address is None:
            raise control.ControlError(f"no processor blade {blade} lives in the rack", "see `rackless status`")
        return control.call((address, port), config.secret, op, **fields)

    def storage() -> dict[str, Any]:
        """By storage blade: requests of the kernel, what was asked for them by opcode, bytes."""
        counts: dict[str, tuple[Counter[str], Counter[str]]] = {}
        for files in [first, *mounts.values()]:
            blade = files.blade()
            if blade is None:
                continue
            sums, by_opcode = counts.setdefault(blade, (Counter(), Counter()))
            for total, more in zip((sums, by_opcode), files.counts(), strict=True):
                total.update(more)
        return {blade: {**sums, "by_opcode": dict(by_opcode)} for blade, (sums, by_opcode) in counts.items()}

    roots = Roots(serve_blade, left=lambda blade: config.holder.ledger.left(blade))
    belonging = Belonging(config.name, config.holder, roots.of, call)
    swap = Swap()
    desk = Desk(SOCKET, Stock(JOBS, config.excache, lender, belonging, storage, swap=swap))
    desk.start()

    def stats(request: control.Message) -> control.Message:
        del request
        return {"programs": desk.programs, "storage": storage(), "running": figures.running(belonging.programs)}

    def kill(request: control.Message) -> control.Message:
        belonging.kill(str(request["id"]), str(request["signal"]))
        return {}

    return {"process.stats": stats, "process.kill": kill,
            "process.drain": lambda request: drain(lender, swap, request)}  # fmt: skip


def drain(lender: Lender, swap: Swap, request: control.Message) -> control.Message:
    """process.drain: have programs take what they have on the blade `memory` elsewhere; no more so with `cancel`.

    ControlError while programs of the second tier run: where their pages are only the kernel knows, and they stay.
    """
    leaving = not request.get("cancel")
    if leaving and swap.used:
        raise control.ControlError("static programs run on it, and their memory cannot move to other memory blades",
                                   "wait for them to end, or --force: those with memory there end")  # fmt: skip
    lender.drain(str(request["memory"]), leaving)
    return {}


def _agent(config: AgentConfig, port: int, kind: str, blade: str | None) -> control.ControlClient:
    blades = config.peers(kind)
    if not blades:
        raise control.ControlError(f"the rack has no {kind} blade", "add one to have files under /vnode")
    if blade not in blades:
        raise control.ControlError(f"{kind} blade {blade} is not there", "is it up?")
    return control.ControlClient((blades[blade], port), config.secret, CONNECT_SECONDS)


def _serve(vnode: Vnode, where: Path) -> None:
    try:
        vnode.serve(where)
    except OSError:
        log.exception("no %s on this blade", where)
