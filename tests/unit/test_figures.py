"""What is made of a pager's counters: sums over processes, requests by opcode, the ratio of faults, the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from guest_agents.splitkernel.opcodes import STORAGE, Tally, storage_name
from guest_agents.splitkernel.process import counters, figures
from guest_agents.splitkernel.storage.wire import Op
from tests.unit.paging_counters import write_counters

PAGE = 4096


def test_a_job_is_the_sum_of_its_processes_by_blade_too(tmp_path: Path) -> None:
    write_counters(tmp_path, 10, {"mb0": {"misses": 3, "bytes_in": 5 * PAGE}, "mb1": {"misses": 1}}, command="sort",
                   excache_bytes=1 << 22, faults=40, misses=4, reads=4, zero_fills=9, pages_touched=7)  # fmt: skip
    write_counters(tmp_path, 11, {"mb0": {"misses": 2}}, excache_bytes=1 << 22, faults=60, misses=2, reads=2,
                   pages_touched=3, regions=1)  # fmt: skip
    write_counters(tmp_path, 12, managed=0, excache_bytes=1 << 22, pages_touched=5, zero_fills=5)
    job = figures.of_job(tmp_path)
    assert (job["programs"], job["managed"], job["misses"], job["excache_bytes"]) == (3, 2, 6, 1 << 22)
    assert (job["zero_fills"], job["working_set_bytes"]) == (14, 15 * PAGE)
    assert {name: blade["misses"] for name, blade in job["blades"].items()} == {"mb0": 5, "mb1": 1}
    assert job["requests"] == {"P2M_PCACHE_MISS": 6, "P2M_PCACHE_FLUSH": 0, "P2M_PCACHE_REPLICA": 0, "P2M_MMAP": 1,
                               "P2M_MUNMAP": 0}  # fmt: skip
    assert job["hit_ratio_of_faults"] == 0.94
    assert [(one["pid"], one["command"], one["hit_ratio_of_faults"]) for one in job["processes"]] == [
        (11, "app", 0.9667), (10, "sort", 0.9)]  # fmt: skip
    assert job["processes_left_out"] == 0


def test_requests_leave_out_the_copies_of_re_replication() -> None:
    counted = dict.fromkeys(counters.FIELDS, 0) | {
        "misses": 374, "reads": 619, "writes": 1605, "replica_requests": 680, "rereplicated_bytes": 245 * PAGE,
        "regions": 5, "regions_returned": 2,
    }  # fmt: skip
    assert figures.requests(counted) == {
        "P2M_PCACHE_MISS": 374, "P2M_PCACHE_FLUSH": 680, "P2M_PCACHE_REPLICA": 680, "P2M_MMAP": 5,
        "P2M_MUNMAP": 2}  # fmt: skip


def test_without_faults_there_is_no_ratio(tmp_path: Path) -> None:
    job = figures.of_job(tmp_path)
    assert (job["programs"], job["hit_ratio_of_faults"], job["processes"], job["blades"]) == (0, None, [], {})
    assert figures.model(job, 2.0)["slowdown"] == 1.0


def test_the_model_is_the_papers_cost_of_each_page() -> None:
    counted = dict.fromkeys(counters.FIELDS, 0) | {
        "bytes_in": 1100 * PAGE, "rereplicated_bytes": 100 * PAGE, "flushes": 500, "piggybacks": 20,
        "busy_nanoseconds": 3 * 10**9,
    }  # fmt: skip
    model = figures.model(counted, 4.0)
    assert model["network_seconds"] == pytest.approx((980 * 6.31 + 480 * 6.11 + 20 * 8.23) / 1e6, abs=1e-6)
    assert model["local_seconds"] == 1.0
    assert model["slowdown"] == pytest.approx(1 + model["network_seconds"], abs=1e-4)
    assert "a model" in model["label"]
    assert figures.model(counted, 2.0)["slowdown"] is None, "several pagers were busy at once: nothing is known"


def test_an_answer_stays_one_message_however_many_processes_there_are(tmp_path: Path) -> None:
    blades = {f"mb{number}": {"misses": 1 << 40} for number in range(16)}
    for pid in range(200):
        write_counters(tmp_path, 1000 + pid, blades, faults=pid)
    job = figures.of_job(tmp_path)
    assert len(json.dumps(job)) < 60_000
    assert job["processes"][0]["pid"] == 1199, "the busiest are told of"
    assert len(job["processes"]) + job["processes_left_out"] == 200


def test_a_file_that_was_not_finished_is_passed_over(tmp_path: Path) -> None:
    write_counters(tmp_path, 1, faults=1)
    (tmp_path / "2.counters").write_bytes(b"")
    (tmp_path / "3.counters").write_bytes(bytes(counters.SIZE))
    assert list(counters.processes(tmp_path)) == [1]


def test_names_of_requests_to_storage() -> None:
    assert storage_name(Op.READ) == "M2S_READ"
    assert storage_name(Op.CREATE) == storage_name(Op.OPEN) == "P2S_OPEN"
    assert storage_name(Op.SYMLINK) == "SYMLINK", "the original has no such opcode"
    assert storage_name(999) == "unknown"
    assert all(name.startswith(("P2S_", "M2S_")) for name in STORAGE.values())


def test_a_tally_counts_what_is_refused_too() -> None:
    tally = Tally()

    def refuse(_request: object) -> dict[str, object]:
        raise OSError

    handlers = tally.counting({"memory.allocate": refuse, "vnode.list": lambda _request: {}})
    with pytest.raises(OSError):
        handlers["memory.allocate"]({})
    handlers["vnode.list"]({})
    assert tally.counts() == {"P2M_MMAP": 1, "vnode.list": 1}
