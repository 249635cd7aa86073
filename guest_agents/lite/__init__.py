"""LITE: named memory, messages and synchronisation across the blades of a rack, for any program on a blade.

    from guest_agents import lite

    with lite.connect() as node:
        memory = node.malloc(1 << 20, on="mb0", name="notes")
        memory.write(b"hello", at=100)
        print(memory.read(5, at=100))

docs/lite.md explains it; the names of the paper (LT_...) are in the docstrings.
"""

from __future__ import annotations

from guest_agents.lite.buffers import Buffer
from guest_agents.lite.channel import Ticket
from guest_agents.lite.errors import (
    BadArgument,
    BadHandle,
    BadMessage,
    BarrierBroken,
    Cancelled,
    Freed,
    LiteError,
    ManagerLost,
    MessageTooLarge,
    NameTaken,
    NodeDead,
    NodeUnreachable,
    NoMemory,
    NoSuchName,
    NoSuchNode,
    NotHeld,
    NotJoined,
    OutOfRange,
    PermissionDenied,
    PortClosed,
    PortTaken,
    Revoked,
    RingFull,
    TimedOut,
)
from guest_agents.lite.lmr import Lmr
from guest_agents.lite.node import Member, Node, connect
from guest_agents.lite.permissions import Permission, Priority
from guest_agents.lite.rpc import Port, Request
from guest_agents.lite.sync import Lock

__all__ = [
    "BadArgument",
    "BadHandle",
    "BadMessage",
    "BarrierBroken",
    "Buffer",
    "Cancelled",
    "Freed",
    "LiteError",
    "Lmr",
    "Lock",
    "ManagerLost",
    "Member",
    "MessageTooLarge",
    "NameTaken",
    "NoMemory",
    "NoSuchName",
    "NoSuchNode",
    "Node",
    "NodeDead",
    "NodeUnreachable",
    "NotHeld",
    "NotJoined",
    "OutOfRange",
    "Permission",
    "PermissionDenied",
    "Port",
    "PortClosed",
    "PortTaken",
    "Priority",
    "Request",
    "Revoked",
    "RingFull",
    "Ticket",
    "TimedOut",
    "connect",
]
