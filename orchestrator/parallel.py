"""The same work on many blades at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

from orchestrator.errors import RacklessError

T = TypeVar("T")


def together(
    items: Mapping[str, T],
    work: Callable[[T], None],
    workers: int = 16,
    evidence: Callable[[str], str] | None = None,
) -> None:
    """Call ``work`` on each item in threads and wait for all; then raise the first RacklessError, if any.

    ``evidence(name)`` gives lines to show with the failure of a name, such as the tail of a console.
    """
    if not items:
        return
    failures: list[tuple[str, RacklessError]] = []
    with ThreadPoolExecutor(max_workers=min(workers, len(items))) as pool:
        running = {pool.submit(work, item): name for name, item in items.items()}
        for future in as_completed(running):
            try:
                future.result()
            except RacklessError as error:
                failures.append((running[future], error))
    if failures:
        name, first = failures[0]
        more = f" ({len(failures) - 1} more failed)" if len(failures) > 1 else ""
        detail = evidence(name) if evidence else first.detail
        raise RacklessError(
            f"{first.message}{more}", hint=first.hint, log=first.log, detail=detail
        ) from first
