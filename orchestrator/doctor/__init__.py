"""What this host can do for Rackless, tried out rather than assumed, and the fix for each thing it cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from orchestrator.doctor import host, room, software
from orchestrator.doctor.check import Check, Level
from orchestrator.settings import Settings

__all__ = ["Check", "Level", "checks", "healthy"]

GROUPS: tuple[Callable[[Settings], Iterator[Check]], ...] = (software.checks, host.checks, room.checks)


def checks(settings: Settings) -> Iterator[Check]:
    """Yield every check as soon as it is done; the longest, a kernel under KVM, has its own deadline."""
    for group in GROUPS:
        yield from group(settings)


def healthy(results: list[Check]) -> bool:
    """Is everything there that a rack needs? Warnings and remarks do not count."""
    return not any(check.level == "fail" for check in results)
