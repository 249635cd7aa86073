"""One miss and its parts, and misses per second with several threads: touch.c under `split run`.

Every touch is of a page that is only at the memory blade, in random order. Its time is the program's; the parts within
are the pager's counters of misses. The rest is the *delivery*: from the access to the pager thread, and back.
"""

from __future__ import annotations

import json
from pathlib import Path

from experiments.bed import Bed
from orchestrator.bench import Sample
from orchestrator.ssh import client

MIB = 1 << 20
AREA_MIB, EXCACHE_MIB = 16, 4
COUNT = 1000
THREADS = (1, 2, 4)
_SOURCE = Path(__file__).with_name("touch.c")
_PROGRAM, _STATS = "/root/touch_pages", "/tmp/stats"
PARTS = ("delivery", "lookup", "read", "install")


def prepare(bed: Bed) -> None:
    """Compile the program on the blade."""
    bed.near.put(str(_SOURCE), "/root/")
    client.run(bed.near, f"gcc -O2 -o {_PROGRAM} /root/{_SOURCE.name} -lpthread")


def sample(bed: Bed) -> Sample:
    """Microseconds of single misses and their parts; misses per second by threads."""
    result: Sample = {}
    for threads in THREADS:
        split = f"split run --excache {EXCACHE_MIB * MIB} --stats {_STATS} --cwd /tmp --"
        command = f"{split} {_PROGRAM} {AREA_MIB} {COUNT} {threads} && cat {_STATS}"
        seconds, *touches, stats = client.run(bed.near, command, timeout=300).stdout.splitlines()
        counted = json.loads(stats)
        result[f"misses_per_second_{threads}"] = counted["misses"] / float(seconds)
        if threads == 1:
            result |= parts([float(touch) for touch in touches], counted)
    return result


def parts(touches: list[float], counted: dict[str, float]) -> Sample:
    """From each touch's microseconds and the counters of a run in which all of them were misses.

    Parts are means (the pager keeps sums); the medians of the touches are beside them.
    """
    each = {name: counted[f"{name}_nanoseconds"] / 1e3 / counted["misses"] for name in ("miss", "read", "install")}
    mean = sum(touches) / counted["misses"]
    return {
        "touch": touches,
        "touch_mean": mean,
        "delivery": mean - each["miss"],
        "lookup": each["miss"] - each["read"] - each["install"],
        "read": each["read"],
        "install": each["install"],
    }


def summary(median: dict[str, float]) -> dict[str, object]:
    """The one-miss figures by name; empty without a sample."""
    if not median:
        return {}
    return {
        "median_us": median["touch"],
        "mean_us": median["touch_mean"],
        "parts_of_the_mean_us": {part: median[part] for part in PARTS},
        "misses_per_second": {str(threads): median[f"misses_per_second_{threads}"] for threads in THREADS},
    }
