"""Experiment `lite`: what the indirection costs (SOSP'17, section 5: latency, throughput, scalability).

Peers: perftest for one-sided operations and messages, a TCP echo for calls. `ib_write_lat` and `ib_send_lat` report
half of a ping-pong, as they always do; a call is compared with twice `ib_send_lat`, while LT_write, which returns when
the write has been acknowledged, is also compared with `ib_write_bw` at one outstanding (`write_*_acked`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from experiments.blades import rack, serving
from orchestrator.bench import Sample
from orchestrator.errors import RacklessError
from orchestrator.events import Emit
from orchestrator.ssh import client

if TYPE_CHECKING:
    from fabric import Connection

NAME = "bench-lite"  # a rack of its own: one that runs is not touched
COUNT = 250
WARM_UP = 20
SIZES = (8, 64, 4096, 65536)
CALL_SIZES = (8, 64, 512, 4096)
STREAM_SIZES = (4096, 65536)
DEPTHS = (1, 4, 16)
LMRS = (1, 100, 10_000)
PROCESSES = (1, 4, 16)
PORT, TCP_PORT = 7, 7007
_SOURCE = Path(__file__).with_name("lite_bench.c")
BENCH = "/root/lite_bench"
_RUN_SECONDS = 600


@dataclass(frozen=True)
class Pair:
    """Two blades: programs run on the first, memory and servers are on the second."""

    near: Connection
    far: Connection
    name: str
    """Of the second."""
    address: str
    """Of the second, on the fabric."""


@contextmanager
def prepared(rack_file: Path, emit: Emit) -> Iterator[Pair]:
    """A fresh rack of two blades, with the measuring program compiled on both."""
    with rack(rack_file, NAME, emit) as (paths, specs), ExitStack() as stack:
        near, far = specs.values()
        here, there = (stack.enter_context(client.connect(paths, b.name, b.mgmt_address)) for b in (near, far))
        pair = Pair(here, there, far.name, str(far.fabric_address))
        for connection in (pair.near, pair.far):
            connection.put(str(_SOURCE), "/root/")
            client.run(connection, f"gcc -O2 -o {BENCH} /root/{_SOURCE.name} -llite")
        yield pair


def sample(variant: str, pair: Pair, emit: Emit) -> Sample:
    """One round; microseconds per operation."""
    return {"verbs": verbs, "lite": lite, "tcp": tcp, "sharing": sharing}[variant](pair)


def verbs(pair: Pair) -> Sample:
    """Every quantity with perftest. It spins while it waits, as it does on real machines."""
    result: Sample = {}
    for size in SIZES:
        result[f"read_{size}B"] = _perftest_latency(pair, "ib_read_lat", size)
        result[f"write_{size}B"] = _perftest_latency(pair, "ib_write_lat", size)
        result[f"write_{size}B_acked"] = _perftest_throughput(pair, "ib_write_bw", max(size, 8), 1)
    for size in CALL_SIZES:
        result[f"rpc_{size}B"] = [2 * value for value in _perftest_latency(pair, "ib_send_lat", size)]
    for size in STREAM_SIZES:
        for depth in DEPTHS:
            for what in ("read", "write"):
                result[f"{what}s_{size}B_x{depth}"] = _perftest_throughput(pair, f"ib_{what}_bw", size, depth)
    return result


def lite(pair: Pair) -> Sample:
    """The same with LITE, from a C program."""
    result: Sample = {}
    for size in SIZES:
        for what in ("read", "write"):
            result[f"{what}_{size}B"] = _bench(pair, what, size, COUNT, pair.name)
        result[f"write_{size}B_acked"] = result[f"write_{size}B"]
    with serving(pair.far, f"{BENCH} serve {PORT}"):
        for size in CALL_SIZES:
            result[f"rpc_{size}B"] = _bench(pair, "rpc", size, COUNT, pair.name, PORT)
    for size in STREAM_SIZES:
        for depth in DEPTHS:
            for what in ("read", "write"):
                result[f"{what}s_{size}B_x{depth}"] = _bench(pair, f"{what}s", size, COUNT, pair.name, depth)
    return result


def tcp(pair: Pair) -> Sample:
    """Calls over TCP, on the fabric's network."""
    result: Sample = {}
    for size in CALL_SIZES:
        with serving(pair.far, f"{BENCH} echo {TCP_PORT}", TCP_PORT):
            result[f"rpc_{size}B"] = _bench(pair, "tcp", size, COUNT, pair.address, TCP_PORT)
    return result


def sharing(pair: Pair) -> Sample:
    """64 B reads with many LMRs, and with many processes that use LITE."""
    result: Sample = {}
    for count in LMRS:
        result[f"read_64B_{count}_lmrs"] = _bench(pair, "read", 64, COUNT, pair.name, count)
    with ExitStack() as others:
        here = 1
        for count in PROCESSES:
            for _ in range(here, count):
                others.enter_context(serving(pair.near, f"{BENCH} hold {pair.name}"))
            here = count
            result[f"read_64B_{count}_processes"] = _bench(pair, "read", 64, COUNT, pair.name)
    return result


