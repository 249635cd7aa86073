"""The storage monitor: a file service over RDMA, stateless, below one directory of the blade's disk."""

from __future__ import annotations

from guest_agents import control
from guest_agents.config import AgentConfig
from guest_agents.splitkernel.storage.files import Files
from guest_agents.splitkernel.storage.hold import Hold
from guest_agents.splitkernel.storage.moving import Moving
from guest_agents.splitkernel.storage.wire import Op
from guest_agents.verbs import rpc

SERVICE = "storage"
LEAVING = "storage.leaving"
"""The same, also while it is held: for the blade that the files move to."""
CONNECT_SECONDS = 10.0


def handlers(config: AgentConfig, port: int = control.PORT) -> dict[str, control.Handler]:
    """Start the storage monitor of this blade; what it adds to the agent's control server.

    port -- where other agents' control servers listen
    """
    files, hold = Files(config.storage_root), Hold(config.storage_root)

    def handle(opcode: int, first: memoryview, second: memoryview, out: memoryview) -> tuple[int, int]:
        with hold.passing():
            return files.handle(opcode, first, second, out)

    def connect(blade: str) -> control.ControlClient:
        blades = config.peers("storage")
        if blade not in blades:
            raise control.ControlError(f"storage blade {blade} is not there", "is it up?")
        return control.ControlClient((blades[blade], port), config.secret, CONNECT_SECONDS)

    rpc.offer(config.node, SERVICE, handle, slow={Op.FSYNC})
    rpc.offer(config.node, LEAVING, files.handle)
    moving = Moving(config.storage_root, hold, config.holder.ask,
                    lambda blade: rpc.Client(config.node, LEAVING, lambda: connect(blade)))  # fmt: skip
    moving.start()
    return {"storage.stats": lambda _request: stats(files), **moving.handlers()}


def stats(files: Files) -> control.Message:
    """storage.stats: requests so far, in all and by opcode, and the room on the disk."""
    disk = files.statfs()
    return {
        **files.counts,
        "by_opcode": files.tally.counts(),
        "bytes_total": disk.f_blocks * disk.f_frsize,
        "bytes_free": disk.f_bavail * disk.f_frsize,
    }
