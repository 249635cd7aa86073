"""The blades of experiment `excache`, and what is known of its programs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fabric import Connection


@dataclass
class Bed:
    """The blades, and what is known of the programs by now."""

    near: Connection
    """Programs run here."""
    far: Connection
    """It lends its memory."""
    disk: Connection
    """As `near`, but with a disk; also where files are."""
    address: str
    """Of `far`, on the fabric."""
    disk_address: str
    """Of `disk`, on the fabric."""
    working_set: dict[str, int] = field(default_factory=dict)
    """Bytes, by program."""
    ours: dict[tuple[str, int], float] = field(default_factory=dict)
    """Seconds with the ExCache, by program and share of its working set in percent."""
    output: dict[str, str] = field(default_factory=dict)
    """A checksum of what each program prints."""
