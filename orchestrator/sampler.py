"""What the agents of a rack say of themselves at one moment, for `rackless top`, metrics and the dashboard."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any

from guest_agents import control
from orchestrator import agents
from orchestrator.parallel import together
from orchestrator.settings import RackPaths
from orchestrator.spec import BladeSpec

STATS = {
    "manager": "managers.stats",
    "processor": "process.stats",
    "memory": "memory.stats",
    "storage": "storage.stats",
}
"""What is asked of each kind of blade, beside its load."""

Sample = dict[str, dict[str, Any]]
"""By blade: `kind`, and `load` and `stats` or, of one that does not answer, `error`."""


class Sampler:
    """Asks all blades at once, over connections that it keeps."""

    def __init__(self, paths: RackPaths, more: Mapping[str, str] | None = None) -> None:
        """`more`: what else is asked of every blade, an operation by the name that its answer gets."""
        self._paths = paths
        self._more = more or {}
        self._clients: dict[str, control.ControlClient] = {}

    def sample(self, blades: Mapping[str, BladeSpec]) -> Sample:
        """How the blades are now; one that does not answer holds the others up for `status_seconds` at most."""
        sample: Sample = {name: {"kind": spec.kind} for name, spec in blades.items()}

        def ask(name: str) -> None:
            try:
                sample[name] |= self._ask(name, blades[name])
            except control.ControlError as failure:
                self._forget([name])
                sample[name]["error"] = failure.error

        together({name: name for name in blades}, ask, self._paths.settings.max_workers)
        self._forget(self._clients.keys() - blades.keys())
        return sample

    def _ask(self, name: str, spec: BladeSpec) -> dict[str, Any]:
        seconds = self._paths.settings.status_seconds
        client = self._clients.get(name)
        if client is None or client.stale():
            client = self._clients[name] = agents.client(self._paths, spec.mgmt_address, seconds)
        told: dict[str, Any] = {"load": client.call("agent.load", seconds)}
        for name, op in {"stats": STATS[spec.kind], **self._more}.items():
            told[name] = {}
            try:
                told[name] = client.call(op, seconds)
            except control.LostError:
                raise
            except control.ControlError as failure:
                # Of several managers one keeps the books, the others have nothing to say.
                if (spec.kind, name) != ("manager", "stats"):
                    told["error"] = failure.error
        return told

    def _forget(self, names: Iterable[str]) -> None:
        for name in list(names):
            client = self._clients.pop(name, None)
            if client is not None:
                client.close()

    def __enter__(self) -> Sampler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for client in list(self._clients.values()):
            with suppress(OSError):
                client.abort()  # a thread may still wait for an answer: nobody needs that now
        self._forget(self._clients)
