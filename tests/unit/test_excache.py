"""Each organisation of the ExCache: no byte is lost, no page is in two places, sets keep their limits, counters add up.

The real shim, pager and userfaultfd, over stand-in verbs and memory blades; native/lines_check.c looks into the pager.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.unit.paging_stage import Stage, missing

pytestmark = [pytest.mark.long, pytest.mark.skipif(missing() is not None, reason=missing() or "")]
PAGE = 4096

ORGANISATIONS: list[dict[str, str | int]] = [
    {},
    {"policy": "lru"},
    {"policy": "random"},
    {"pool": "off"},
    {"ways": 1},
    {"ways": 8},
    {"ways": 8, "policy": "lru"},
    {"ways": 64, "policy": "lru", "victim": 8},
    {"ways": 8, "policy": "random", "prefetch": 1},
    {"ways": 2, "victim": 1, "prefetch": 4},
]
MODES = [("mixed", 16), ("threads", 16), ("blocks", 16), ("maps", 16), ("forks", 12), ("orphan", 8), ("conflicts", 8)]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage(tmp_path_factory.mktemp("excache"), checked=True)


def add_up(counted: dict[str, Any], organisation: dict[str, str | int]) -> None:
    """Check that counters agree with each other; without forks (children are given pages too) and deaths."""
    assert counted["misses"] == counted["reads"] == sum(blade["misses"] for blade in counted["blades"].values())
    assert counted["bytes_in"] == PAGE * (counted["misses"] + counted["prefetched"])
    assert counted["bytes_out"] == PAGE * counted["flushes"]
    assert counted["flushes"] == sum(blade["flushes"] for blade in counted["blades"].values())
    assert counted["piggybacks"] <= counted["misses"]
    assert counted["evictions"] >= counted["zero_drops"] + counted["packed"]
    assert counted["packed"] >= counted["packed_hits"] + counted["spills"] >= 0
    assert counted["doze_hits"] <= counted["dozes"]
    assert (counted["dozes"] > 0) == (organisation.get("policy") == "lru")
    assert (counted["packed"] > 0) == ("ways" not in organisation and organisation.get("pool") != "off")
    assert counted["prefetched"] == 0 or organisation.get("prefetch") != 1


@pytest.mark.parametrize("organisation", ORGANISATIONS, ids=str)
@pytest.mark.parametrize(("mode", "mebibytes"), MODES)
def test_every_byte_is_right(stage: Stage, organisation: dict[str, str | int], mode: str, mebibytes: int) -> None:
    done = stage.run(stage.stress, mode, str(mebibytes), "1", replicas=1, organisation=organisation)
    assert (done.code, done.stderr) == (0, ""), done
    assert done.counted["flushes"] > 0
    ways = int(organisation.get("ways", 0))
    lines = done.counted["excache_bytes"] // PAGE
    assert ways * done.counted["sets"] <= lines
    assert done.counted["sets"] == 1 if not ways else ways * (done.counted["sets"] + 1) > lines // 2
    if mode not in ("forks", "orphan", "maps"):
        add_up(done.counted, organisation)


@pytest.mark.parametrize("organisation", [{}, {"pool": "off"}, {"ways": 4, "policy": "lru"}], ids=str)
@pytest.mark.parametrize(
    "case",
    ["protection", "unmapping", "remapping", "advice", "signals", "threads", "calls", "children", "crowd", "toggling"],
)
def test_calls_about_memory_do_what_the_kernel_does(
    stage: Stage, organisation: dict[str, str | int], case: str
) -> None:
    """mprotect, munmap and SIGSEGV, mremap, madvise, signals, threads' stacks and locks, read and write, fork."""
    done = stage.run(stage.calls, "4", case, replicas=1, organisation=organisation, excache=2 << 20)
    assert (done.code, done.stdout, done.stderr) == (0, f"{case}: fine\n", "")
    assert done.counted["misses"] > 50


