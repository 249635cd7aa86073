"""Plans: what happens to which blade and why; properties that hold for every rack, and golden plans."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import RacklessError
from orchestrator.fields import GIB, MIB
from orchestrator.model import Rack
from orchestrator.plan import ActionKind, Observed, Plan, State, check_capacity, make_plan
from orchestrator.rackfile import load
from orchestrator.spec import BladeSpec, blade_address, changes, host_address, mac_address, make_spec
from tests.unit.rack_strategies import racks

TREE = Path(__file__).parent.parent.parent
GOLDEN = Path(__file__).parent / "data/plans"
DEFAULT = load(TREE / "racks/default.yml")
IMAGE = "sha256-of-an-image"
STATES: list[State] = ["running", "paused", "stopped", "broken", "absent"]


def carried_out(plan: Plan) -> dict[str, Observed]:
    """The blades there are once a plan is carried out, their specs read back from the metadata."""
    blades: dict[str, Observed] = {}
    for action in plan.actions:
        if action.spec is not None:
            metadata = json.dumps(action.spec.to_json())
            blades[action.blade] = Observed(
                action.blade, "running", BladeSpec.from_json(json.loads(metadata))
            )
    return blades


def edited(rack: Rack, **parts: Any) -> Rack:
    """The rack with some of its parts (as in a rack file) replaced; a blade or link of None is removed."""
    data = rack.model_dump(mode="json")
    for part, value in parts.items():
        if isinstance(value, Mapping):
            data[part] = {k: v for k, v in {**data[part], **value}.items() if v is not None}
        else:
            data[part] = value
    return Rack.model_validate(data)


def changed_blade(name: str, **fields: Any) -> Rack:
    blade = DEFAULT.blades[name].model_dump(mode="json") | fields
    return edited(DEFAULT, blades={name: blade})


RUNNING = carried_out(make_plan(DEFAULT, IMAGE, {}))

FAR = {"address": "192.168.1.5", "uri": "qemu+ssh://root@192.168.1.5/system"}
SPREAD = edited(DEFAULT, hosts={"here": {"address": "192.168.1.4"}, "far": FAR})
ON_FAR: dict[str, str | None] = {"mb0": "far", "sb0": "far"}

GOLDEN_PLANS: dict[str, tuple[Any, ...]] = {
    "first-up": (DEFAULT, IMAGE, {}),
    "nothing-to-do": (DEFAULT, IMAGE, RUNNING),
    "memory-changed": (changed_blade("mb0", memory="1 GiB"), IMAGE, RUNNING),
    "live-changes": (
        edited(
            DEFAULT,
            blades={
                "pb0": DEFAULT.blades["pb0"].model_dump(mode="json") | {"excache": "16 MiB"},
                "mb0": DEFAULT.blades["mb0"].model_dump(mode="json") | {"cpu_quota": None},
                "sb0": DEFAULT.blades["sb0"].model_dump(mode="json")
                | {"disk": {"size": "2 GiB", "bandwidth": "50 MiB/s"}},
            },
            links={"mb1": {"latency": "1 ms", "loss": "0.5 %"}, "mb0": {"bandwidth": "100 Mbit/s"}},
        ),
        IMAGE,
        RUNNING,
    ),
    "disk-grown": (
        changed_blade("sb0", disk={"size": "4 GiB", "iops": 2000, "bandwidth": "100 MiB/s"}),
        IMAGE,
        RUNNING,
    ),
    "blades-exchanged": (
        edited(
            DEFAULT,
            blades={"mb0": None, "mb2": {"kind": "memory", "memory": "512 MiB"}, "sb0": None},
        ),
        IMAGE,
        RUNNING,
    ),
    "new-image": (DEFAULT, "another-image-0123456789", RUNNING),
    "other-fabric": (edited(DEFAULT, fabric={"subnet": "10.99.0.0/24", "mtu": 4500}), IMAGE, RUNNING),
    "spread": (SPREAD, IMAGE, {}, ON_FAR),
    "hosts-added": (SPREAD, IMAGE, RUNNING, {}),
    "blades-moved": (SPREAD, IMAGE, RUNNING, ON_FAR),
    "after-faults": (
        DEFAULT,
        IMAGE,
        {
            **RUNNING,
            "pb0": Observed("pb0", "paused", RUNNING["pb0"].spec),
            "mb0": Observed("mb0", "stopped", RUNNING["mb0"].spec),
            "mb1": Observed("mb1", "broken", RUNNING["mb1"].spec),
            "sb0": Observed("sb0", "running", None),
            "gm0": Observed("gm0", "absent", RUNNING["gm0"].spec),
        },
    ),
}


@pytest.mark.parametrize("name", GOLDEN_PLANS)
def test_golden_plan(name: str) -> None:
    """What `rackless plan` says (RACKLESS_GOLDEN=write writes the expected texts)."""
    plan = make_plan(*GOLDEN_PLANS[name])
    text = "\n".join(plan.render()) + "\n"
    golden = GOLDEN / f"{name}.txt"
    if os.environ.get("RACKLESS_GOLDEN") == "write":
        golden.write_text(text)
    assert text == golden.read_text()
    assert json.loads(json.dumps(plan.to_json()))["pending"] is plan.pending


def test_the_spec_of_a_default_blade() -> None:
    """Everything libvirt's metadata holds; a change here makes every running blade unreadable."""
    spec = RUNNING["mb1"].spec
    assert spec is not None
    golden = GOLDEN / "mb1.spec.json"
    text = json.dumps(spec.to_json(), indent=2) + "\n"
    if os.environ.get("RACKLESS_GOLDEN") == "write":
        golden.write_text(text)
    assert text == golden.read_text()
    assert spec.digest() == BladeSpec.from_json(json.loads(text)).digest()


