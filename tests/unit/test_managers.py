"""The global managers: policies by themselves, and a rack of agents in this process that die and come back."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from guest_agents.control import ControlError
from guest_agents.membership import Life
from guest_agents.splitkernel.managers import storage
from guest_agents.splitkernel.managers.memory import MemoryManager
from guest_agents.splitkernel.managers.process import ProcessManager
from guest_agents.splitkernel.managers.vnode import Ledger, VNode
from tests.unit import stand_in_pyverbs
from tests.unit.split_blades import MEMORY, Rack, Visitor, eventually

pytestmark = pytest.mark.long

REGION = 4 << 20
NAMES = ("gm0", "pb0", "pb1", "mb0", "mb1", "mb2", "sb0")
MakeRack = Callable[..., Rack]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[MakeRack]:
    made: list[Rack] = []

    def start(names: tuple[str, ...] = NAMES, **more: Any) -> Rack:
        made.append(Rack(tmp_path, names, **more))
        return made[-1]

    yield start
    for rack in made:
        rack.close()


@pytest.fixture
def sleeper() -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Starts processes that are there until the test ends."""
    started: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(["sleep", "600"]))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def program(pid: int, vnode: str = "web", state: str = "running", blade: str = "pb0") -> dict[str, Any]:
    return {"id": f"{blade}.{pid}", "blade": blade, "pid": pid, "vnode": vnode, "command": "x", "started": 1.0 * pid,
            "ended": None, "state": state, "exit_code": None}  # fmt: skip


# -- policies --


def test_round_robin_takes_turns_in_each_vnode() -> None:
    gmm = MemoryManager()
    gmm.report("mb0", 1 << 30, 1000)
    chosen = [gmm.order("round-robin", "web", ["mb1", "mb0", "mb2"], REGION)[0] for _ in range(6)]
    assert chosen == ["mb0", "mb1", "mb2"] * 2
    assert gmm.order("round-robin", "db", ["mb1", "mb0"], REGION) == ["mb0", "mb1"]
    assert gmm.order("round-robin", "none", [], REGION) == []


def test_most_free_counts_what_it_gave_since_the_last_report() -> None:
    gmm = MemoryManager()
    gmm.report("mb0", 10 * REGION, 0)
    gmm.report("mb1", 12 * REGION, 0)
    chosen = [gmm.order("most-free", "web", ["mb0", "mb1"], REGION)[0] for _ in range(6)]
    assert chosen.count("mb1") == 4  # 12, 11 | then both have 10
    gmm.report("mb1", 0, 0)
    assert gmm.order("most-free", "web", ["mb0", "mb1"], REGION) == ["mb0", "mb1"]
    gmm.forget("mb0")
    gmm.report("mb1", REGION, 0)
    assert gmm.order("most-free", "web", ["mb0", "mb1"], REGION) == ["mb1", "mb0"]


