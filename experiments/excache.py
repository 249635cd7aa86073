"""Experiment `excache`: programs with a part of their working set on the blade, and the rest elsewhere.

The working set is what a cgroup counts at most for the program when nothing limits it. Then the same program has 50
and 25 % of that: as its ExCache, or as the limit of its cgroup with Linux swap to (`nbd`, `nvme_tcp`, `nvme_rdma`) a
RAM disk of the same memory blade, `zram`, or (on a blade that is like the first, but has one) a disk. A slowdown is
wall time over that of the unlimited run. Peers are limited by all memory of the program's cgroup; the ExCache is all
of its anonymous memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from experiments import swap
from experiments.blades import rack
from orchestrator.bench import Sample
from orchestrator.corpus import english
from orchestrator.errors import RacklessError
from orchestrator.events import Emit, Note
from orchestrator.settings import Settings
from orchestrator.ssh import client

if TYPE_CHECKING:
    from fabric import Connection

NAME = "bench-excache"
MIB = 1 << 20
SHARES = (50, 25)
NETWORK = ("nbd", "nvme_tcp", "nvme_rdma")
PEERS = (*NETWORK, "zram", "disk")
TEXT = "/tmp/text"
_GROUP = "/sys/fs/cgroup/bench"
_RUN_SECONDS = 1200
PAPER_MISS_US, PAPER_FLUSH_US = 6.31, 6.11
"""OSDI'18, what the released code prints of itself (its profile of pcache_miss and pcache_flush)."""


@dataclass(frozen=True)
class Program:
    """A command that reads TEXT, and how many bytes of it."""

    command: str
    text: int


_COUNT = "{ for (i = 1; i <= NF; i++) n[$i]++ } END { for (w in n) print w, n[w] }"
PROGRAMS = {
    "gawk": Program(f"gawk '{_COUNT}' {TEXT}", 3 * MIB),
    "sort": Program(f"sort -S 64M --parallel=1 {TEXT}", 4 * MIB),
}


@dataclass
class Bed:
    """The blades, and what is known of the programs by now."""

    near: Connection
    far: Connection
    disk: Connection
    address: str
    """Of the memory blade, on the fabric."""
    working_set: dict[str, int] = field(default_factory=dict)
    """Bytes."""
    output: dict[str, str] = field(default_factory=dict)


@contextmanager
def prepared(rack_file: Path, emit: Emit) -> Iterator[Bed]:
    """A fresh rack with the text on the blades that run programs, and the programs' working sets."""
    text = english(Settings.from_environment())
    with rack(rack_file, NAME, emit) as (paths, specs), ExitStack() as stack:
        near, far, disk = (stack.enter_context(client.connect(paths, blade, specs[blade].mgmt_address))
                           for blade in ("pb0", "mb0", "sb0"))  # fmt: skip
        bed = Bed(near, far, disk, str(specs["mb0"].fabric_address))
        for blade in (near, disk):
            client.run(blade, "mountpoint -q /sys/fs/cgroup || mount -t cgroup2 none /sys/fs/cgroup\n"
                              "echo +memory > /sys/fs/cgroup/cgroup.subtree_control")  # fmt: skip
            blade.put(str(text), "/tmp/english.txt")
        for name, program in PROGRAMS.items():
            _limited(bed, near, name, program, "max")  # reads its files into the page cache
            bed.working_set[name] = _limited(bed, near, name, program, "max")[1]
            emit(Note(f"{name}: working set {bed.working_set[name] / MIB:.1f} MiB"))
        yield bed


def sample(variant: str, bed: Bed, emit: Emit) -> Sample:
    """Seconds, and what the kernel or the pager counted, of each program at each share."""
    result: Sample = {}
    if variant == "local":
        for name, program in PROGRAMS.items():
            result[f"{name}_100"] = _limited(bed, bed.near, name, program, "max")[0]
        return result
    blade = bed.disk if variant == "disk" else bed.near
    for name, program in PROGRAMS.items():
        for share in SHARES:
            limit = bed.working_set[name] * share // 100 // MIB * MIB
            if variant == "excache":
                result |= {f"{name}_{share}{key}": value for key, value in _excache(bed, name, program, limit).items()}
                continue
            with _swap(variant, bed):
                seconds, _peak, swapped_in, swapped_out = _limited(bed, blade, name, program, str(limit))
            result |= {f"{name}_{share}": seconds, f"{name}_{share}_swapped_in": swapped_in,
                       f"{name}_{share}_swapped_out": swapped_out}  # fmt: skip
    return result


