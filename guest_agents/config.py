"""What an agent tells its monitors about the blade and the rack they are part of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from guest_agents.budget import Budget
from guest_agents.splitkernel.managers.holder import Holder
from guest_agents.verbs.node import Node


@dataclass(frozen=True)
class AgentConfig:
    """Configuration of one agent; sizes in bytes, times in seconds."""

    name: str
    """Name of this blade, such as pb0."""

    node: Node
    """This blade's RDMA endpoint, shared by all monitors of the agent."""

    secret: bytes
    """The rack's secret: authenticates control connections."""

    peers: Callable[[str], dict[str, str]]
    """Blades of a kind that are in the rack now: name -> management address. Asked whenever one is needed."""

    budget: Budget
    """The memory this blade gives to others."""

    holder: Holder
    """This blade's copy of the global managers' ledger, and its line to them."""

    watch: Callable[[str, Callable[[dict[str, int]], None]], None] = lambda kind, changed: None
    """Have a function called whenever blades come or go, with those of a kind that are alive: name -> incarnation."""

    excache: Callable[[], int] = lambda: 64 << 20
    """Default ExCache of a program on a processor blade."""

    storage_root: Path = Path("/srv/vnode")
    """Directory of a storage blade that holds the files of /vnode."""

    vnode: Path = Path("/vnode")
    """Where a processor blade mounts them."""
