"""The storage monitor: a file service over RDMA, stateless, below one directory of the blade's disk."""

from __future__ import annotations

from guest_agents import control
from guest_agents.config import AgentConfig
from guest_agents.splitkernel.storage.files import Files
from guest_agents.splitkernel.storage.wire import Op
from guest_agents.verbs import rpc

SERVICE = "storage"


def handlers(config: AgentConfig) -> dict[str, control.Handler]:
    """Start the storage monitor of this blade; what it adds to the agent's control server."""
    files = Files(config.storage_root)
    rpc.offer(config.node, SERVICE, files.handle, slow={Op.FSYNC})
    return {"storage.stats": lambda _request: stats(files)}


def stats(files: Files) -> control.Message:
    """storage.stats: requests so far, in all and by opcode, and the room on the disk."""
    disk = files.statfs()
    return {
        **files.counts,
        "by_opcode": files.tally.counts(),
        "bytes_total": disk.f_blocks * disk.f_frsize,
        "bytes_free": disk.f_bavail * disk.f_frsize,
    }