def test_each_copy_counts_where_it_goes() -> None:
    gmm = MemoryManager()
    for blade, free in (("mb0", 10), ("mb1", 12), ("mb2", 11)):
        gmm.report(blade, free * REGION, 0)
    assert gmm.order("most-free", "web", ["mb0", "mb1", "mb2"], REGION, 2)[:2] == ["mb1", "mb2"]
    assert {blade: load.free // REGION for blade, load in gmm.loads().items()} == {"mb0": 10, "mb1": 11, "mb2": 10}


def test_least_requests() -> None:
    gmm = MemoryManager()
    gmm.report("mb0", 0, 7)
    gmm.report("mb1", 0, 5)
    chosen = [gmm.order("least-requests", "web", ["mb0", "mb1"], REGION)[0] for _ in range(4)]
    assert chosen[:2] == ["mb1", "mb1"]
    assert sorted(chosen[2:]) == ["mb0", "mb1"]
    gmm.report("mb1", 0, 500)
    assert gmm.order("least-requests", "web", ["mb0", "mb1"], REGION)[0] == "mb0"


def test_programs_go_where_the_fewest_are() -> None:
    gpm = ProcessManager()
    gpm.hear(Life(2, 10), "pb0", 1, [program(1), program(2), program(3, state="exited")])
    gpm.hear(Life(3, 11), "pb1", 1, [program(9, blade="pb1")])
    assert gpm.place(["pb0", "pb1"]) == "pb1"
    assert gpm.place(["pb0", "pb1"]) == "pb0"  # the one that was just sent to pb1 counts
    assert gpm.place(["pb0", "pb1"]) == "pb1"
    assert gpm.place(["pb0"]) == "pb0"
    # Those that were sent to pb1 have arrived and ended: it is empty, and nothing is on its way.
    gpm.hear(Life(3, 11), "pb1", 2, [program(n, state="exited", blade="pb1") for n in (9, 10, 11)])
    assert [gpm.place(["pb0", "pb1"]) for _ in range(3)] == ["pb1"] * 3


def test_an_older_list_of_programs_is_ignored_and_a_dead_blades_are_lost() -> None:
    gpm = ProcessManager()
    gpm.hear(Life(2, 10), "pb0", 5, [program(1), program(2, state="exited")])
    gpm.hear(Life(2, 10), "pb0", 4, [])
    assert [p["id"] for p in gpm.running("web")] == ["pb0.1"]
    gpm.hear(Life(2, 11), "pb0", 1, [program(7)])
    lost = gpm.died(Life(2, 10))
    assert [(p["id"], p["state"]) for p in lost] == [("pb0.1", "lost")]
    assert gpm.died(Life(2, 10)) == []
    assert [p["id"] for p in gpm.programs()] == ["pb0.7"]


def test_files_go_where_the_fewest_vnodes_are() -> None:
    vnodes = [VNode(f"v{n}", n, None, (), (), blade, "round-robin") for n, blade in enumerate(("sb0", "sb0", "sb1"))]
    assert storage.choose(["sb1", "sb0"], []) == "sb0"
    assert storage.choose(["sb0", "sb1"], vnodes) == "sb1"
    assert storage.choose([], vnodes) is None


# -- vNodes --


def ledgers(rack: Rack) -> list[Ledger]:
    return [blade.line.holder.ledger for blade in rack.blades.values()]


def vnodes(rack: Rack) -> list[dict[str, Any]]:
    return list(rack.host("vnode.list")["vnodes"])


def test_a_vnode_is_created_listed_and_deleted(make: MakeRack) -> None:
    rack = make()
    made = rack.host("vnode.create", name="web", processors=["pb0"], memory=["mb0", "mb1"], storage=["sb0"],
                     placement="most-free")["vnode"]  # fmt: skip
    assert made == {"name": "web", "id": 1, "address": "10.0.0.1", "processors": ["pb0"], "memory": ["mb0", "mb1"],
                    "storage": "sb0", "placement": "most-free"}  # fmt: skip
    assert all(set(ledger.vnodes) == {"web"} for ledger in ledgers(rack))
    whole = rack.host("vnode.create", name="all")["vnode"]
    assert (whole["id"], whole["processors"], whole["memory"], whole["storage"]) == (
        2, ["pb0", "pb1"], ["mb0", "mb1", "mb2"], "sb0")  # fmt: skip
    assert [(v["name"], v["id"]) for v in vnodes(rack)] == [("default", 0), ("web", 1), ("all", 2)]
    assert vnodes(rack)[0]["processors"] == ["pb0", "pb1"]
    assert rack.host("vnode.list", name="web")["vnodes"] == [{**made, "programs": 0}]
    rack.host("vnode.delete", name="web")
    again = rack.host("vnode.create", name="web")["vnode"]
    assert (again["id"], again["address"]) == (3, "10.0.0.1")  # ids are not used twice
    assert [rack.host("vnode.create", name=f"v{n}")["vnode"]["address"] for n in range(3)] == [
        "10.0.0.3", "10.0.0.4", None]  # fmt: skip
    assert len({ledger.version for ledger in ledgers(rack)}) == 1


@pytest.mark.parametrize(
    ("op", "fields", "error", "hint"),
    [
        ("vnode.create", {"name": "web"}, "there is a vNode web already", "vnode list"),
        ("vnode.create", {"name": "default"}, "there is a vNode default already", "vnode list"),
        ("vnode.create", {"name": "../etc"}, "'../etc' cannot name a vNode", "a-z"),
        ("vnode.create", {"name": "x", "processors": ["pb7"]}, "there is no blade pb7", "did you mean pb"),
        ("vnode.create", {"name": "x", "memory": ["sb0"]}, "sb0 is a storage blade, not a memory blade", "mb0, mb1"),
        ("vnode.create", {"name": "x", "placement": "best"}, "there is no placement 'best'", "most-free"),
        ("vnode.create", {"name": "x", "storage": ["sb0", "sb0"]}, "one storage blade", "name one"),
        ("vnode.delete", {"name": "wen"}, "there is no vNode 'wen'", "web"),
        ("vnode.delete", {"name": "default"}, "cannot be deleted", None),
        ("vnode.list", {"name": "wen"}, "there is no vNode 'wen'", "web"),
        ("program.place", {"vnode": "wen"}, "there is no vNode 'wen'", "web"),
        ("program.place", {"vnode": "web", "on": "pb1"}, "pb1 is not a processor blade of vNode web", "pb0"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_with_a_hint(
    make: MakeRack, op: str, fields: dict[str, Any], error: str, hint: str | None
) -> None:
    rack = make(("gm0", "pb0", "pb1", "mb0", "mb1", "sb0"))
    rack.host("vnode.create", name="web", processors=["pb0"])
    before = ledgers(rack)[0]
    with pytest.raises(ControlError) as refused:
        rack.host(op, **fields)
    assert error in refused.value.error
    assert hint is None or hint in str(refused.value.hint)
    assert ledgers(rack)[0] == before


def test_a_dead_blade_cannot_become_part_of_a_vnode(make: MakeRack) -> None:
    rack = make(("gm0", "pb0", "mb0", "mb1"))
    rack["mb1"].kill()
    eventually(lambda: len(rack["pb0"].membership.of_kind("memory")) == 1)
    with pytest.raises(ControlError, match="mb1 is dead"):
        rack.host("vnode.create", name="web", memory=["mb1"])
    assert rack.host("vnode.create", name="web")["vnode"]["memory"] == ["mb0"]


@pytest.mark.parametrize("forgetting", [False, True])
def test_vnodes_survive_a_restart_of_the_manager(make: MakeRack, forgetting: bool) -> None:
    """Also when the manager blade is made anew: it is told by the others."""
    rack = make(("gm0", "pb0", "mb0"))
    rack.host("vnode.create", name="web")
    rack.host("vnode.create", name="db")
    rack.host("vnode.delete", name="web")
    rack.restart("gm0", forgetting=forgetting)
    assert [(v["name"], v["id"]) for v in vnodes(rack)] == [("default", 0), ("db", 2)]
    assert rack.host("vnode.create", name="web")["vnode"]["id"] == 3
    assert all(set(ledger.vnodes) == {"db", "web"} for ledger in ledgers(rack))


def test_vnodes_survive_a_restart_of_all_agents_at_once(make: MakeRack) -> None:
    rack = make(("gm0", "pb0", "mb0"))
    rack.host("vnode.create", name="web")
    rack.restart("gm0", "pb0", "mb0")
    eventually(lambda: [v["name"] for v in vnodes(rack)] == ["default", "web"])
    eventually(lambda: all(set(ledger.vnodes) == {"web"} for ledger in ledgers(rack)))


def test_blades_join_while_a_change_is_being_told(make: MakeRack) -> None:
    """The list of members is locked while a blade's report is taken: that must not wait for other blades."""
    rack = make(("gm0", "pb0", "mb0"))
    blade, manager, books = rack["pb0"], rack["gm0"].manager, rack["gm0"].line.books
    assert manager is not None
    assert books is not None
    claim = {**blade.membership._about, "incarnation": blade.membership.incarnation,
             "report": {"splitkernel": blade.line.holder.report()}}  # fmt: skip
    joined = threading.Thread(target=manager.join, args=(claim,), daemon=True)
    with books._changing:  # as long as somebody has not answered
        joined.start()
        joined.join(10)
        assert not joined.is_alive()


def test_a_blade_made_anew_learns_the_vnodes(make: MakeRack) -> None:
    rack = make(("gm0", "pb0", "mb0"))
    rack.host("vnode.create", name="web")
    rack.restart("pb0", forgetting=True)
    eventually(lambda: set(rack["pb0"].line.holder.ledger.vnodes) == {"web"})


def test_a_vnodes_address_is_at_the_first_of_its_processors_that_lives(make: MakeRack) -> None:
    rack = make(("gm0", "pb0", "pb1", "mb0"))
    rack.host("vnode.create", name="web", processors=["pb1", "pb0"])
    rack.host("vnode.create", name="db", processors=["pb0"])
    eventually(lambda: (rack["pb0"].addresses, rack["pb1"].addresses) == ({"10.0.0.2"}, {"10.0.0.1"}))
    rack["pb1"].kill()
    eventually(lambda: rack["pb0"].addresses == {"10.0.0.1", "10.0.0.2"})
    rack.restart("pb1", forgetting=True)
    eventually(lambda: (rack["pb0"].addresses, rack["pb1"].addresses) == ({"10.0.0.2"}, {"10.0.0.1"}))
    rack.host("vnode.delete", name="web")
    eventually(lambda: rack["pb1"].addresses == set())


# -- programs --


def test_programs_are_in_the_books_until_after_their_end(
    make: MakeRack, sleeper: Callable[[], subprocess.Popen[bytes]]
) -> None:
    rack = make(("gm0", "pb0", "pb1", "mb0"))
    rack.host("vnode.create", name="web", processors=["pb0"])
    process = sleeper()
    split = rack["pb0"].ask("job - web")
    split.ask(f"began {process.pid} sleep 600")
    name = f"pb0.{process.pid}"
    eventually(lambda: rack.programs() == {name: "running"})
    assert rack.host("vnode.list", name="web")["vnodes"][0]["programs"] == 1
    with pytest.raises(ControlError, match=f"running programs: {name}"):
        rack.host("vnode.delete", name="web")
    assert f"{name}  web    running  -" in Visitor(rack["pb1"].desk_path).ask("ps")
    with pytest.raises(AssertionError, match=r"no program pb0\.1 runs on pb0"):
        Visitor(rack["pb1"].desk_path).ask("kill pb0.1 TERM")
    with pytest.raises(AssertionError, match="there is no signal 'BANG'"):
        Visitor(rack["pb1"].desk_path).ask(f"kill {name} BANG")
    Visitor(rack["pb1"].desk_path).ask(f"kill {name} KILL")  # from another blade
    assert process.wait(10) == -signal.SIGKILL
    job = next(iter((rack.folder / "pb0.jobs").iterdir()))
    split.ask(f"report {job} 1.5 137")
    split.close()
    eventually(lambda: [(p["state"], p["exit_code"]) for p in rack.host("program.list")["programs"]]
               == [("exited", 137)])  # fmt: skip
    rack.host("vnode.delete", name="web")
    with pytest.raises(AssertionError, match="there is no vNode 'web'"):
        rack["pb0"].ask("job - web")
    with pytest.raises(AssertionError, match="no program"):
        Visitor(rack["pb0"].desk_path).ask(f"kill {process.pid} KILL")


def test_programs_of_the_same_vnode_spread_over_its_processors(make: MakeRack) -> None:
    rack = make(("gm0", "pb0", "pb1", "mb0"))
    rack.host("vnode.create", name="one", processors=["pb1"])
    assert [rack.host("program.place")["blade"] for _ in range(4)] == ["pb0", "pb1", "pb0", "pb1"]
    assert {rack.host("program.place", vnode="one")["blade"] for _ in range(3)} == {"pb1"}
    assert rack.host("program.place", vnode="one", on="pb1")["blade"] == "pb1"


def test_a_restart_of_the_manager_is_harmless_to_programs(
    make: MakeRack, sleeper: Callable[[], subprocess.Popen[bytes]]
) -> None:
    rack = make(("gm0", "pb0", "mb0", "mb1"))
    rack.host("vnode.create", name="web", memory=["mb1"])
    process = sleeper()
    split = rack["pb0"].ask("job - web")
    split.ask(f"began {process.pid} sleep")
    job = next(iter((rack.folder / "pb0.jobs").iterdir()))
    pager, news = rack["pb0"].ask(f"attach {process.pid} {job}"), rack["pb0"].ask("watch")
    connect(pager, "mb1")
    before = rack["pb0"].membership.incarnation
    rack["gm0"].kill()
    assert pager.ask(f"region {REGION} 1").split()[0] == "0"  # nobody to ask where: it goes to the next in turn
    split_2 = rack["pb0"].ask("job - web")  # and programs can begin
    split_2.ask(f"began {process.pid} again")
    rack.restart("gm0")
    assert rack["pb0"].membership.incarnation == before
    assert rack.programs() == {f"pb0.{process.pid}": "running"}
    assert len(rack.host("program.list")["programs"]) == 2
    pager.ask(f"region {REGION} 1")
    assert rack["mb1"].call("memory.stats")["regions"] == 2
    with pytest.raises(BlockingIOError):  # nothing is lost because the new manager heard of pb0 before mb1
        news.socket.recv(100, socket.MSG_DONTWAIT)
    split.close()
    split_2.close()


def test_a_dead_processor_blades_programs_are_lost_and_what_they_held_goes_back(
    make: MakeRack, sleeper: Callable[[], subprocess.Popen[bytes]]
) -> None:
    rack = make(("gm0", "pb0", "pb1", "mb0", "mb1"))
    process = sleeper()
    split = rack["pb0"].ask("job - default")
    split.ask(f"began {process.pid} sleep")
    job = next(iter((rack.folder / "pb0.jobs").iterdir()))
    pagers = [rack["pb0"].ask(f"attach {process.pid} {job}"), rack["pb1"].ask("attach 1 /none")]
    for pager in pagers:
        for blade in ("mb0", "mb1"):
            connect(pager, blade)
        for _ in range(2):
            pager.ask(f"region {REGION} 1")
            pager.ask(f"region {REGION} 2")
    def held() -> int:
        return sum(rack[blade].call("memory.stats")["regions"] for blade in ("mb0", "mb1"))

    assert held() == 12
    queue_pairs = stand_in_pyverbs.open_queue_pairs()
    eventually(lambda: rack.programs() == {f"pb0.{process.pid}": "running"})
    process.kill()  # and nobody notices: the blade has no power
    process.wait()
    rack["pb0"].kill()  # its control connections to the memory blades stay open, as those of a blade without power do
    eventually(lambda: rack.programs() == {f"pb0.{process.pid}": "lost"})
    eventually(lambda: held() == 6)
    assert stand_in_pyverbs.open_queue_pairs() == queue_pairs - 2
    pagers[1].ask(f"region {REGION} 1")  # others go on
    with pytest.raises(AssertionError, match="pb0 was declared dead"):  # should it not know it yet
        connect(pagers[0], "mb0")
    rack.restart("pb0", "gm0")
    assert rack.programs() == {f"pb0.{process.pid}": "lost"}  # not forgotten with the manager
    again = rack["pb0"].ask("attach 1 /none")
    connect(again, "mb0")
    again.ask(f"region {REGION} 1")
    split.close()


def test_copies_are_on_two_blades_of_the_vnode_and_first_ones_take_turns(make: MakeRack) -> None:
    rack = make()
    rack.host("vnode.create", name="web", memory=["mb0", "mb2"])
    split = rack["pb0"].ask("job - web")
    job = next(iter((rack.folder / "pb0.jobs").iterdir()))
    pager = rack["pb0"].ask(f"attach 1 {job}")
    for blade in ("mb0", "mb2"):
        connect(pager, blade)
    pairs = [tuple(pager.ask(f"region {REGION} 2").split()[::3]) for _ in range(6)]
    assert sorted(pairs) == [("0", "1")] * 3 + [("1", "0")] * 3
    assert [rack[blade].call("memory.stats")["regions"] for blade in ("mb0", "mb1", "mb2")] == [6, 0, 6]
    with pytest.raises(AssertionError, match="error 12"):
        pager.ask(f"region {REGION} 3")
    assert [rack[blade].call("memory.stats")["regions"] for blade in ("mb0", "mb2")] == [6, 6]
    split.close()


def test_a_memory_blade_that_dies_is_asked_for_nothing(make: MakeRack) -> None:
    rack = make(("gm0", "pb0", "mb0", "mb1"))
    pager, news = rack["pb0"].ask("attach 1 /none"), rack["pb0"].ask("watch")
    for blade in ("mb0", "mb1"):
        connect(pager, blade)
    assert pager.ask(f"region {REGION} 2")
    rack["mb0"].kill()
    assert news.socket.recv(100) == b"lost mb0"
    assert [pager.ask(f"region {REGION} 1").split()[0] for _ in range(3)] == ["1"] * 3
    rack.restart("mb0", forgetting=True)
    assert news.socket.recv(100) == b"back mb0"
    connect(pager, "mb0")
    assert {pager.ask(f"region {REGION} 1").split()[0] for _ in range(2)} == {"0", "1"}


def test_programs_that_outlive_their_agent_are_seen_and_ended_again(
    make: MakeRack, sleeper: Callable[[], subprocess.Popen[bytes]]
) -> None:
    rack = make(("gm0", "pb0", "mb0"))
    rack.host("vnode.create", name="web")
    goes_on, ends = sleeper(), sleeper()
    splits = [rack["pb0"].ask("job - web") for _ in range(2)]
    for split, process in zip(splits, (goes_on, ends), strict=True):
        split.ask(f"began {process.pid} sleep")
    eventually(lambda: len(rack.programs()) == 2)
    jobs = rack.folder / "pb0.jobs"
    kept = list(jobs.iterdir())
    rack["pb0"].kill()
    ends.kill()
    ends.wait()
    rack.restart("pb0")
    eventually(lambda: rack.programs() == {f"pb0.{goes_on.pid}": "running", f"pb0.{ends.pid}": "lost"})
    assert len(list(jobs.iterdir())) == 1
    assert set(jobs.iterdir()) < set(kept)
    Visitor(rack["pb0"].desk_path).ask(f"kill {goes_on.pid} KILL")
    goes_on.wait(10)
    eventually(lambda: rack.programs()[f"pb0.{goes_on.pid}"] == "exited")
    eventually(lambda: not list(jobs.iterdir()))
    for split in splits:
        split.close()


def test_regions_go_to_the_memory_blades_of_the_vnode_at_the_managers_choice(make: MakeRack) -> None:
    rack = make(memory={"mb0": 64 << 20, "mb1": 256 << 20, "mb2": 512 << 20})
    rack.host("vnode.create", name="web", memory=["mb0", "mb1"], placement="most-free")
    books = rack["gm0"].line.books
    assert books is not None
    eventually(lambda: {blade: load.free for blade, load in books.memory.loads().items()} == rack.memory)
    split = rack["pb0"].ask("job - web")
    job = next(iter((rack.folder / "pb0.jobs").iterdir()))
    pager = Visitor(rack["pb0"].desk_path)
    assert pager.ask(f"attach {os.getpid()} {job}") == "mb0 mb1"
    for blade in ("mb0", "mb1"):
        connect(pager, blade)
    counts = [pager.ask(f"region {REGION} 1").split()[0] for _ in range(60)]
    assert counts[:48] == ["1"] * 48  # until it has as little left as the other
    assert {"0", "1"} == set(counts[48:])
    eventually(lambda: books.memory.loads()["mb1"].requests == counts.count("1"))
    split.close()
    pager.close()
    eventually(lambda: {blade: load.free for blade, load in books.memory.loads().items()} == rack.memory)


def test_a_manager_that_hangs_is_not_waited_for_twice(make: MakeRack) -> None:
    rack = make(("gm0", "pb0", "mb0"))
    books = rack["gm0"].line.books
    assert books is not None
    asked, over = [], threading.Event()

    def hang(*arguments: Any) -> list[str]:
        asked.append(arguments)
        over.wait(60)
        return []

    books.memory.order = hang  # type: ignore[method-assign,assignment]
    pager = rack["pb0"].ask("attach 1 /none")
    connect(pager, "mb0")
    for _ in range(3):
        pager.ask(f"region {REGION} 1")
    over.set()
    assert len(asked) == 1
    assert rack["mb0"].call("memory.stats")["regions"] == 3


def test_a_blade_that_has_no_room_after_all_is_passed_over(make: MakeRack) -> None:
    rack = make(("gm0", "pb0", "mb0", "mb1"), memory={"mb0": 8 << 20, "mb1": MEMORY})
    pager = rack["pb0"].ask("attach 1 /none")
    for blade in ("mb0", "mb1"):
        connect(pager, blade)
    assert [pager.ask(f"region {REGION} 1").split()[0] for _ in range(6)].count("0") == 2
    for _ in range(MEMORY // REGION - 4):
        pager.ask(f"region {REGION} 1")
    with pytest.raises(AssertionError, match="error 12 the memory blades are full"):
        pager.ask(f"region {REGION} 1")


def connect(pager: Visitor, blade: str) -> None:
    pager.ask(f"connect {blade} 17 4711 {'00' * 10}ffff7f000002")
