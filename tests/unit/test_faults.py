"""Faults: what is refused, what becomes of a blade, and that all of it can be undone."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest_agents import control
from orchestrator import engine, pmem
from orchestrator.errors import RacklessError
from orchestrator.faults import inject, model
from orchestrator.faults.model import Faults, link_fields, sides
from orchestrator.hypervisor import domain
from orchestrator.model import Disk, Link
from tests.unit.broken_racks import BrokenRack, broken_rack, make_domain
from tests.unit.netns_racks import needs_root
from tests.unit.stand_in import blade_specs

pytestmark = pytest.mark.long

SPEC = blade_specs("t", ("gm0", "mb0"))["mb0"]
KINDS = {"gm0": "manager", "pb0": "processor", "mb0": "memory", "mb1": "memory"}
ALL = {"latency": "20 ms", "jitter": "5 ms", "loss": "10 %", "corruption": "1 %", "duplication": "2 %",
       "bandwidth": "10 Mbit/s", "deaf_to": ["gm0"], "cpu": "20 %", "memory": "16 MiB", "clock": "-90 s"}  # fmt: skip
DISK = replace(SPEC, disk=Disk.model_validate({"size": "64 MiB"}))


# The model


def test_a_fault_makes_a_link_worse_and_never_better() -> None:
    spec = replace(SPEC, link=Link.model_validate({"latency": "1 ms", "bandwidth": "1 Mbit/s", "loss": "50 %"}))
    fields = link_fields(spec, Faults().having(**ALL), {"gm0": "10.77.0.10"})
    assert fields == {
        "latency": pytest.approx(0.021), "jitter": pytest.approx(0.005), "loss": pytest.approx(0.55),
        "bandwidth": 10**6, "corruption": 0.01, "duplication": 0.02, "deaf_to": ["10.77.0.10"],
    }  # fmt: skip
    assert model.quota(replace(spec, cpu_quota=0.1), Faults().having(cpu="20 %")) == 0.1
    assert link_fields(SPEC, Faults(), {})["bandwidth"] is None


def test_faults_are_kept_and_read_back() -> None:
    faults = Faults().having(**ALL, paused=True, side=0)
    assert Faults.model_validate(faults.to_json()) == faults
    assert not Faults()
    assert Faults().to_json() == {}
    assert faults.without(*faults.names) == Faults() == faults.without()
    assert faults.without("latency").names == tuple(name for name in faults.names if name != "latency")
    assert faults.shown()[:4] == ["paused", "side 0", "deaf to gm0", "latency 20 ms"]
    power = Faults().having(killed=True, survive="50 %", seed=7, cpu="20 %")
    assert power.shown()[:3] == ["killed", "survive 50 %", "seed 7"]
    assert power.without("killed").names == ("cpu",), "how it was killed is of no use once it is back"
    assert model.of("running", {"ready": True, "faults": power.to_json()}).names == ("cpu",), "nor was it"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ({}, {"latency": "20"}, 'fault latency: "20" has no unit'),
        ({}, {"latency": "0 s"}, "fault latency: it is nothing"),
        ({}, {"loss": "100 %"}, "fault loss: .* too large"),
        ({}, {"bandwidth": "1 bit/s"}, "fault bandwidth: .* too small"),
        ({}, {"cpu": "0 %"}, "fault cpu: .* too small"),
        ({}, {"deaf_to": ["mb0"]}, "mb0 cannot be deaf to itself"),
        ({}, {"jitter": "1 ms"}, "jitter of mb0 would be more than its latency"),
        ({}, {"memory": "1 TiB"}, "does not have so much memory"),
        ({"killed": True}, {"cpu": "5 %"}, "mb0 is killed"),
        ({"killed": True}, {"paused": True}, "mb0 is killed"),
        ({"paused": True}, {"killed": True}, "mb0 is paused, and would be killed"),
        ({"paused": True}, {"loss": "1 %"}, "mb0 is paused: its own kernel"),
        ({}, {"paused": True, "memory": "1 MiB"}, "mb0 is paused: its own kernel"),
        ({"down": True}, {"latency": "1 ms"}, "the link of mb0 is down"),
        ({"latency": "1 ms"}, {"down": True}, "the link of mb0 has other faults"),
        ({}, {"down": True, "loss": "1 %"}, "the link of mb0 is down"),
        ({}, {"killed": True, "survive": "50 %"}, "mb0 has no persistent memory"),
        ({}, {"killed": True, "survive": "101 %"}, "fault survive: .* too large"),
        ({}, {"killed": True, "seed": -1}, "fault seed"),
        ({}, {"survive": "50 %"}, "fault killed: only what is killed"),
        ({}, {"disk_full": True}, "mb0 has no data disk"),
        ({}, {"disk_latency": "10 us"}, "fault disk_latency: .* too small"),
        ({}, {"disk_errors": "some"}, "fault disk_errors: "),
        ({}, {"clock": "0 s"}, "fault clock: it is nothing"),
        ({}, {"clock": "+400 d"}, "fault clock: .* too large"),
        ({}, {"clock": "soon"}, "fault clock: .* is not a clock offset"),
        ({"paused": True}, {"clock": "1 s"}, "mb0 is paused: its own kernel"),
    ],
)
def test_what_cannot_be_is_refused(old: dict[str, Any], new: dict[str, Any], message: str) -> None:
    before = Faults().having(**old)
    with pytest.raises(RacklessError, match=message) as caught:
        model.check("mb0", before, before.having(**new), SPEC)
    assert "\n" not in caught.value.message


def test_a_disk_that_fails_has_no_other_faults() -> None:
    slow, failing = Faults().having(disk_latency="20 ms", disk_full=True), Faults().having(disk_errors="reads")
    model.check("sb0", Faults(), slow, DISK)
    model.check("sb0", Faults(), failing, DISK)
    assert slow.shown() == ["disk latency 20 ms", "disk full"]
    assert model.disk_fields(slow) == {"latency": pytest.approx(0.02), "full": True}
    assert model.disk_fields(failing) == {"errors": "reads"}
    for old, new in ((slow, {"disk_errors": "all"}), (failing, {"disk_full": True})):
        with pytest.raises(RacklessError, match="the disk of sb0 fails"):
            model.check("sb0", old, old.having(**new), DISK)


def test_sides_of_a_partition() -> None:
    assert sides([["gm0", "pb0"], ["mb0", "mb1"]], KINDS, "gm0") == {"gm0": 0, "pb0": 0, "mb0": 2, "mb1": 2}
    assert sides([["mb0"]], KINDS, "gm0") == {"gm0": 0, "pb0": 0, "mb0": 1, "mb1": 0}, "others stay with the manager"
    for groups, message in (
        ([["gm0", "pb0", "mb0", "mb1"]], "parts nothing"),
        ([["gm0"]], "parts nothing"),
        ([], "parts nothing"),
        ([["mb0"], []], "is empty"),
        ([["mb0"], ["mb1", "mb0"]], "mb0 is in two groups"),
        ([["mb9"]], "no blade mb9"),
    ):
        with pytest.raises(RacklessError, match=message):
            sides(groups, KINDS, "gm0")


@given(st.lists(st.lists(st.sampled_from([*KINDS]), min_size=1, unique=True), min_size=1, max_size=4))
def test_two_blades_hear_each_other_if_they_are_in_one_group(groups: list[list[str]]) -> None:
    try:
        found = sides(groups, KINDS, "gm0")
    except RacklessError:
        return
    faults = {name: Faults().having(side=side) for name, side in found.items()}
    home = {name: number for number, group in enumerate(groups) for name in group}
    for one in KINDS:
        for other in KINDS:
            together = home.get(one, home.get("gm0")) == home.get(other, home.get("gm0"))
            assert model.cut_off(one, faults[one], other, faults[other]) != together


# On blades


@pytest.fixture
def rack(monkeypatch: pytest.MonkeyPatch) -> Iterator[BrokenRack]:
    with broken_rack(monkeypatch) as made:
        yield made


@pytest.fixture
def change(rack: BrokenRack) -> Any:
    """inject.inject of one blade; the names of blades that changed."""

    def inject_one(name: str, dry: bool = False, **faults: Any) -> tuple[str, ...]:
        return inject.inject(rack.paths.settings, rack.name, {name: faults}, dry).changed

    return inject_one


real = [pytest.mark.netns, needs_root]


class TestBlades:
    pytestmark = real

    def test_a_partition_parts_and_heals(self, rack: BrokenRack) -> None:
        settings, name = rack.paths.settings, rack.name
        assert rack.parts() == [{"gm0", "pb0", "mb0", "mb1"}]
        groups = [["gm0", "pb0"], ["mb0", "mb1"]]
        assert not set(inject.partition(settings, name, groups, dry=True).changed) ^ set(rack.specs)
        assert rack.bridges() == {"mgmt", "fabric"}, "a dry run touches nothing"
        inject.partition(settings, name, groups)
        assert rack.parts() == [{"gm0", "pb0"}, {"mb0", "mb1"}]
        assert inject.partition(settings, name, groups).changed == ()
        with pytest.raises(RacklessError, match="parted already"):
            inject.partition(settings, name, [["mb0"]])
        healed = inject.heal(settings, name, [])
        assert set(healed.changed) == set(rack.specs)
        assert rack.parts() == [{"gm0", "pb0", "mb0", "mb1"}]
        assert rack.bridges() == {"mgmt", "fabric"}
        assert inject.heal(settings, name, []).changed == ()
        inject.partition(settings, name, [["mb0"], ["mb1"]])
        assert rack.parts() == [{"gm0", "pb0"}, {"mb0"}, {"mb1"}]

    def test_what_the_agent_makes_is_told_it_and_taken_back(self, rack: BrokenRack, change: Any) -> None:
        assert change("mb0", dry=True, **ALL) == ("mb0",)
        assert rack.updates["mb0"] == []
        assert change("mb0", **ALL) == ("mb0",)
        (told,) = rack.updates["mb0"]
        addresses = {name: spec.fabric_address for name, spec in rack.specs.items()}
        assert told["link"] == link_fields(rack.specs["mb0"], Faults().having(**ALL), addresses)
        assert (told["pressure"], told["clock"], told["disk_faults"]) == (16 << 20, -90, {})
        assert rack.limits == {f"{rack.name}.mb0": 0.2}
        assert rack.metadata("mb0")["faults"] == ALL
        assert inject.faults(rack.paths.settings, rack.name)["mb0"] == Faults().having(**ALL)
        assert change("mb0", latency="20 ms") == (), "it is so already"
        assert change("mb0", latency="30 ms") == ("mb0",)
        inject.heal(rack.paths.settings, rack.name, ["mb0"], ("loss",))
        assert rack.updates["mb0"][-1]["link"]["loss"] == 0
        assert rack.updates["mb0"][-1]["link"]["latency"] == pytest.approx(0.03)
        inject.heal(rack.paths.settings, rack.name, ["mb0"])
        assert rack.updates["mb0"][-1]["link"] == link_fields(rack.specs["mb0"], Faults(), {})
        assert (rack.updates["mb0"][-1]["pressure"], rack.updates["mb0"][-1]["clock"]) == (0, 0)
        assert rack.limits == {f"{rack.name}.mb0": None}
        assert rack.metadata("mb0")["faults"] == {}

    def test_power(self, rack: BrokenRack, change: Any) -> None:
        assert change("mb0", paused=True) == ("mb0",)
        assert rack.state("mb0") == "paused"
        assert change("mb0", paused=True) == ()
        inject.heal(rack.paths.settings, rack.name, ["mb0"], ("paused",))
        assert rack.state("mb0") == "running"
        assert change("mb0", cpu="30 %") == ("mb0",)
        assert change("mb0", killed=True) == ("mb0",)
        assert rack.state("mb0") == "off"
        assert change("mb0", killed=True) == ()
        assert rack.metadata("mb0")["faults"] == {"killed": True, "cpu": "30 %"}
        inject.heal(rack.paths.settings, rack.name, ["mb0"], ("killed",))
        ((wanted, only),) = rack.ups
        assert only == {"mb0"}
        assert wanted.name == rack.name
        assert {n: b.kind for n, b in wanted.blades.items()} == KINDS
        assert rack.metadata("mb0")["faults"] == {"killed": True, "cpu": "30 %"}, "until it is made anew"
        inject.heal(rack.paths.settings, rack.name, [])
        assert rack.metadata("mb0")["faults"] == {"killed": True}

    def test_power_takes_what_was_not_persisted(self, rack: BrokenRack, change: Any) -> None:
        line, settings = 64, rack.paths.settings
        metadata = rack.metadata("mb0")
        spec = replace(rack.specs["mb0"], pmem=16 << 20)
        domain.write_metadata(domain.owned(rack.conn, rack.name)["mb0"].domain, {**metadata, "spec": spec.to_json()})
        files = rack.paths.blade("mb0")
        files.root.mkdir(parents=True)
        pmem.prepare(files, 16 << 20)
        with files.pmem_vol.open("r+b") as vol:
            vol.write(b"s" * line * 1000)
        said: list[str] = []
        inject.inject(settings, rack.name, {"mb0": {"killed": True, "survive": "25 %", "seed": 3}},
                      emit=lambda event: said.append(getattr(event, "message", None) or ""))  # fmt: skip
        assert rack.metadata("mb0")["faults"] == {"killed": True, "survive": "25 %", "seed": 3}
        lines = files.pmem.read_bytes()
        kept = sum(lines[n * line : (n + 1) * line] == b"s" * line for n in range(1000))
        assert 150 < kept < 350
        assert [text for text in said if "persist" in text] == [
            f"mb0: lines of its persistent memory that were not persisted: 1000, survived: {kept}"]  # fmt: skip
        with pytest.raises(RacklessError, match="mb0 is killed"):
            change("mb0", killed=True, survive="100 %")
        assert files.pmem.read_bytes() == lines
        inject.heal(settings, rack.name, ["mb0"])
        assert rack.ups[0][1] == {"mb0"}

    def test_a_disk(self, rack: BrokenRack, change: Any) -> None:
        spec = replace(rack.specs["mb0"], kind="storage", disk=DISK.disk)
        domain.write_metadata(domain.owned(rack.conn, rack.name)["mb0"].domain,
                              {**rack.metadata("mb0"), "spec": spec.to_json()})  # fmt: skip
        settings, name = rack.paths.settings, rack.name
        change("mb0", disk_latency="20 ms", disk_full=True)
        assert rack.updates["mb0"][-1]["disk_faults"] == {"latency": 0.02, "full": True}
        inject.heal(settings, name, ["mb0"])
        assert rack.updates["mb0"][-1]["disk_faults"] == {}
        assert (rack.state("mb0"), rack.ups) == ("running", [])
        change("mb0", disk_errors="reads", cpu="30 %")
        assert rack.updates["mb0"][-1]["disk_faults"] == {"errors": "reads"}
        inject.heal(settings, name, ["mb0"], ("disk_errors",))
        assert (rack.state("mb0"), rack.ups[0][1]) == ("off", {"mb0"}), "its file system is mounted again"
        assert rack.metadata("mb0")["faults"] == {"killed": True, "cpu": "30 %"}

    def test_a_disk_that_cannot_be_broken_keeps_its_power(self, rack: BrokenRack, change: Any) -> None:
        spec = replace(rack.specs["mb0"], kind="storage", disk=DISK.disk)
        domain.write_metadata(domain.owned(rack.conn, rack.name)["mb0"].domain,
                              {**rack.metadata("mb0"), "spec": spec.to_json()})  # fmt: skip
        rack.replies["mb0 agent.update"] = control.ControlError("no such target")  # type: ignore[assignment]
        with pytest.raises(RacklessError, match="no such target"):
            change("mb0", disk_errors="all")
        assert (rack.state("mb0"), rack.metadata("mb0")["faults"], rack.ups) == ("running", {}, [])

    def test_a_cable(self, rack: BrokenRack, change: Any) -> None:
        change("mb1", down=True)
        assert rack.cables == {f"{rack.name}.mb1": False}
        inject.heal(rack.paths.settings, rack.name, [], ("down",))
        assert rack.cables == {f"{rack.name}.mb1": True}

    def test_a_blade_that_refuses_is_as_it_was(self, rack: BrokenRack, change: Any) -> None:
        rack.replies["mb0 agent.update"] = control.ControlError("there are only 3 MiB that can be taken")  # type: ignore[assignment]
        with pytest.raises(RacklessError, match="only 3 MiB"):
            change("mb0", memory="64 MiB")
        assert rack.metadata("mb0")["faults"] == {}

    def test_bad_words_touch_nothing(self, rack: BrokenRack, change: Any) -> None:
        settings, name = rack.paths.settings, rack.name
        for call, message in (
            (lambda: change("mb9", paused=True), "no blade mb9 in rack"),
            (lambda: change("mb0", slow="1 %"), "no fault is called slow"),
            (lambda: change("mb0", deaf_to=["mb9"]), "no blade mb9"),
            (lambda: inject.heal(settings, name, ["mb9"]), "no blade mb9"),
            (lambda: inject.heal(settings, name, [], ("slow",)), "no fault is called slow"),
            (lambda: inject.partition(settings, name, [["mb9"]]), "no blade mb9"),
            (lambda: inject.inject(settings, "other", {"mb0": {"paused": True}}), "rack other is not up"),
            (lambda: inject.inject(settings, name, {"mb0": {"paused": True}, "mb1": {"loss": "200 %"}}), "too large"),
        ):
            with pytest.raises(RacklessError, match=message):
                call()
        assert all(rack.state(blade) == "running" for blade in rack.specs)
        assert all(rack.metadata(blade).get("faults", {}) == {} for blade in rack.specs)
        assert not any(rack.updates.values())


@pytest.mark.long
@pytest.mark.netns
@needs_root
def test_a_hundred_random_faults_and_nothing_is_left(rack: BrokenRack, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each, what is there is what the faults say; refused ones change nothing. RACKLESS_SEED gives others."""
    seed = int(os.environ.get("RACKLESS_SEED", "2026"))
    chance = random.Random(seed)
    settings, name, blades = rack.paths.settings, rack.name, [*rack.specs]

    def up(_settings: object, _wanted: object, _emit: object, only: set[str]) -> None:
        for blade in only:
            kept = inject.faults(settings, name)[blade].without("killed", "paused")
            domain.destroy(domain.owned(rack.conn, name)[blade].domain)
            make_domain(rack.conn, rack.specs[blade], faults=kept.to_json())

    monkeypatch.setattr(engine, "up", up)
    values: dict[str, Any] = {**ALL, "killed": True, "paused": True, "down": True}
    refused = 0
    for turn in range(100):
        before = inject.faults(settings, name)
        fault, blade = chance.choice([*values]), chance.choice(blades)
        try:
            match chance.randrange(5):
                case 0:
                    inject.heal(settings, name, [blade])
                case 1:
                    inject.partition(settings, name, [chance.sample(blades, chance.randint(1, 3))])
                case 2:
                    inject.heal(settings, name, [], (chance.choice([fault, "side"]),))
                case _:
                    inject.inject(settings, name, {blade: {fault: values[fault]}})
        except RacklessError:
            refused += 1
            assert inject.faults(settings, name) == before, f"turn {turn} of seed {seed}"
        faults = inject.faults(settings, name)
        for one in blades:
            stands = "off" if faults[one].killed else "paused" if faults[one].paused else "running"
            assert rack.state(one) == stands, f"turn {turn} of seed {seed}"
            if not faults[one].killed:
                assert rack.master(one) == f"fabric~{faults[one].side}".removesuffix("~0").removesuffix("~None")
    assert 0 < refused < 80, f"seed {seed}"
    inject.heal(settings, name, [])
    assert not any(inject.faults(settings, name).values())
    assert rack.bridges() == {"mgmt", "fabric"}
    assert rack.parts() == [set(blades)]
    assert all(rack.state(one) == "running" for one in blades)
