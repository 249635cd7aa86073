"""What a handle allows, and how urgent an operation is. The numbers are those of lite.h, and of LITE's public code."""

from __future__ import annotations

from enum import IntEnum, IntFlag


class Permission(IntFlag):
    """Rights on an LMR; combine with `|`."""

    NONE = 0
    READ = 1
    """Read, gather, be the source of a copy."""
    WRITE = 2
    """Write, scatter, memset, be the target of a copy."""
    SHARE = 4
    """The LMR may be mapped by its name by other processes (asked of its name, not of a handle)."""
    ADMIN = 8
    """Be a master: free, move, grant, revoke, name other masters."""
    ATOMIC = 16
    """fetch_add and compare_swap."""

    USE = READ | WRITE
    ALL = READ | WRITE | SHARE | ADMIN | ATOMIC


class Priority(IntEnum):
    """How urgent an operation is; matters when the blade's agent has QoS switched on."""

    NORMAL = 0
    HIGH = 1
    LOW = 2
