"""vRegions on real blades: what a program unmaps goes back to the memory blades while it runs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.rack.conftest import Rack

pytestmark = [pytest.mark.rack, pytest.mark.timeout(600)]

SOURCE = Path(__file__).parent / "native" / "paging_stress.c"
PROGRAM = "/tmp/paging_ebbs"


def test_memory_that_is_unmapped_goes_back(rack: Rack, tmp_path: Path) -> None:
    program, stats_file = tmp_path / "paging_stress", tmp_path / "stats.json"
    subprocess.run(["cc", "-std=gnu17", "-O2", "-o", program, SOURCE, "-lpthread"], check=True)
    rack("cp", str(program), f"pb0:{PROGRAM}")
    rack.on("pb0", f"chmod +x {PROGRAM}")
    done = rack("run", "--on", "pb0", "--excache", "4MiB", "--replicas", "2", "--stats", str(stats_file), "--",
                PROGRAM, "ebbs", "32", "2")  # fmt: skip
    assert done.stdout == "ebbs: fine\n"
    stats = json.loads(stats_file.read_text())
    assert stats["requests"]["P2M_MUNMAP"] == stats["regions_returned"] > 4
    memory = json.loads(rack("top", "--json", "--seconds", "0.2").stdout)["memory"]
    returned = sum(blade["requests"].get("P2M_MUNMAP", 0) for blade in memory)
    assert returned >= 2 * stats["regions_returned"]  # a blade for each copy
    assert [blade["regions"] for blade in memory] == [0, 0]
    print({name: stats[name] for name in ("regions", "regions_returned", "misses", "flushes", "wall_seconds")})
