"""Blades that die and come back with their media or without, on stand-in verbs. The matrix is test_hotpot_crash.py."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from guest_agents import lite
from guest_agents.hotpot import blocks
from guest_agents.hotpot.blocks import Copy
from guest_agents.hotpot.home import Home
from guest_agents.hotpot.lease import Timing
from guest_agents.hotpot.programs import Programs
from guest_agents.hotpot.service import Service
from tests.unit import lite_pair
from tests.unit.hotpot_rack import Blade, mortal, shells
from tests.unit.lite_blades import Rack, eventually
from tests.unit.lite_stack import whole

pytestmark = [pytest.mark.long, pytest.mark.skipif(lite_pair.missing() is not None, reason=str(lite_pair.missing()))]
PAGE = 4096
TIMING = Timing(beat=0.1, lease=4.0, promote=3.0, patience=2.0, settle=1.0)
NAMES = ("gm0", "mb0", "mb1", "mb2")


@pytest.fixture
def rack(tmp_path: Path, lite_core: Path) -> Iterator[Rack]:
    with whole(tmp_path, lite_core, *NAMES) as made:
        yield made


@pytest.fixture
def blades(rack: Rack, tmp_path: Path) -> dict[str, Blade]:
    """Their services; they are never closed, as some of them die."""
    found = {}
    for name in NAMES:
        node = lite.connect(str(rack[name].tier.settings.socket))
        service = Service(node, tmp_path / f"media-{name}", 1, timing=TIMING).start()
        Programs(lambda service=service: service, tmp_path / f"{name}.hotpot").start()  # type: ignore[misc]
        found[name] = Blade(tmp_path / f"{name}.hotpot", service, tmp_path / f"media-{name}")
    return found


def kill(rack: Rack, name: str, watcher: Blade) -> None:
    """The blade dies, and others hear of it."""
    number = rack[name].membership.node_id
    rack[name].kill()
    eventually(lambda: number not in watcher.service.links.living())


def test_copies_on_a_dead_node_are_made_elsewhere(rack: Rack, blades: dict[str, Blade]) -> None:
    with shells(blades["mb0"]) as [program]:
        program.do(f"d = session.create('set', {PAGE}, owners=[2])")
        program.do("d.memory[:4] = b'once'\nd.commit((0, 4), replicas=2)")
        home = blades["mb0"].service.owner.homes()[0]
        [holder] = home.copies[0]
        name = NAMES[holder - 1]
        assert name != "gm0", "whose death nobody could tell"
        kill(rack, name, blades["mb0"])
        program.do("d.memory[:4] = b'more'\nd.commit((0, 4), replicas=2)")
        [other] = home.copies[0]
        assert other != holder
        copy = blades[NAMES[other - 1]].service.copies.read(home.record.id, 0)
        assert copy == home.read(0)
        assert program.refused("d.memory[:4] = b'lost'\nd.commit((0, 4), replicas=4)").startswith("TooFewNodes")


def test_what_only_a_dead_owner_has_waits_for_it_and_the_rest_goes_on(rack: Rack, blades: dict[str, Blade]) -> None:
    with shells(blades["mb0"]) as [program]:
        program.do(f"d = session.create('set', {4 * PAGE}, chunk={PAGE}, owners=[2, 3])")
        program.do("with d.transaction() as t: t.acquire(0, 4)[:] = b'here'; t.acquire(4096, 4)[:] = b'then'")
        kill(rack, "mb1", blades["mb0"])
        assert program.refused("""
with d.transaction() as t:
    t.acquire(0, 4)[:] = b'lost'
    t.acquire(4096, 4)[:] = b'lost'
