"""The engine's small decisions about blades that are there, without libvirt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator import blade, engine, pmem
from orchestrator.events import ignore
from orchestrator.faults import settle
from orchestrator.faults.model import Faults
from orchestrator.hypervisor import domain
from orchestrator.hypervisor.domain import Owned
from orchestrator.hypervisor.far import Far
from orchestrator.hypervisor.hosts import Hosts
from orchestrator.plan import Action, Plan
from orchestrator.settings import RackPaths, Settings
from orchestrator.ssh import keys
from tests.unit.stand_in import blade_specs

NOTHING: Any = None


@pytest.fixture
def paths(tmp_path: Path) -> RackPaths:
    return RackPaths(Settings(tmp_path / "cache", tmp_path / "state", tmp_path / "run"), "t")


@pytest.mark.parametrize("flavour", ["blade", "lab"])
def test_the_rack_as_it_is_has_the_flavour_that_it_was_made_with(paths: RackPaths, flavour: str) -> None:
    shop = blade.Workshop(paths, NOTHING, NOTHING, "kvm", "qemu", "10.77.0.1", {}, ignore, flavour=flavour)
    specs = blade_specs("t", ("gm0", "mb0"))
    owned = {name: Owned(NOTHING, "off", shop.metadata(spec, Faults(), ready=True)) for name, spec in specs.items()}
    assert engine.as_it_is(owned, "t").flavour == flavour


def test_the_rack_as_it_is_when_an_older_version_made_it(paths: RackPaths) -> None:
    owned = {name: Owned(NOTHING, "off", {"ready": True, "spec": spec.to_json()})
             for name, spec in blade_specs("t", ("gm0",)).items()}  # fmt: skip
    assert engine.as_it_is(owned, "t").flavour == "blade"


@pytest.mark.parametrize(("state", "kept"), [("running", True), ("paused", True), ("off", False), ("crashed", False)])
def test_what_a_blade_stored_is_kept_unless_it_was_killed(
    paths: RackPaths, monkeypatch: pytest.MonkeyPatch, state: str, kept: bool
) -> None:
    monkeypatch.setattr(domain, "destroy", lambda _domain: None)
    files = paths.blade("mb0")
    files.root.mkdir(parents=True)
    pmem.prepare(files, 16 << 20)
    with files.pmem_vol.open("r+b") as file:
        file.write(b"stored, not persisted")
    engine._end(Hosts(paths), {"mb0": Owned(NOTHING, state, {})})
    assert files.pmem.read_bytes().startswith(b"stored") == kept


@pytest.mark.parametrize("stays", [True, False])
def test_a_blade_that_moves_keeps_its_host_key_and_one_that_leaves_does_not(
    paths: RackPaths, monkeypatch: pytest.MonkeyPatch, stays: bool
) -> None:
    """Its key is in known_hosts by then: another one would not be believed."""

    class There:
        def ask(self, deed: str, fields: dict[str, Any]) -> None:
            told.append((deed, fields))

    def nothing(*_: object, **__: object) -> None:
        pass

    for place, name in ((blade, "create"), (engine, "_tell_hosts"), (engine, "_ping_all"), (domain, "destroy")):
        monkeypatch.setattr(place, name, nothing)
    monkeypatch.setattr(settle, "side", nothing)
    told: list[tuple[str, dict[str, Any]]] = []
    machines = Hosts(paths, None, {"far": Far("far", NOTHING, NOTHING, There())})  # type: ignore[arg-type]
    shop = blade.Workshop(paths, machines, NOTHING, "kvm", "qemu", "10.77.0.1", {}, ignore)
    spec = blade_specs("t", ("gm0", "mb0"))["mb0"]
    key = keys.ensure_host_key(paths, "mb0")
    action = Action("recreate" if stays else "remove", "mb0", spec if stays else None, replace(spec, host="far"), ())
    owned = Owned(NOTHING, "off", {}, host="far")
    engine._carry_out(shop, Plan("t", (action,)), True, {"mb0": owned})
    assert told == [("remove_files", {"name": "mb0"})]
    assert (keys.ensure_host_key(paths, "mb0") == key) == stays