@pytest.mark.parametrize("data", [None, [], {}, "x", {"name": "mb0"}, {"memory": 5}])
def test_unreadable_specs(data: object) -> None:
    with pytest.raises(ValueError, match="not a blade's description"):
        BladeSpec.from_json(data)
    spec = RUNNING["mb0"].spec
    assert spec is not None
    with pytest.raises(ValueError, match="wings"):
        BladeSpec.from_json({**spec.to_json(), "wings": 2})


def test_addresses() -> None:
    usual, small = IPv4Network("10.77.0.0/24"), IPv4Network("10.77.0.0/28")
    assert str(blade_address(usual, 0)) == "10.77.0.10"
    assert str(blade_address(small, 0)) == "10.77.0.1"
    assert str(blade_address(small, 12)) == "10.77.0.13"
    assert str(host_address(small)) == "10.77.0.14"
    with pytest.raises(ValueError):
        blade_address(small, 13)


@given(st.text(), st.text(), st.sampled_from(["management", "fabric"]))
def test_macs_are_local_and_stay(rack: str, blade: str, network: str) -> None:
    mac = mac_address(rack, blade, network)
    first = int(mac[:2], 16)
    assert (first & 0x03, len(mac)) == (0x02, 17)
    assert first != 0xFE
    assert mac == mac_address(rack, blade, network)


def test_a_plan_says_what_is_lost() -> None:
    def lost(rack: Rack, kind: ActionKind = "recreate") -> tuple[str, ...]:
        plan = make_plan(rack, IMAGE, RUNNING)
        [action] = plan.of(kind)
        assert all(f"{what} is lost" in "".join(plan.render()) for what in action.loses)
        return action.loses

    assert lost(changed_blade("sb0", memory="512 MiB")) == ()
    assert lost(changed_blade("sb0", disk={"size": "4 GiB"})) == ("its disk",)
    assert lost(changed_blade("mb1", memory="1 GiB")) == ()
    assert lost(changed_blade("mb1", pmem="64 MiB")) == ("its persistent memory",)


