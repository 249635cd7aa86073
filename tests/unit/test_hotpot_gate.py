"""Hotpot as an agent offers it: started when it is needed, on all blades that must have it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from guest_agents import control
from guest_agents.hotpot.gate import Gate
from tests.unit import lite_pair
from tests.unit.hotpot_rack import Place, shells
from tests.unit.lite_blades import SECRET, Rack
from tests.unit.lite_stack import whole

pytestmark = pytest.mark.skipif(lite_pair.missing() is not None, reason=str(lite_pair.missing()))
Gates = dict[str, Gate]


@pytest.fixture
def rack(tmp_path: Path, lite_core: Path) -> Iterator[Rack]:
    with whole(tmp_path, lite_core, "gm0", "mb0", "mb1") as made:
        yield made


@pytest.fixture
def gates(rack: Rack, tmp_path: Path) -> Iterator[Gates]:
    made = {name: Gate(blade.tier, tmp_path / f"media-{name}", tmp_path / f"{name}.hotpot")
            for name, blade in rack.blades.items()}  # fmt: skip
    for name, gate in made.items():
        rack[name].server._handlers.update(gate.handlers())  # type: ignore[attr-defined]
        gate.start()
    yield made
    for gate in made.values():
        gate.close()


def started(gates: Gates) -> list[str]:
    return [name for name, gate in gates.items() if gate._service is not None]


def test_it_starts_where_it_is_needed(rack: Rack, gates: Gates, tmp_path: Path) -> None:
    address = (rack["mb0"].address, rack.port)
    assert started(gates) == []
    assert control.call(address, SECRET, "hotpot.stat") == {}
    with shells(Place(tmp_path / "mb0.hotpot")) as [shell]:
        assert shell.do("session.name") == "mb0"
        assert started(gates) == ["gm0", "mb0"]
        shell.do("d = session.create('set', 3 * 4096, chunk=4096)")
        assert started(gates) == ["gm0", "mb0", "mb1"]
        shell.do("d.memory[8192] = 7\nd.commit((8192, 1), replicas=3)")
        stat = control.call(address, SECRET, "hotpot.stat")
        assert (stat["node"], stat["datasets"]["set"]["committed"]) == ("mb0", 1)
        shell.do("d.close()")


def test_where_media_are_old_it_says_so_to_programs(gates: Gates, tmp_path: Path) -> None:
    """And other blades do without that one."""
    (tmp_path / "media-mb0").mkdir()
    (tmp_path / "media-mb0" / "home-1").write_bytes(b"precious")
    refused = Place(tmp_path / "mb0.hotpot").start("")
    _out, errors = refused.communicate(timeout=60)
    assert "OldMedia" in errors
    with shells(Place(tmp_path / "mb1.hotpot")) as [shell]:
        shell.do("d = session.create('set', 3 * 4096, chunk=4096)")
        assert shell.do("session.datasets()[0]['owners']") == [1, 3]
        shell.do("d.close()")
