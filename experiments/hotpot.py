"""Experiment `hotpot`: YCSB on the key-value store on Hotpot beside Redis, what commits and fetches cost, PageRank
(SoCC'17, section 6).

Three blades have data, and a client each. Hotpot's datasets are spread over all blades; Redis has its primary on the
first, and one replica on the second: two copies of a record for both. Redis fsyncs its append-only file before it
answers, and WAITs until its replica has the update in memory; the store's updates are on two nodes' media. A blade's
disk is in its memory, for both. Clients are Python programs, one operation after the other (ycsb_client.py). Commits
are of random bytes on other blades' pages, by size, number of ranges, owners and copies; PageRank has two parts
(hotpot_client.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
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
COMMITS = 15
"""Of each kind."""
FETCHES = 40
RATE_COMMITS = 40
"""Of each client."""
REPLICAS = 2
RANKERS = 2
COPIES = (1, 2, 3, 4)
MODES = ("mrmw", "mrsw")
PORT = 6379
_FOLDER = "/root/experiments"
_FILES = ("ycsb.py", "ycsb_client.py", "hotpot_client.py")
_RUN_SECONDS = 900
_REPLICA_SECONDS = 60


@dataclass(frozen=True)
class Bed:
    """Blades with data and clients, in order, and after them the manager: connections, fabric addresses, node ids."""

    blades: list[Connection]
    addresses: list[str]
    nodes: list[int]

    @property
    def clients(self) -> list[Connection]:
        """Without the manager."""
        return self.blades[:-1]


@contextmanager
def prepared(rack_file: Path, emit: Emit) -> Iterator[Bed]:
    """A fresh rack, with the clients on its blades."""
    with rack(rack_file, NAME, emit) as (paths, specs), ExitStack() as stack:
        chosen = sorted(specs.values(), key=lambda spec: spec.kind == "manager")
        blades = [stack.enter_context(client.connect(paths, spec.name, spec.mgmt_address)) for spec in chosen]
        for blade in blades:
            client.run(blade, f"mkdir -p {_FOLDER}")
            for file in _FILES:
                blade.put(str(Path(__file__).with_name(file)), f"{_FOLDER}/")
        ask = "from guest_agents import hotpot; print(hotpot.connect().node_id)"
        nodes = [int(client.run(blade, f"python3 -c '{ask}'").stdout) for blade in blades]
        yield Bed(blades, [str(spec.fabric_address) for spec in chosen], nodes)


def sample(variant: str, bed: Bed, emit: Emit) -> Sample:
    """One round: operations per second and microseconds of each operation, by workload; or those of one of the rest."""
    if variant == "redis":
        with redis(bed) as where:
            return ycsb(where, bed, emit)
    if variant == "hotpot":
        return ycsb("hotpot", bed, emit)
    return {"commits": commits, "fetch": fetch, "rates": rates, "pagerank": pagerank}[variant](bed, emit)


def commits(bed: Bed, _emit: Emit) -> Sample:
    """Microseconds of commits by the first blade, to pages of others."""
    owners = ",".join(map(str, bed.nodes[1:]))
    return {f"{mode}_{point}_us": times for mode in MODES for point, times in
            _single(bed.blades[0], f"commits {mode} --owners {owners} --count {COMMITS}").items()}  # fmt: skip


def fetch(bed: Bed, _emit: Emit) -> Sample:
    """Microseconds of a page's first load, and of a read of LITE, both of the second blade."""
    words = f"fetch --owners {bed.nodes[1]} --name {bed.blades[1].host} --count {FETCHES}"
    return {f"{what}_us": times for what, times in _single(bed.blades[0], words).items()}


def rates(bed: Bed, emit: Emit) -> Sample:
    """Commits per second of 1 to all blades together, each on pages of its own."""
    result: Sample = {}
    owners = ",".join(map(str, bed.nodes))
    for count in range(1, len(bed.blades) + 1):
        with step(emit, "hotpot", f"commits of {count} blades"):
            found = _at_once(bed.blades[:count], lambda number, count=count: (  # type: ignore[misc]
                f"rate mrmw --owners {owners} --client {number} --clients {count} --count {RATE_COMMITS}"))  # fmt: skip
        result[f"commits_per_s_{count}"] = sum(answer["per_s"] for answer in found)
    return result