@pytest.mark.long
@given(racks(), racks(), st.data())
def test_every_plan(before: Rack, after: Rack, data: st.DataObject) -> None:
    """From any state of one rack's blades to another rack: one plan is enough, and it explains itself."""
    observed = {
        name: Observed(
            name,
            data.draw(st.sampled_from(STATES)),
            data.draw(st.sampled_from([seen.spec, seen.spec, None])),
        )
        for name, seen in carried_out(make_plan(before, IMAGE, {})).items()
    }
    plan = make_plan(after, data.draw(st.sampled_from([IMAGE, "another"])), observed)
    specs = {action.blade: action.spec for action in plan.actions if action.spec is not None}
    there = {name for name, seen in observed.items() if seen.state != "absent"}

    assert sorted(action.blade for action in plan.actions) == sorted(there | set(after.blades))
    assert list(specs) == list(after.blades)
    assert {action.blade for action in plan.of("remove")} == there - set(after.blades)
    assert {action.blade for action in plan.of("create")} == set(after.blades) - there
    for attribute in ("index", "mgmt_address", "fabric_address", "mgmt_mac", "fabric_mac"):
        assert len({getattr(spec, attribute) for spec in specs.values()}) == len(specs)
    assert host_address(after.management.subnet) not in {spec.mgmt_address for spec in specs.values()}
    for action in plan.actions:
        assert bool(action.reasons) is (action.kind != "keep")
        if action.kind == "keep":
            assert action.old == action.spec == observed[action.blade].spec
            assert observed[action.blade].state == "running"
        if action.kind == "update":
            assert action.old is not None
            assert action.spec is not None
            assert action.old.index == action.spec.index
            assert all(change.live for change in changes(action.old, action.spec))

    image = next(iter(specs.values())).image
    again = make_plan(after, image, carried_out(plan))
    assert not again.pending
    assert {action.blade: action.spec for action in again.actions} == specs


@given(racks())
def test_specs_are_kept_exactly(rack: Rack) -> None:
    for index, name in enumerate(rack.blades):
        spec = make_spec(rack, name, index, IMAGE)
        assert BladeSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
        assert changes(spec, spec) == ()


@given(racks(most_blades=6), st.data())
def test_leaving_and_returning(rack: Rack, data: st.DataObject) -> None:
    """The others do not notice that a blade leaves, and it comes back to the lowest free place."""
    leaver = data.draw(st.sampled_from([name for name in rack.blades if name != "gm0"] or ["gm0"]))
    if leaver == "gm0":
        return
    up = carried_out(make_plan(rack, IMAGE, {}))
    without = make_plan(edited(rack, blades={leaver: None}, links={leaver: None}), IMAGE, up)
    assert [action.blade for action in without.of("remove")] == [leaver]
    assert len(without.of("keep")) == len(rack.blades) - 1
    back = make_plan(rack, IMAGE, carried_out(without))
    assert [action.blade for action in back.of("create")] == [leaver]
    assert carried_out(back) == up


def test_two_blades_that_claim_one_place() -> None:
    spec = RUNNING["mb0"].spec
    assert spec is not None
    twins = dict(RUNNING)
    twins["mb1"] = Observed("mb1", "running", BladeSpec.from_json({**spec.to_json(), "name": "mb1"}))
    plan = make_plan(DEFAULT, IMAGE, twins)
    assert [action.blade for action in plan.of("recreate")] == ["mb1"]
    assert len({action.spec.index for action in plan.actions if action.spec}) == 5


def test_capacity() -> None:
    check_capacity(DEFAULT, 2 * GIB, 1)
    with pytest.raises(RacklessError, match="memory larger than the host") as caught:
        check_capacity(DEFAULT, 2 * GIB - MIB, 2)
    assert "pb0 is the largest" in str(caught.value.hint)
    with pytest.raises(RacklessError, match=r"blades\.pb0\.cpus is 4, and the host has 2"):
        check_capacity(changed_blade("pb0", cpus=4), 64 * GIB, 2)


@pytest.mark.long
@given(racks(), racks(), st.data())
def test_a_plan_for_some_blades_touches_no_others(old: Rack, new: Rack, data: st.DataObject) -> None:
    there = carried_out(make_plan(old, IMAGE, {}))
    whole = make_plan(new, IMAGE, there)
    names = data.draw(st.sets(st.sampled_from([*{**old.blades, **new.blades}])))
    some = whole.only(names)
    assert {action.blade: action for action in some.actions if action.blade in names} == {
        action.blade: action for action in whole.actions if action.blade in names
    }
    for action in some.actions:
        if action.blade not in names:
            assert (action.kind, action.spec) == ("keep", there[action.blade].spec)
    assert {action.blade for action in some.actions} == {a.blade for a in whole.actions} & (names | set(there))
    assert whole.only({action.blade for action in whole.actions}) == whole
