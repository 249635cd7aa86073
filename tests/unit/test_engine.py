"""The engine's small decisions about blades that are there, without libvirt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator import blade, engine, pmem
from orchestrator.events import ignore
from orchestrator.faults.model import Faults
from orchestrator.hypervisor import domain
from orchestrator.hypervisor.domain import Owned
from orchestrator.hypervisor.hosts import Hosts
from orchestrator.settings import RackPaths, Settings
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
