"""A rack at one moment, as host and blades see it: what metrics and the dashboard are made of."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

from orchestrator import wiring
from orchestrator.hypervisor import hosts
from orchestrator.hypervisor.usage import Traffic, Usage, usage
from orchestrator.network import place
from orchestrator.network.place import FABRIC, MANAGEMENT
from orchestrator.sampler import Sample, Sampler
from orchestrator.settings import RackPaths
from orchestrator.spec import BladeSpec
from orchestrator.wiring import Wire

NETWORKS = (MANAGEMENT, FABRIC)


@dataclass(frozen=True)
class Host:
    """What one blade costs this host."""

    cpu_seconds: float
    resident_bytes: int | None
    traffic: Mapping[str, Traffic]
    """By network: MANAGEMENT, FABRIC."""


@dataclass(frozen=True)
class Snapshot:
    """A rack at one moment; empty when it is not up."""

    rack: str
    time: float
    """Seconds since the epoch."""
    monotonic: float
    accelerator: str | None
    wires: tuple[Wire, ...]
    host: Mapping[str, Host]
    sample: Sample
    """What the agents say; see sampler.py. `lite` is their answer to lite.stat."""
    nodes: Mapping[int, str]
    """LITE's node ids, and the blades' names."""


class Observer:
    """Looks at a rack as often as it is told to. Use as a context manager."""

    def __init__(self, paths: RackPaths) -> None:
        self._paths = paths
        self._sampler = Sampler(paths, {"lite": "lite.stat"})

    def look(self) -> Snapshot:
        """How the rack is now. RacklessError when libvirt cannot be asked."""
        paths = self._paths
        with hosts.opened(paths, revive=False) as machines:
            found = machines.owned()
            used = usage(machines, found)
        wires = tuple(wiring.of(found))
        specs: dict[str, BladeSpec] = {}
        for name in (wire.blade for wire in wires):
            with suppress(ValueError):
                specs[name] = found[name].spec()
        # One that is not whole is being made: its agent has no identity yet.
        running = {w.blade: specs[w.blade] for w in wires
                   if w.power == "running" and found[w.blade].metadata.get("ready")}  # fmt: skip
        now = time.monotonic()
        sample = self._sampler.sample(running)
        half = (wire for wire in wires if wire.power == "running" and wire.blade not in running)
        sample |= {wire.blade: {"kind": wire.kind, "error": "it is being made, or was left half made"} for wire in half}
        return Snapshot(
            rack=paths.name,
            time=time.time(),
            monotonic=now,
            accelerator=next((str(o.metadata["accelerator"]) for o in found.values() if "accelerator" in o.metadata),
                             None),
            wires=wires,
            host={name: self._host(specs[name], used[name]) for name in specs if name in used},
            sample=sample,
            nodes={spec.index + 1: name for name, spec in specs.items()},
        )  # fmt: skip

    def _host(self, spec: BladeSpec, used: Usage) -> Host:
        where = place.on(self._paths, spec.host)
        taps = {network: where.tap(network, spec.index) for network in NETWORKS}
        traffic = {network: used.cards[tap] for network, tap in taps.items() if tap in used.cards}
        return Host(used.cpu_seconds, used.resident_bytes, traffic)

    def __enter__(self) -> Observer:
        self._sampler.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sampler.__exit__(kind, value, trace)
