"""`rackless status` when libvirt has blades that this version of Rackless does not understand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import libvirt
import pytest

from orchestrator import agents, blade, engine, status
from orchestrator.errors import RacklessError
from orchestrator.hypervisor import daemon, domain
from orchestrator.hypervisor.domain import Owned
from orchestrator.network import place
from orchestrator.settings import RackPaths, Settings
from tests.unit.stand_in import blade_specs

SPECS = blade_specs("t1", ("gm0", "mb0"))


class Refusing:
    """A libvirt object that refuses everything."""

    def __getattr__(self, _name: str) -> Any:
        def refuse(*_arguments: object) -> None:
            raise libvirt.libvirtError("no such domain")

        return refuse


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(tmp_path / "cache", tmp_path / "state", tmp_path / "run")


@pytest.fixture
def blades(monkeypatch: pytest.MonkeyPatch) -> dict[str, Owned]:
    """The domains of rack t1: what a test puts in. Their agents are well."""
    found: dict[str, Owned] = {}

    @contextmanager
    def connection(_paths: RackPaths, **_how: bool) -> Iterator[Any]:
        yield Refusing()

    monkeypatch.setattr(daemon, "connection", connection)
    monkeypatch.setattr(domain, "owned", lambda _conn, _rack: found)
    monkeypatch.setattr(agents, "call", lambda *_words, **_more: {"joined": True, "rdma": "ACTIVE"})
    return found


def owned(name: str, **metadata: Any) -> Owned:
    started_with = "<domain><memory unit='KiB'>262144</memory></domain>"
    return Owned(SimpleNamespace(XMLDesc=lambda *_: started_with), "running", {"rack": "t1", "blade": name, **metadata})


@pytest.mark.parametrize("spec", [None, {}, {"kind": "memory", "new": 1}, "text", {"mgmt_address": 7}])
def test_a_blade_of_another_version_is_broken(blades: dict[str, Owned], settings: Settings, spec: object) -> None:
    blades["gm0"] = owned("gm0", spec=SPECS["gm0"].to_json(), ready=True, accelerator="tcg")
    blades["mb0"] = owned("mb0", spec=spec, ready=True) if spec is not None else owned("mb0")
    state = status.status(settings, "t1")
    assert [(b["name"], b["state"]) for b in state["blades"]] == [("gm0", "ready"), ("mb0", "broken")]
    good, broken = state["blades"]
    assert broken.keys() == good.keys()
    assert broken["memory_bytes"] is None
    assert "not a blade's description" in broken["agents"]["error"]
    assert engine.observe(settings, "t1")["mb0"].spec is None  # so `up` makes it anew


def test_a_template_that_boots_is_no_blade(blades: dict[str, Owned], settings: Settings) -> None:
    blades["template-0123"] = owned("template-0123", ready=False)
    assert status.status(settings, "t1")["blades"] == []


def test_a_blade_that_ended_is_one_line(settings: Settings) -> None:
    paths = RackPaths(settings, "t1")
    shop = SimpleNamespace(paths=paths, emit=lambda _event: None, accelerator="tcg", faults={})
    with pytest.raises(RacklessError, match="cannot look at mb0: "):
        blade.update(shop, SPECS["mb0"], SPECS["mb0"], Refusing())  # type: ignore[arg-type]
    with pytest.raises(RacklessError, match="cannot list the blades of rack t1"):
        domain.owned(Refusing(), "t1")


def test_places_have_names_that_the_kernel_takes() -> None:
    for where in (place.OwnNamespace("a" * 15), place.HostNetwork("a" * 15, Path("/run/rackless"))):
        for network in (place.MANAGEMENT, place.FABRIC):
            assert len(where.bridge(network)) <= 15
            assert len(where.tap(network, 254)) <= 15


def test_faults_are_listed(blades: dict[str, Owned], settings: Settings) -> None:
    for name, state, faults in (("gm0", "off", {"cpu": "5 %"}), ("mb0", "running", {"latency": "20 ms", "side": 1})):
        metadata = owned(name, spec=SPECS[name].to_json(), ready=True, faults=faults).metadata
        blades[name] = Owned(SimpleNamespace(), state, metadata)
    told = {blade["name"]: (blade["state"], blade["faults"]) for blade in status.status(settings, "t1")["blades"]}
    assert told == {"gm0": ("off", ["killed", "cpu 5 %"]), "mb0": ("ready", ["side 1", "latency 20 ms"])}