def pagerank(bed: Bed, emit: Emit) -> Sample:
    """Microseconds of a round, of the slower part: values in a dataset, or sent over TCP."""
    peers = ",".join(bed.addresses[:RANKERS])
    result: Sample = {}
    for over, more in (("hotpot", ""), ("sockets", f"--peers {peers}")):
        with step(emit, "hotpot", f"PageRank on {over}"):
            found = _at_once(bed.blades[:RANKERS],
                             lambda number, more=more: f"pagerank --client {number} --clients {RANKERS} {more}")  # type: ignore[misc] # fmt: skip
        result[f"pagerank_{over}_us"] = max(answer["round_us"] for answer in found)
    return result


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
        _run(bed.blades[0], f"load {where} --records {RECORDS} --replicas {REPLICAS}", "ycsb_client")
    for workload in WORKLOADS:
        with step(emit, "hotpot", f"{where} {workload}"):
            found = _at_once(bed.clients, lambda number, workload=workload: (  # type: ignore[misc]
                f"run {where} --workload {workload} --records {RECORDS} --count {OPERATIONS} --client {number} "
                f"--clients {len(bed.clients)} --replicas {REPLICAS}"), "ycsb_client")  # fmt: skip
        result[f"{workload}_ops_per_s"] = sum(answer.pop("ops_per_s") for answer in found)
        for kind in sorted({kind for answer in found for kind in answer}):
            result[f"{workload}_{kind}"] = [time for answer in found for time in answer.get(kind, [])]
    return result


def summary(medians: dict[str, dict[str, float]]) -> dict[str, object]:
    """By workload: operations per second of both and their ratio; microseconds of commits, fetches and rounds."""
    ours, theirs, costs, fetched = (medians[variant] for variant in ("hotpot", "redis", "commits", "fetch"))
    rates = {w: (ours[f"{w}_ops_per_s"], theirs[f"{w}_ops_per_s"]) for w in WORKLOADS}
    ranked = medians["pagerank"]

    def by(what: str) -> dict[str, dict[str, float]]:
        return {mode: {name.split("_")[2]: cost for name, cost in costs.items() if name.startswith(f"{mode}_{what}_")}
                for mode in MODES}  # fmt: skip

    copies = by("copies")
    return {
        "ycsb": {workload: {"hotpot_ops_per_s": own, "redis_ops_per_s": redis, "ratio": round(own / redis, 2)}
                 for workload, (own, redis) in rates.items()},
        "commit_us": copies,
        "commit_2_over_1": {mode: round(copies[mode]["2"] / copies[mode]["1"], 2) for mode in MODES},
        "commit_us_by_bytes": by("size"),
        "commit_us_by_ranges": by("ranges"),
        "commit_us_by_owners": by("owners"),
        "commits_per_s": {name.rsplit("_", 1)[1]: found for name, found in medians["rates"].items()},
        "fetch_us": {"hotpot": fetched["fetch_us"], "lite_read": fetched["lite_read_us"],
                     "ratio": round(fetched["fetch_us"] / fetched["lite_read_us"], 2)},
        "pagerank_round_us": {"hotpot": ranked["pagerank_hotpot_us"], "sockets": ranked["pagerank_sockets_us"],
                              "ratio": round(ranked["pagerank_hotpot_us"] / ranked["pagerank_sockets_us"], 2)},
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
        right.plot(COPIES, [medians["commits"][f"{mode}_copies_{n}_us"] for n in COPIES], "o-", label=mode)
    right.set(title="commit of 1 KiB", xlabel="copies", ylabel="µs, median", ylim=(0, None), xticks=COPIES)
    right.legend()
    return chart


def _at_once(
    blades: list[Connection], words: Callable[[int], str], what: str = "hotpot_client"
) -> list[dict[str, Any]]:
    """What clients on these blades print, each told `words` of its number."""
    found: list[dict[str, Any]] = []
    together({blade.host: number for number, blade in enumerate(blades)},
             lambda number: found.append(json.loads(_run(blades[number], words(number), what))))  # fmt: skip
    return found


def _single(blade: Connection, words: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = json.loads(_run(blade, words, "hotpot_client"))
    return found


def _run(blade: Connection, words: str, what: str) -> str:
    return client.run(blade, f"cd /root && python3 -m experiments.{what} {words}", timeout=_RUN_SECONDS).stdout
