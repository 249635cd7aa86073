"""Experiment `hotpot`: YCSB on the key-value store on Hotpot beside Redis, and what a commit costs (SoCC'17, sec. 6).

Three blades have data, and a client each. Hotpot's datasets are spread over all blades; Redis has its primary on the
first, and one replica on the second: two copies of a record for both. Redis fsyncs its append-only file before it
answers, and WAITs until its replica has the update in memory; the store's updates are on two nodes' media. A blade's
disk is in its memory, for both. Clients are Python programs, one operation after the other (ycsb_client.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from experiments.blades import rack, serving
from orchestrator.bench import Sample
from orchestrator.errors import RacklessError
from orchestrator.events import Emit, step
from orchestrator.parallel import together
from orchestrator.ssh import client

if TYPE_CHECKING:
    from fabric import Connection

NAME = "bench-hotpot"  # a rack of its own: one that runs is not touched
WORKLOADS = "ABCDEF"
RECORDS = 100
OPERATIONS = 60
"""Of each client and workload."""
COMMITS = 60
REPLICAS = 2
MODES = ("mrmw", "mrsw")
PORT = 6379
_FOLDER = "/root/experiments"
_FILES = ("ycsb.py", "ycsb_client.py")
_RUN_SECONDS = 900
_REPLICA_SECONDS = 60


@dataclass(frozen=True)
class Bed:
    """Blades with data and clients, in order: connections, addresses on the fabric, node ids."""

    blades: list[Connection]
    addresses: list[str]
    nodes: list[int]


@contextmanager
def prepared(rack_file: Path, emit: Emit) -> Iterator[Bed]:
    """A fresh rack, with the client on its blades."""
    with rack(rack_file, NAME, emit) as (paths, specs), ExitStack() as stack:
        chosen = [spec for spec in specs.values() if spec.kind != "manager"]
        blades = [stack.enter_context(client.connect(paths, spec.name, spec.mgmt_address)) for spec in chosen]
        for blade in blades:
            client.run(blade, f"mkdir -p {_FOLDER}")
            for file in _FILES:
                blade.put(str(Path(__file__).with_name(file)), f"{_FOLDER}/")
        ask = "from guest_agents import hotpot; print(hotpot.connect().node_id)"
        nodes = [int(client.run(blade, f"python3 -c '{ask}'").stdout) for blade in blades]
        yield Bed(blades, [str(spec.fabric_address) for spec in chosen], nodes)


def sample(variant: str, bed: Bed, emit: Emit) -> Sample:
    """One round: operations per second and microseconds of each operation, by workload; or those of commits."""
    if variant == "commits":
        return {
            f"{mode}_{copies}_us": times
            for mode in MODES
            for copies, times in json.loads(
                _run(bed.blades[0], f"commits {mode} --owner {bed.nodes[1]} --count {COMMITS}")
            ).items()
        }
    if variant == "hotpot":
        return ycsb("hotpot", bed, emit)
    with redis(bed) as where:
        return ycsb(where, bed, emit)


@contextmanager
def redis(bed: Bed) -> Iterator[str]:
    """A primary on the first blade and its replica on the second; what clients are told."""
    primary = bed.addresses[0]
    with ExitStack() as servers:
        for blade, more in zip(bed.blades, ("", f"--replicaof {primary} {PORT}"), strict=False):
            folder = "/var/lib/rackless/redis"
            client.run(blade, f"rm -rf {folder} && mkdir -p {folder}")
            servers.enter_context(serving(
                blade, f"redis-server --port {PORT} --dir {folder} --bind 0.0.0.0 --protected-mode no --save '' "
                f"--appendonly yes --appendfsync always --repl-diskless-sync-delay 0 {more}", PORT))  # fmt: skip
        for _ in range(_REPLICA_SECONDS):
            said = client.run(bed.blades[0], f"redis-cli -p {PORT} info replication").stdout
            if "state=online" in said:
                break
            sleep(1)
        else:
            raise RacklessError(f"Redis's replica is not in step after {_REPLICA_SECONDS} s", hint=said)
        yield f"redis:{primary}:{PORT}"


def ycsb(where: str, bed: Bed, emit: Emit) -> Sample:
    """Load, then all workloads one after the other, each by a client on every blade at once."""
    result: Sample = {}
    with step(emit, "hotpot", f"load {where}"):
        _run(bed.blades[0], f"load {where} --records {RECORDS} --replicas {REPLICAS}")
    for workload in WORKLOADS:
        found: list[dict[str, Any]] = []

        def one(number: int, workload: str = workload, found: list[dict[str, Any]] = found) -> None:
            found.append(json.loads(_run(
                bed.blades[number], f"run {where} --workload {workload} --records {RECORDS} --count {OPERATIONS} "
                f"--client {number} --clients {len(bed.blades)} --replicas {REPLICAS}")))  # fmt: skip

        with step(emit, "hotpot", f"{where} {workload}"):
            together({blade.host: number for number, blade in enumerate(bed.blades)}, one)
        result[f"{workload}_ops_per_s"] = sum(answer.pop("ops_per_s") for answer in found)
        for kind in sorted({kind for answer in found for kind in answer}):
            result[f"{workload}_{kind}"] = [time for answer in found for time in answer.get(kind, [])]
    return result


def summary(medians: dict[str, dict[str, float]]) -> dict[str, object]:
    """By workload: operations per second of both and their ratio; by mode and copies: microseconds of a commit."""
    ours, theirs, costs = medians["hotpot"], medians["redis"], medians["commits"]
    rates = {w: (ours[f"{w}_ops_per_s"], theirs[f"{w}_ops_per_s"]) for w in WORKLOADS}
    return {
        "ycsb": {workload: {"hotpot_ops_per_s": own, "redis_ops_per_s": redis, "ratio": round(own / redis, 2)}
                 for workload, (own, redis) in rates.items()},
        "commit_us": {mode: {str(n): costs[f"{mode}_{n}_us"] for n in (1, 2)} for mode in MODES},
        "commit_2_over_1": {mode: round(costs[f"{mode}_2_us"] / costs[f"{mode}_1_us"], 2) for mode in MODES},
    }  # fmt: skip


def figure(medians: dict[str, dict[str, float]], samples: dict[str, list[Sample]]) -> Figure:
    """Rates by workload beside each other, every sample as a dot; the cost of a commit by copies."""
    chart = Figure(figsize=(10, 4), layout="constrained")
    left, right = chart.subplots(1, 2, width_ratios=(2, 1))
    for shift, variant in ((-0.2, "hotpot"), (0.2, "redis")):
        places = [number + shift for number in range(len(WORKLOADS))]
        left.bar(places, [medians[variant][f"{w}_ops_per_s"] for w in WORKLOADS], 0.4, label=variant)
        for row in samples[variant]:
            left.plot(places, [row[f"{w}_ops_per_s"] for w in WORKLOADS], "k.")
    left.set_xticks(range(len(WORKLOADS)), list(WORKLOADS))
    left.set(title=f"YCSB, {REPLICAS} copies", ylabel="operations per second", yscale="log")
    left.legend()
    for mode in MODES:
        right.plot((1, 2), [medians["commits"][f"{mode}_{n}_us"] for n in (1, 2)], "o-", label=mode)
    right.set(title="commit of 1 KiB", xlabel="copies", ylabel="µs, median", ylim=(0, None), xticks=(1, 2))
    right.legend()
    return chart


def _run(blade: Connection, words: str) -> str:
    return client.run(blade, f"cd /root && python3 -m experiments.ycsb_client {words}", timeout=_RUN_SECONDS).stdout