""").startswith("NodeLost")
        assert program.do("bytes(d.memory[:4]), bytes(d.memory[4096:4100])") == (b"here", b"then")
        assert not blades["mb0"].service.owner.homes()[0].locks
        program.do("d.run(lambda t: t.acquire(0, 4).__setitem__(slice(4), b'more'), replicas=2)")
        assert program.do("bytes(d.memory[:4])") == b"more"
        assert program.refused("d.run(lambda t: t.acquire(4096, 4).__setitem__(0, 1))").startswith("InDoubt")
        assert program.refused("d.transaction().acquire(3 * 4096, 4)").startswith("NodeLost")
        program.process.communicate('"d.memory[3 * 4096]"\n', timeout=30)
        assert program.process.returncode == -signal.SIGBUS, "as there is nothing to read"


def test_a_copy_becomes_the_home_when_its_owner_is_dead(rack: Rack, blades: dict[str, Blade]) -> None:
    with shells(blades["mb0"]) as [program]:
        program.do(f"d = session.create('set', {2 * PAGE}, chunk={PAGE}, owners=[2, 3])")
        program.do("d.memory[0:4] = d.memory[4096:4100] = b'kept'\nd.commit((0, d.size), replicas=2)")
        kill(rack, "mb1", blades["mb0"])
        eventually(lambda: blades["gm0"].service.atlas.refresh(1).homes[1] != 3)
        program.do("d.run(lambda t: t.acquire(4100, 4).__setitem__(slice(4), b'more'), replicas=2)")
        assert program.do("bytes(d.memory[4096:4104])") == b"keptmore"
        home = blades["gm0"].service.atlas.refresh(1).homes[1]
        service = blades[NAMES[home - 1]].service
        assert service.owner.home(1, 1).read(1).data[:8] == b"keptmore"


@pytest.mark.parametrize("mode", ["mrmw", "mrsw"])
def test_a_commit_that_an_owner_could_not_finish_is_finished_later(
    blades: dict[str, Blade], monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    mb1, write = blades["mb1"].service, Home.write

    def fail(home: Home, pages: dict[int, Copy]) -> None:
        if pages and home in mb1.owner.homes():
            raise lite.NotJoined
        write(home, pages)

    with shells(blades["mb0"]) as [program]:
        program.do(f"d = session.create('set', {2 * PAGE}, chunk={PAGE}, owners=[2, 3], mode={mode!r})")
        program.do("d.commit((0, d.size))")
        for value, areas in ((1, "(4096, 4)"), (2, "(0, 4), (4096, 4)")):
            monkeypatch.setattr(Home, "write", fail)
            program.do(f"d.memory[0] = d.memory[4096] = {value}")
            assert program.refused(f"d.commit({areas})").startswith("InDoubt")
            [home] = mb1.owner.homes()
            assert list(home.locks) == [1]
            assert program.refused("d.memory[4096] = 7\nd.commit((4096, 4))").startswith("Retry"), "it stays locked"
            program.do("d.discard((0, d.size))")
            monkeypatch.undo()
            eventually(lambda home=home: not home.locks)  # type: ignore[misc]
            assert home.read(1).data[0] == value
            eventually(lambda: program.do("d.memory[4096]") == value)  # noqa: B023
            eventually(lambda: not blades["mb0"].service.coordinator.unfinished)  # it keeps the pages (MRSW)
        for blade in blades.values():
            eventually(lambda blade=blade: not blade.service._intents.used and not blade.service._log.used)  # type: ignore[misc]


def test_a_home_whose_node_was_taken_for_dead_is_in_reach_again(rack: Rack, blades: dict[str, Blade]) -> None:
    """Its registered memory has ended with the node's life in LITE; what is on its media has not."""
    with shells(blades["mb0"], blades["mb1"], blades["mb2"]) as [own, other, late]:
        own.do(f"d = session.create('set', {2 * PAGE}, chunk={PAGE}, owners=[2])")
        own.do("d.memory[:4], d.memory[4096:4100] = b'kept', b'more'\nd.commit((0, d.size))")
        assert other.do("d = session.open('set')\n") is None
        assert other.do("bytes(d.memory[:4])") == b"kept"
        before = rack["mb0"].membership.incarnation
        rack["mb0"].declare_dead()
        eventually(lambda: rack["mb0"].membership.incarnation != before)
        assert other.do("bytes(d.memory[4096:4100])") == b"more"
        late.do("d = session.open('set')")
        late.do("d.run(lambda t: t.acquire(4096, 4).__setitem__(slice(4), b'then'))")
        assert [program.do("bytes(d.memory[4096:4100])") for program in (own, other, late)] == [b"then"] * 3
        home = blades["mb0"].service.owner.home(1, 0)
        assert blocks.unseal(home.memory.read(blocks.STRIDE, at=blocks.STRIDE)) == home.read(1)


def test_a_service_that_was_killed_comes_back_with_what_it_had(tmp_path: Path, rack: Rack) -> None:
    """By SIGKILL, while programs commit; what they were told of is there, in its next life."""
    with lite.connect(str(rack["gm0"].tier.settings.socket)) as manager:
        dispatcher = Service(manager, tmp_path / "dispatcher", 1, timing=TIMING).start()
        counted = 0
        for life in range(3):
            with mortal(rack["mb0"].tier.settings.socket, tmp_path) as (place, service):
                made = "session.create('set', 8192, owners=[2])" if life == 0 else "session.open('set')"
                program = place.start(f"""
d = {made}
print("begins", d.memory[:8].cast("Q")[0], flush=True)
while True:
    d.run(lambda t: [v.__setitem__(0, v[0] + 1) for v in [t.acquire(0, 8).cast("Q"), t.acquire(4096, 8).cast("Q")]])
    print("done", d.memory[:8].cast("Q")[0], flush=True)
""")
                assert program.stdout is not None
                begun = int(program.stdout.readline().split()[1])
                assert begun in (counted, counted + 1), "all that was acknowledged, and perhaps what was under way"
                for _ in range(5):
                    program.stdout.readline()
                service.kill()
                service.wait()
                rest, errors = program.communicate(timeout=60)
                assert program.returncode == -signal.SIGBUS or "NotJoined" in errors, errors
                counted = max(int(line.split()[1]) for line in [f"done {begun + 5}", *rest.splitlines()])
        dispatcher.close()


def test_another_node_becomes_the_dispatcher_when_the_managers_service_has_gone(blades: dict[str, Blade]) -> None:
    others = [blade.service for name, blade in blades.items() if name != "gm0"]
    with shells(blades["mb0"], blades["mb1"]) as [here, there]:
        here.do(f"d = session.create('set', {2 * PAGE}, chunk={PAGE}, owners=[2, 3])")
        there.do("d = session.open('set')")
        for service in others:
            service.lease.timing = replace(TIMING, lease=1.0, takeover=2.0)
        blades["gm0"].service.close()
        gone = blades["gm0"].service.node.node_id
        eventually(lambda: len({service.lease.manager for service in others} - {gone}) == 1, seconds=40)
        eventually(lambda: all(service.lease.manager != gone for service in others))
        eventually(lambda: all(service.lease.valid for service in others))
        here.do("with d.transaction(replicas=2) as t:\n    t.acquire(0, 4)[:] = t.acquire(4096, 4)[:] = b'more'")
        assert there.do("bytes(d.memory[0:4]), bytes(d.memory[4096:4100])") == (b"more", b"more")
        here.do(f"e = session.create('new', {PAGE}, owners=[2])")
        assert [about["name"] for about in there.do("session.datasets()")] == ["set", "new"]