def summary(medians: dict[str, dict[str, float]]) -> dict[str, object]:
    """By quantity: LITE's and its peers' microseconds, and the ratio to native verbs (for rates: of the rates)."""
    result: dict[str, object] = {}
    for quantity, ours in medians["lite"].items():
        native = medians["verbs"][quantity]
        row = {"lite_us": ours, "verbs_us": native, "ratio": round(ours / native, 2)}
        if quantity in medians["tcp"]:
            row["tcp_us"] = medians["tcp"][quantity]
        if "s_" in quantity:
            row["throughput_ratio"] = round(native / ours, 2)
        result[quantity] = row
    return {**result, "sharing": medians["sharing"]}


def figure(medians: dict[str, dict[str, float]], samples: dict[str, list[Sample]]) -> Figure:
    """Latency by size beside the peers', throughput by depth, latency by what is shared."""
    chart = Figure(figsize=(11, 7), layout="constrained")
    panels = chart.subplots(2, 3)
    for axes, what, sizes, peer in (
        (panels[0][0], "read", SIZES, "ib_read_lat"),
        (panels[0][1], "write", SIZES, "ib_write_lat"),
        (panels[0][2], "rpc", CALL_SIZES, "2 x ib_send_lat"),
    ):
        for variant, label in (("lite", "LITE"), ("verbs", peer), ("tcp", "TCP")):
            values = [medians[variant].get(f"{what}_{size}B") for size in sizes]
            if None not in values:
                axes.plot(sizes, values, "o-", label=label)
        axes.set(title=what, xscale="log", xlabel="bytes", ylabel="µs, median", ylim=(0, None))
        axes.legend()
    for axes, what in ((panels[1][0], "read"), (panels[1][1], "write")):
        for variant, style in (("lite", "o-"), ("verbs", "s--")):
            for size in STREAM_SIZES:
                rates = [size / medians[variant][f"{what}s_{size}B_x{depth}"] for depth in DEPTHS]
                axes.plot(DEPTHS, rates, style, label=f"{variant} {size} B")
        axes.set(title=f"{what} throughput", xlabel="outstanding", ylabel="MB/s", ylim=(0, None))
        axes.legend()
    for counts, what in ((LMRS, "lmrs"), (PROCESSES, "processes")):
        values = [medians["sharing"][f"read_64B_{count}_{what}"] for count in counts]
        panels[1][2].plot(counts, values, "o-", label=what)
    panels[1][2].set(title="64 B read, shared", xscale="log", xlabel="how many", ylabel="µs, median", ylim=(0, None))
    panels[1][2].legend()
    return chart


def _bench(pair: Pair, *words: object) -> list[float]:
    """Run the measuring program; what it printed."""
    done = client.run(pair.near, f"{BENCH} {' '.join(map(str, words))}", timeout=_RUN_SECONDS)
    return [float(line) for line in done.stdout.split()]


def _perftest(pair: Pair, tool: str, size: int, options: str) -> str:
    """Run a perftest tool between the two blades; what its client printed."""
    port = 18515
    command = f"{tool} -d rxe0 -x 1 -F -p {port} -s {size} {options}"
    with serving(pair.far, command, port):
        return client.run(pair.near, f"{command} {pair.address}", timeout=_RUN_SECONDS).stdout


def _perftest_latency(pair: Pair, tool: str, size: int) -> list[float]:
    """Every operation's microseconds, in order; the first WARM_UP are left out, as in lite_bench."""
    said = _perftest(pair, tool, size, f"-n {COUNT + WARM_UP} -U")
    values = [float(value) for value in re.findall(r"^\d+, +([0-9.]+)$", said, re.MULTILINE)]
    if len(values) < COUNT:
        raise RacklessError(f"{tool} printed {len(values)} values, not {COUNT}", hint=said[-300:])
    return values[-COUNT:]


def _perftest_throughput(pair: Pair, tool: str, size: int, depth: int) -> float:
    """Microseconds per operation with `depth` outstanding."""
    said = _perftest(pair, tool, size, f"-n {COUNT} -t {depth}")
    row = re.findall(r"^\s*(\d+)\s+(\d+)\s+([0-9.]+)\s+([0-9.]+)\s+([0-9.]+)\s*$", said, re.MULTILINE)
    if not row:
        raise RacklessError(f"{tool} printed no figures", hint=said[-300:])
    mebibytes_per_second, million_per_second = float(row[-1][3]), float(row[-1][4])
    # Both are printed with few digits: that of small messages' bytes would be 0.01.
    return 1 / million_per_second if size < 1024 else size / (mebibytes_per_second * (1 << 20)) * 1e6
