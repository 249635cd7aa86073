"""What only root may do."""

from __future__ import annotations

import os

from orchestrator.errors import RacklessError


def require_root(why: str) -> None:
    """Raise RacklessError for any other user, before anything is half done; ``why`` ends "rackless needs root to"."""
    if os.geteuid() != 0:
        raise RacklessError(f"rackless needs root to {why}", hint="run it with `sudo -E`")