def summary(medians: dict[str, dict[str, float]]) -> dict[str, object]:
    """Slowdowns by program and share, and ours over the best network swap's (1 or less is the target).

    `modelled_slowdown` is no measurement: the pager's counts at the paper's microseconds, upon the local run.
    """
    result: dict[str, object] = {}
    for name in PROGRAMS:
        local = medians["local"][f"{name}_100"]
        shares: dict[str, object] = {}
        for share in SHARES:
            ours = medians["excache"]
            slowdown = ours[f"{name}_{share}"] / local
            peers = {peer: round(medians[peer][f"{name}_{share}"] / local, 2) for peer in PEERS}
            best = min(peers[peer] for peer in NETWORK)
            misses, flushes = ours[f"{name}_{share}_misses"], ours[f"{name}_{share}_flushes"]
            extra = (misses * PAPER_MISS_US + flushes * PAPER_FLUSH_US) / 1e6
            shares[str(share)] = {
                "slowdown": round(slowdown, 2), "peers": peers,
                "ratio_to_best_network_swap": round(slowdown / best, 2),
                "ratio_to_disk": round(slowdown / peers["disk"], 2),
                "misses": misses, "flushes": flushes, "modelled_slowdown": round(1 + extra / local, 4),
            }  # fmt: skip
        result[name] = shares
    return result


def figure(medians: dict[str, dict[str, float]], samples: dict[str, list[Sample]]) -> Figure:
    """Slowdown against the share of the working set that is on the blade, a line for each way to have the rest."""
    chart = Figure(figsize=(9, 4), layout="constrained")
    for axes, name in zip(chart.subplots(1, len(PROGRAMS)), PROGRAMS, strict=True):
        local = medians["local"][f"{name}_100"]
        for variant in ("excache", *PEERS):
            values = [medians[variant][f"{name}_{share}"] / local for share in SHARES]
            axes.plot(SHARES, values, "o-" if variant == "excache" else "s--", label=variant)
        axes.set(title=name, xlabel="% of the working set", ylabel="slowdown", ylim=(0, None))
        axes.legend()
    return chart


def _swap(variant: str, bed: Bed) -> AbstractContextManager[None]:
    if variant == "nbd":
        return swap.on_nbd(bed.near, bed.far, bed.address)
    if variant == "zram":
        return swap.on_zram(bed.near)
    if variant == "disk":
        return swap.on_disk(bed.disk)
    return swap.on_nvme(bed.near, bed.far, bed.address, variant.removeprefix("nvme_"))


def _limited(bed: Bed, blade: Connection, name: str, program: Program, limit: str) -> tuple[float, int, int, int]:
    """Run it in a cgroup of `limit` bytes: seconds, peak bytes, pages swapped in and out."""
    said = client.run(blade, f"""
        head -c {program.text} /tmp/english.txt > {TEXT}
        mkdir {_GROUP} && echo {limit} > {_GROUP}/memory.max
        count() {{ awk '/^pswpin/ {{ i = $2 }} /^pswpout/ {{ o = $2 }} END {{ print i, o }}' /proc/vmstat; }}
        before=$(count); start=$(date +%s.%N)
        output=$( (echo 0 > {_GROUP}/cgroup.procs; exec {program.command}) 2>&1 | md5sum )
        end=$(date +%s.%N)
        echo $start $end $(cat {_GROUP}/memory.peak) $before $(count) $(grep -w oom_kill {_GROUP}/memory.events)
        rmdir {_GROUP}; echo "$output" """, timeout=_RUN_SECONDS).stdout  # fmt: skip
    head, _, output = said.partition("\n")
    start, end, peak, in_before, out_before, in_after, out_after, _, killed = head.split()
    if killed != "0":
        raise RacklessError(f"{name} was killed for want of memory at a limit of {limit} bytes", hint="a larger text")
    _check(bed, name, output)
    return float(end) - float(start), int(peak), int(in_after) - int(in_before), int(out_after) - int(out_before)


def _excache(bed: Bed, name: str, program: Program, limit: int) -> dict[str, float]:
    said = client.run(bed.near, f"""
        head -c {program.text} /tmp/english.txt > {TEXT}; start=$(date +%s.%N)
        output=$( split run --excache {limit} --stats /tmp/stats --cwd /tmp -- {program.command} 2>&1 | md5sum )
        end=$(date +%s.%N); echo $start $end $(cat /tmp/stats); echo "$output" """,
                      timeout=_RUN_SECONDS).stdout  # fmt: skip
    head, _, output = said.partition("\n")
    start, end, stats = head.split(maxsplit=2)
    _check(bed, name, output)
    counted = json.loads(stats)
    return {"": float(end) - float(start), "_misses": counted["misses"], "_flushes": counted["flushes"]}


def _check(bed: Bed, name: str, output: str) -> None:
    if bed.output.setdefault(name, output) != output:
        raise RacklessError(f"{name} printed something else than it did unlimited")
