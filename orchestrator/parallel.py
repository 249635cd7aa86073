"""The same work on many blades at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
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
    pool = ThreadPoolExecutor(max_workers=min(workers, len(items)))
    running = {pool.submit(work, item): name for name, item in items.items()}
    try:
        wait(running)
    except KeyboardInterrupt:  # do not wait for blades now: cli/main.py ends the process with its threads at work
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
    for future, name in running.items():
        try:
            future.result()
        except RacklessError as error:
            failures.append((name, error))
    if failures:
        name, first = failures[0]
        more = f" ({len(failures) - 1} more failed)" if len(failures) > 1 else ""
        detail = evidence(name) if evidence else first.detail
        raise RacklessError(f"{first.message}{more}", hint=first.hint, log=first.log, detail=detail) from first
