"""Programs whose memory blades die: the real shim, pager and userfaultfd, over stand-in verbs and memory blades."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from tests.unit.paging_stage import Done, Stage, missing

LOST = 70
"""Exit code of a program that lost the only copy of some memory."""
pytestmark = [pytest.mark.long, pytest.mark.skipif(missing() is not None, reason=missing() or "")]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage(tmp_path_factory.mktemp("replica"))


# Mode, MiB, rounds; and of how many requests to blades there are more for sure.
MODES = [
    ("mixed", 16, 1, 1000), ("skewed", 16, 2, 1000), ("blocks", 16, 1, 120), ("maps", 16, 1, 900),
    ("threads", 16, 1, 400), ("forks", 12, 1, 1500), ("orphan", 8, 1, 500),
]  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("mode", "mebibytes", "rounds", "requests"), MODES)
def test_every_byte_survives_a_death(
    stage: Stage, mode: str, mebibytes: int, rounds: int, requests: int, seed: int
) -> None:
    chance = random.Random(f"{mode}{seed}")
    events = f"{chance.randrange(3)}{chance.choice('xsl')}{chance.randrange(1, requests)}"
    done = stage.run(stage.stress, mode, str(mebibytes), str(rounds), events=events)
    assert (done.code, done.stderr) == (0, ""), f"{events}: {done}"
    assert done.counted["failovers"] == 1, f"{events}: {done}"
    assert done.counted["replica_writes"] > 0


@pytest.mark.parametrize("seed", range(2))
def test_every_byte_survives_many_deaths_and_returns(stage: Stage, seed: int) -> None:
    chance, events, now = random.Random(seed), [], 0
    victims = [chance.randrange(3) for _ in range(2)]
    for victim in victims:
        # Time to copy everything from the survivors: two deaths at once may well take both copies.
        now += chance.randrange(2500, 3500)
        events += [f"{victim}{chance.choice('xsl')}{now}", f"{victim}+{now + chance.randrange(100, 1000)}"]
    done = stage.run(stage.stress, "mixed", "12", "6", str(seed + 1), events=" ".join(events), excache=3 << 20)
    assert (done.code, done.stderr) == (0, ""), f"{events}: {done}"
    assert done.counted["failovers"] == 2, f"{events}: {done}"
    assert done.counted["rereplicated_bytes"] > 1 << 20


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize(("mode", "mebibytes", "rounds", "requests"), MODES)
def test_every_byte_survives_a_drain(
    stage: Stage, mode: str, mebibytes: int, rounds: int, requests: int, replicas: int
) -> None:
    chance = random.Random(f"{mode}{replicas}")
    events = f"{chance.randrange(3)}d{chance.randrange(1, requests // 3)}"
    done = stage.run(stage.stress, mode, str(mebibytes), str(rounds), events=events, replicas=replicas)
    assert (done.code, done.stderr) == (0, ""), f"{events}: {done}"
    assert done.counted["failovers"] == 1, f"{events}: {done}"


def held(done: Done) -> int:
    """The vRegions that a program had when it ended."""
    return int(done.counted["regions"] - done.counted["regions_returned"])


def test_a_drain_without_room_elsewhere_changes_nothing(stage: Stage) -> None:
    done = stage.run(stage.stress, "conflicts", "12", "2", events="0d500", replicas=1, blades=2, regions=2)
    assert (done.code, done.stderr, done.counted["failovers"]) == (0, "", 0), done
    done = stage.run(stage.stress, "mixed", "12", "8", events="0d500 0k3000 1d3300", replicas=1, blades=2)
    assert (done.code, done.stderr, done.counted["failovers"]) == (0, "", 2), done


def test_two_blades_are_drained_at_once(stage: Stage) -> None:
    """Some regions have both their places on these."""
    done = stage.run(stage.stress, "mixed", "12", "8", events="0d500 1d500", blades=4)
    assert (done.code, done.stderr, done.counted["failovers"]) == (0, "", 2), done


def test_what_finds_no_second_place_does_not_keep_a_drained_blade(stage: Stage) -> None:
    """What is on the third blade has no place for another copy while the others leave."""
    done = stage.run(stage.stress, "mixed", "12", "4", events="0d500 1d500", blades=3)
    assert (done.code, done.counted["failovers"]) == (0, 2), done
    assert done.stderr.count("\n") == done.stderr.count("goes on with one copy of some of its memory\n") == 1


def test_two_blades_one_dies_and_comes_back(stage: Stage) -> None:
    done = stage.run(stage.stress, "mixed", "12", "8", events="0x600", blades=2)
    assert (done.code, done.counted["failovers"]) == (0, 1), done
    assert done.stderr == (
        "rackless: no second memory blade is left: the program goes on with one copy of some of its memory\n"
    )
    assert done.counted["degraded_regions"] == held(done)
    # It is there again, and has copies of all when the other one dies.
    done = stage.run(stage.stress, "mixed", "12", "8", events="0x600 0+700 1s2500", blades=2)
    assert (done.code, done.counted["failovers"]) == (0, 2), done
    assert done.counted["rereplicated_bytes"] > 1 << 20


def test_a_program_may_grow_while_one_of_two_blades_dies(stage: Stage) -> None:
    script = """if True:
        import hashlib
        blocks = [bytearray(4 << 20) for _ in range(8)]
        for number, block in enumerate(blocks):
            block[:] = hashlib.shake_256(bytes([number])).digest(len(block))
        print(hashlib.md5(b"".join(hashlib.md5(block).digest() for block in blocks)).hexdigest())"""
    expected = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    done = stage.run(sys.executable, "-c", script, blades=2, asked=5)
    assert (done.code, done.stdout, done.counted["failovers"]) == (0, expected, 1), done
    assert done.counted["degraded_regions"] == held(done)
    assert done.counted["regions"] > 8


def test_without_replicas_a_death_is_the_end(stage: Stage) -> None:
    for kind, why in (("x", "transport retry counter exceeded"), ("s", "it has left the rack")):
        done = stage.run(stage.stress, "mixed", "12", "8", events=f"1{kind}400", replicas=1)
        assert (done.code, done.stdout) == (LOST, ""), done
        assert done.stderr == (
            f"rackless: memory blade mb1 is lost ({why}): the program's memory is no longer whole, it ends here\n"
        )


def test_both_copies_lost_is_the_end(stage: Stage) -> None:
    done = stage.run(stage.stress, "mixed", "12", "8", events="1x600 2x601 0x602")
    assert done.code == LOST
    assert "the program's memory is no longer whole" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_end_is_the_end_of_forked_children_too(stage: Stage) -> None:
    # They hold standard output, for whose end `run` waits.
    done = stage.run(stage.stress, "forks", "12", "1", events="1x1800", replicas=1)
    assert done.code == LOST, done
    assert done.counted["forks"] == 1


@pytest.mark.parametrize(("replicas", "regions"), [(1, 12), (2, 6)])
def test_more_than_the_blades_have_is_refused(stage: Stage, replicas: int, regions: int) -> None:
    script = "x = []\ntry:\n  while True: x.append(bytearray(1 << 20))\nexcept MemoryError: print(len(x))"
    done = stage.run(sys.executable, "-c", script, replicas=replicas, regions=4)
    assert (done.code, done.stderr) == (0, ""), done
    assert done.counted["regions"] == regions
    assert 4 * regions - 16 < int(done.stdout) < 4 * regions


def test_two_copies_need_two_blades(stage: Stage) -> None:
    done = stage.run(sys.executable, "-c", "x = bytearray(64 << 20)", blades=1)
    assert done.code == 1
    assert "rackless: no remote memory: 2 copies need as many memory blades, and there is 1\n" in done.stderr
    assert "MemoryError" in done.stderr


@pytest.mark.parametrize("seed", range(2))
def test_sort_gives_the_same_order(stage: Stage, seed: int) -> None:
    chance = random.Random(seed)
    text = "".join(f"{chance.randrange(10**12)}\n" for _ in range(100_000))
    expected = "".join(f"{line}\n" for line in sorted(text.split()))
    events = f"{seed}x{chance.randrange(20, 200)}"
    done = stage.run("sort", "--parallel=2", "-S", "16M", events=events, stdin=text)
    assert (done.code, done.stderr, done.counted["failovers"]) == (0, "", 1), f"{events}: {done.stderr} {done.counted}"
    assert done.stdout == expected