@pytest.mark.parametrize("seed", range(3))
def test_every_byte_is_right_with_any_organisation(stage: Stage, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(5):
        organisation: dict[str, str | int] = {
            "ways": chance.choice([0, 1, 3, 16, 100]),
            "policy": chance.choice(["fifo", "lru", "random"]),
            "victim": chance.choice([0, 1, 5, 200]),
            "prefetch": chance.choice([0, 1, 2, 32]),
            "pool": chance.choice(["on", "off"]),
        }
        mode = chance.choice(["mixed", "skewed", "threads", "forks", "blocks"])
        death = f"{chance.randrange(3)}{chance.choice('xsl')}{chance.randrange(1, 100)}"
        done = stage.run(stage.stress, mode, "12", "1", str(chance.randrange(1000)), events=death,
                         organisation=organisation, excache=chance.choice([1, 2, 3, 5]) << 20)  # fmt: skip
        assert (done.code, done.stderr, done.counted["failovers"]) == (0, "", 1), f"{organisation} {death}: {done}"


@pytest.mark.parametrize("replicas", [1, 2])
def test_memory_that_is_unmapped_goes_back(stage: Stage, replicas: int) -> None:
    done = stage.run(stage.stress, "ebbs", "48", "3", replicas=replicas, organisation={"pool": "off"})
    assert (done.code, done.stdout, done.stderr) == (0, "ebbs: fine\n", "")
    held = done.counted["regions"] - done.counted["regions_returned"]
    assert done.counted["regions_returned"] >= 10
    assert held < 10  # of 16: 6 MiB stay, and some spare
    # It is enough that there is room for what is held at a time.
    tight = stage.run(stage.stress, "ebbs", "48", "3", replicas=replicas, organisation={"pool": "off"}, regions=24)
    assert (tight.code, tight.stdout, tight.stderr) == (0, "ebbs: fine\n", "")


@pytest.mark.parametrize("seed", range(2))
def test_memory_goes_back_while_blades_die(stage: Stage, seed: int) -> None:
    chance = random.Random(seed)
    death = f"{chance.randrange(3)}{chance.choice('xsld')}{chance.randrange(100, 2000)}"
    done = stage.run(stage.stress, "ebbs", "32", "2", str(seed), events=death, excache=2 << 20)
    assert (done.code, done.stdout) == (0, "ebbs: fine\n"), f"{death}: {done}"
    assert done.counted["regions_returned"] > 0
    assert done.counted["failovers"] == 1


def test_a_line_that_meets_others_in_its_set_leaves_early(stage: Stage) -> None:
    """Seventeen pages of one set do not fit into 8 ways, but fit into an ExCache without sets."""

    def counted(stride: int, organisation: dict[str, str | int]) -> dict[str, Any]:
        done = stage.run(stage.stress, "conflicts", "8", "8", str(stride), replicas=1, organisation=organisation)
        assert (done.code, done.stderr) == (0, "")
        return done.counted

    sets = counted(1000, {"ways": 8, "victim": 1})["sets"]
    one = counted(sets, {"pool": "off", "victim": 1})
    assert one["sets"] == 1
    assert counted(sets, {"ways": 8, "victim": 1})["misses"] > 2 * one["misses"]


def test_lines_are_free_before_they_are_needed(stage: Stage) -> None:
    """Most evictions happen while a READ is on its way, or while nobody waits; none when sets say who leaves."""
    counted = stage.run(stage.stress, "mixed", "16", "1", replicas=1, organisation={"pool": "off"}).counted
    assert counted["evictions"] >= counted["evicted_ahead"] > counted["evictions"] // 2
    counted = stage.run(stage.stress, "mixed", "16", "1", replicas=1, organisation={"ways": 8}).counted
    assert counted["evicted_ahead"] == 0


def test_threads_do_not_wait_for_each_others_misses(stage: Stage) -> None:
    done = stage.run(stage.stress, "threads", "16", "1", replicas=1, organisation={"pool": "off"})
    assert (done.code, done.stderr) == (0, "")
    assert done.counted["misses"] == done.counted["reads"] > done.counted["overlaps"] > done.counted["misses"] // 20


def test_pages_that_are_only_read_stop_being_sent(stage: Stage) -> None:
    """They were changed once, and so expected to be changed again; that is looked at now and then."""
    program = ("import random; data = bytearray(random.Random(1).randbytes(12 << 20))\n"
               "for n in range(40):\n"
               "    for at in range(0, len(data), 4096): data[at]\n")  # fmt: skip
    counted = stage.run("python3", "-c", program, replicas=1, organisation={"pool": "off"}).counted
    assert counted["bytes_in"] > 35 * (8 << 20)
    assert counted["flushes"] < 12 * (12 << 20) // PAGE


def test_what_may_not_be_read_can_leave_when_it_must(stage: Stage) -> None:
    """With one way, a page without read permission is all there is to make room in its set."""
    organisation: dict[str, str | int] = {"ways": 1, "victim": 1}
    sets = stage.run(stage.stress, "mixed", "8", "1", replicas=1, organisation=organisation).counted["sets"]
    done = stage.run(stage.stress, "conflicts", "16", "2", str(sets), replicas=1, organisation=organisation)
    assert (done.code, done.stdout, done.stderr) == (0, "conflicts: fine\n", "")


def test_lru_keeps_what_is_used_again_and_again(stage: Stage) -> None:
    """Low pages are popular: with the same lines LRU misses them less often than FIFO."""
    misses = {
        policy: stage.run(stage.stress, "skewed", "16", "8", replicas=1, organisation={"policy": policy, "pool": "off"})
        .counted["misses"]
        for policy in ("fifo", "lru")
    }  # fmt: skip
    assert misses["lru"] < misses["fifo"]
