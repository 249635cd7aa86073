"""Experiment `excache`: programs with a part of their working set on the blade, and the rest elsewhere.

The working set is what a cgroup counts at most for the program when nothing limits it. Then the same program has 50
and 25 % of that: as its ExCache, or as the limit of its cgroup with Linux swap to (`nbd`, `nvme_tcp`, `nvme_rdma`) a
RAM disk of the same memory blade, `zram`, or (on a blade that is like the first, but has one) a disk. A slowdown is
wall time over that of the unlimited run, starting and ending the program included. Peers are limited by all memory of
the program's cgroup; the ExCache is all of its anonymous memory, and `peak_bytes` is what a cgroup counted around it,
pager and all.

`misses` (misses.py) and `files`, `nfs` (iops.py) are beside the programs: what one miss is made of, and file requests.
"""

from __future__ import annotations

import io
import json
import math
import shlex
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import iops, misses, swap
from experiments.bed import Bed
from experiments.blades import rack
from orchestrator.bench import Sample
from orchestrator.corpus import english
from orchestrator.errors import RacklessError
from orchestrator.events import Emit, Note
from orchestrator.settings import Settings
from orchestrator.ssh import client

if TYPE_CHECKING:
    from fabric import Connection

NAME = "bench-excache"  # a rack of its own: one that runs is not touched
PAGE, MIB = 4096, 1 << 20
SHARES = (50, 25)
NETWORK = ("nbd", "nvme_tcp", "nvme_rdma")
PEERS = (*NETWORK, "zram", "disk")
COUNTED = ("misses", "prefetched", "flushes", "reads", "writes", "faults", "packed_hits", "buffer_hits", "piggybacks",
           "evicted_ahead", "write_faults")  # fmt: skip
TEXT = "/tmp/text"
_STATS = "/tmp/stats"
_GROUP = "/sys/fs/cgroup/bench"
RUN_SECONDS = 400
PATIENCE, LEAST_SECONDS = 1.6, 30
"""A peer that takes so many times as long as ours (but so many seconds at least) is stopped: emulated swap is slow."""
_TIMED_OUT, _KILLED = 124, 137
PAPER_MISS_US, PAPER_FLUSH_US = 6.31, 6.11
"""OSDI'18: what the released code prints of itself (its profile of pcache_miss and pcache_flush)."""
PAPER = {
    "LegoOS, TensorFlow": {14: 2.13, 28: 1.68, 57: 1.41},
    "LegoOS, word count": {15: 1.74, 30: 1.34, 60: 1.17},
}
"""OSDI'18: slowdown by the share of the working set that the ExCache is, in percent (0.9 and 1.7 GB)."""


@dataclass(frozen=True)
class Program:
    """A command that reads TEXT, and how many bytes of it."""

    command: str
    text: int


_COUNT_PAIRS = '{ for (i = 1; i < NF; i += 2) n[$i " " $(i + 1)]++ } END { for (w in n) print w, n[w] }'
PROGRAMS = {
    "gawk": Program(f"gawk '{_COUNT_PAIRS}' {TEXT}", 3 * MIB // 8),
    "sort": Program(f"sort -S 64M --parallel=1 {TEXT}", 9 * MIB // 4),
}


class _RunError(RacklessError):
    """This run gave no figure; others may. `least`: the seconds that it would have taken at least, if any."""

    def __init__(self, message: str, least: float | None = None) -> None:
        super().__init__(message)
        self.least = least


@contextmanager
def prepared(rack_file: Path, emit: Emit) -> Iterator[Bed]:
    """A fresh rack with the text on the blades that run programs, and the programs' working sets."""
    with english(Settings.from_environment()).open("rb") as file:
        text = file.read(max(program.text for program in PROGRAMS.values()))
    with rack(rack_file, NAME, emit) as (paths, specs), ExitStack() as stack:
        near, far, disk = (stack.enter_context(client.connect(paths, blade, specs[blade].mgmt_address))
                           for blade in ("pb0", "mb0", "sb0"))  # fmt: skip
        bed = Bed(near, far, disk, str(specs["mb0"].fabric_address), str(specs["sb0"].fabric_address))
        for blade in (near, disk):
            client.run(blade, "mountpoint -q /sys/fs/cgroup || mount -t cgroup2 none /sys/fs/cgroup\n"
                              "echo +memory > /sys/fs/cgroup/cgroup.subtree_control\n"
                              f"echo {swap.PAGE_CLUSTER} > /proc/sys/vm/page-cluster")  # fmt: skip
            blade.put(io.BytesIO(text), "/tmp/english.txt")
        for name, program in PROGRAMS.items():
            _limited(bed, near, name, program, "max")  # reads its files into the page cache
            bed.working_set[name] = int(_limited(bed, near, name, program, "max")["peak_bytes"])
            emit(Note(f"{name}: working set {bed.working_set[name] / MIB:.1f} MiB"))
        misses.prepare(bed)
        iops.prepare(bed)
        yield bed


def sample(variant: str, bed: Bed, emit: Emit) -> Sample:
    """Seconds, and what the kernel or the pager counted, of each program at each share; or why there are none."""
    special: dict[str, Callable[[Bed], Sample]] = {"misses": misses.sample, "files": iops.ours, "nfs": iops.nfs}
    if variant in special:
        return special[variant](bed)
    if variant == "local":
        seen = {name: _limited(bed, bed.near, name, program, "max") for name, program in PROGRAMS.items()}
        return {f"{name}_100{key}": value for name, one in seen.items() for key, value in _keyed(one).items()}
    result: Sample = {}
    try:
        with _device(variant, bed):
            for name, program in PROGRAMS.items():
                for share in SHARES:
                    result |= (one := _share(variant, bed, name, program, share))
                    emit(Note(f"{variant}: {name} at {share} %: {one}"))
    except RacklessError as error:  # no such peer here, or it went away: what there is by now counts
        for name in PROGRAMS:
            for share in SHARES:
                result.setdefault(f"{name}_{share}", str(error))
    return result


def _share(variant: str, bed: Bed, name: str, program: Program, share: int) -> Sample:
    limit = bed.working_set[name] * share // 100 // PAGE * PAGE
    seconds = min(max(LEAST_SECONDS, PATIENCE * bed.ours.get((name, share), math.inf)), RUN_SECONDS)
    blade = bed.disk if variant == "disk" else bed.near
    run = partial(_excache, bed, name, program, limit) if variant == "excache" else partial(
        _limited, bed, blade, name, program, str(limit), round(seconds))  # fmt: skip
    try:
        seen = run()
    except _RunError as error:
        least: Sample = {} if error.least is None else {f"{name}_{share}_at_least": error.least}
        return {f"{name}_{share}": str(error), **least}
    if variant == "excache":
        bed.ours.setdefault((name, share), seen["seconds"])
    return {f"{name}_{share}{key}": value for key, value in _keyed(seen).items()}


def _keyed(seen: dict[str, float]) -> dict[str, float]:
    return {"" if key == "seconds" else f"_{key}": value for key, value in seen.items()}


def summary(medians: dict[str, dict[str, float]]) -> dict[str, object]:
    """Slowdowns by program and share, and ours over the best network swap's (1 or less is the target).

    What is null had no value: the result's `missing` says why. `modelled_slowdown` is no measurement: the pager's
    counts of pages at the paper's microseconds, upon the local run.
    """
    programs = {name: {str(share): _row(medians, name, share) for share in SHARES} for name in PROGRAMS}
    return {**programs, "one_miss": misses.summary(medians.get("misses", {})),
            "storage": iops.summary(medians.get("files", {}), medians.get("nfs", {}))}  # fmt: skip


def _row(medians: dict[str, dict[str, float]], name: str, share: int) -> dict[str, object]:
    def slowdown(variant: str, suffix: str = "") -> float | None:
        seconds = medians.get(variant, {}).get(f"{name}_{share}{suffix}")
        return None if seconds is None else round(seconds / medians["local"][f"{name}_100"], 2)

    ours, peers = slowdown("excache"), {peer: slowdown(peer) for peer in PEERS}
    missing = [peer for peer in PEERS if peers[peer] is None]
    least = {peer: value for peer in missing if (value := slowdown(peer, "_at_least")) is not None}
    row: dict[str, object] = {
        "slowdown": ours,
        "peers": peers,
        "peers_at_least": least,
        "ratio_to_best_network_swap": _ratio(ours, [value for peer in NETWORK if (value := peers[peer]) is not None]),
        "ratio_to_disk": _ratio(ours, [peers["disk"]] if peers["disk"] else []),
    }
    if row["ratio_to_best_network_swap"] is None:  # none of them came to an end
        row["ratio_to_best_network_swap_at_most"] = _ratio(ours, [least[peer] for peer in NETWORK if peer in least])
    if ours is None:
        return row
    counts = {key: medians["excache"][f"{name}_{share}_{key}"] for key in (*COUNTED, "peak_bytes")}
    pages = counts["misses"] + counts["prefetched"]
    network_seconds = (pages * PAPER_MISS_US + counts["flushes"] * PAPER_FLUSH_US) / 1e6
    row["counts"] = counts
    row["peers_counts"] = {
        peer: {key: medians[peer][f"{name}_{share}_{key}"] for key in ("swapped_in", "swapped_out")}
        for peer in PEERS if peers[peer] is not None
    }  # fmt: skip
    row["modelled_slowdown"] = round(1 + network_seconds / medians["local"][f"{name}_100"], 4)
    return row


def _ratio(ours: float | None, peers: list[float]) -> float | None:
    return round(ours / min(peers), 2) if ours and peers else None


def figure(medians: dict[str, dict[str, float]], samples: dict[str, list[Sample]]) -> Figure:
    """Slowdown against the share of the working set that is on the blade, a line for each way to have the rest."""
    chart = Figure(figsize=(10, 4.5), layout="constrained")
    for axes, name in zip(chart.subplots(1, len(PROGRAMS)), PROGRAMS, strict=True):
        for variant in ("excache", *PEERS):
            _line(axes, name, variant, medians)
        for label, points in PAPER.items():
            axes.plot([*points], [*points.values()], "k:" if "word" in label else "k-.", label=f"{label} (OSDI'18)")
        axes.set(title=name, xlabel="% of the working set on the blade", ylabel="slowdown, log scale", yscale="log")
        axes.legend(fontsize="small")
    return chart


def _line(axes: Axes, name: str, variant: str, medians: dict[str, dict[str, float]]) -> None:
    seconds = {share: medians.get(variant, {}).get(f"{name}_{share}") for share in SHARES}
    local = medians["local"][f"{name}_100"]
    points = {100: 1.0} | {share: value / local for share, value in seconds.items() if value is not None}
    if len(points) > 1:
        axes.plot([*points], [*points.values()], "o-" if variant == "excache" else "s--", label=variant)


def _device(variant: str, bed: Bed) -> AbstractContextManager[None]:
    if variant == "excache":
        return nullcontext()
    if variant == "nbd":
        return swap.on_nbd(bed.near, bed.far, bed.address)
    if variant == "zram":
        return swap.on_zram(bed.near)
    if variant == "disk":
        return swap.on_disk(bed.disk)
    return swap.on_nvme(bed.near, bed.far, bed.address, variant.removeprefix("nvme_"))


def _limited(
    bed: Bed, blade: Connection, name: str, program: Program, limit: str, seconds: int = RUN_SECONDS
) -> dict[str, float]:
    """Run it in a cgroup of `limit` bytes: seconds, peak bytes, pages swapped in and out."""
    return _timed(bed, blade, name, program, f"exec {program.command}", limit, seconds)


def _excache(bed: Bed, name: str, program: Program, limit: int) -> dict[str, float]:
    """Run it with an ExCache of `limit` bytes: seconds, peak bytes, and the pager's counters."""
    command = f"exec split run --excache {limit} --stats {_STATS} --cwd /tmp -- {program.command}"
    seen = _timed(bed, bed.near, name, program, command, "max", RUN_SECONDS)
    counted = json.loads(client.run(bed.near, f"cat {_STATS}").stdout)
    return seen | {key: counted[key] for key in COUNTED}


def _timed(
    bed: Bed, blade: Connection, name: str, program: Program, command: str, limit: str, seconds: int
) -> dict[str, float]:
    inside = shlex.quote(f"echo 0 > {_GROUP}/cgroup.procs; {command}")
    said = client.run(blade, f"""
        head -c {program.text} /tmp/english.txt > {TEXT}; rm -f {_STATS}
        mkdir {_GROUP} && trap 'rmdir {_GROUP}' EXIT && echo {limit} > {_GROUP}/memory.max || exit
        swapped() {{ awk '/^pswpin/ {{ i = $2 }} /^pswpout/ {{ o = $2 }} END {{ print i, o }}' /proc/vmstat; }}
        before=$(swapped); start=$(date +%s.%N)
        output=$( {{ timeout -k 5 {seconds} sh -c {inside} 2> /tmp/said; echo $? > /tmp/code; }} | md5sum )
        end=$(date +%s.%N)
        echo $start $end $(cat {_GROUP}/memory.peak) $before $(swapped) $(cat /tmp/code) $output; tail -n 1 /tmp/said
        """, timeout=seconds + 60).stdout  # fmt: skip
    head, _, complaint = said.partition("\n")
    start, end, peak, in_before, out_before, in_after, out_after, code, output, _ = head.split()
    if code == str(_TIMED_OUT):
        raise _RunError(f"not done after {seconds} s", least=float(end) - float(start))
    if code != "0":
        ends = {_KILLED: f"killed for want of memory at {limit} bytes"}
        raise _RunError(ends.get(int(code), f"exit code {code}: {complaint.strip()}"))
    if bed.output.setdefault(name, output) != output:
        raise _RunError("it printed something else than it did unlimited")
    return {"seconds": float(end) - float(start), "peak_bytes": int(peak),
            "swapped_in": int(in_after) - int(in_before), "swapped_out": int(out_after) - int(out_before)}  # fmt: skip
