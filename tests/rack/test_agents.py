"""Agents are supervised, report their health, and can be exchanged in a rack that runs."""

from __future__ import annotations

import json
import time

import pytest

from tests.rack.conftest import Rack

pytestmark = pytest.mark.rack


def _agent(rack: Rack, blade: str) -> dict[str, object]:
    return dict(rack.bench.status(rack.name)[blade]["agents"])


def _wait_ready(rack: Rack, blade: str, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while rack.bench.status(rack.name)[blade]["state"] != "ready":
        assert time.monotonic() < deadline, f"{blade} did not come back"
        time.sleep(0.5)


def test_a_killed_agent_is_started_again_and_keeps_its_node_id(rack: Rack) -> None:
    before = _agent(rack, "mb1")
    rack.kill_agent("mb1")
    _wait_ready(rack, "mb1")
    after = _agent(rack, "mb1")
    assert after["node_id"] == before["node_id"]
    assert float(str(after["uptime_seconds"])) < float(str(before["uptime_seconds"]))
    assert "restart 1 in 1 s" in rack("logs", "mb1").stdout


def test_a_restarted_process_monitor_serves_files_again(rack: Rack) -> None:
    rack.on("sb0", "echo here > /srv/vnode/there.txt")
    rack.kill_agent("pb0")
    _wait_ready(rack, "pb0")
    assert rack.on("pb0", "cat /vnode/there.txt; rm /vnode/there.txt") == "here\n"


def test_a_restarted_manager_gets_its_members_back(rack: Rack) -> None:
    rack.kill_agent("gm0")
    for blade in ("gm0", "pb0", "mb0", "mb1", "sb0"):
        _wait_ready(rack, blade)
    assert len({blade["agents"]["node_id"] for blade in rack.bench.status(rack.name).values()}) == 5


def test_push_restarts_the_agents_of_some_blades(rack: Rack) -> None:
    before = _agent(rack, "mb0")
    other = _agent(rack, "mb1")
    pushed = json.loads(rack.bench.rackless("agents", "push", "--rack", rack.name, "mb0", "--json").stdout)
    after = _agent(rack, "mb0")
    assert after["version"] == pushed["version"] == before["version"]
    assert float(str(after["uptime_seconds"])) < float(str(before["uptime_seconds"])) + 5
    assert float(str(_agent(rack, "mb1")["uptime_seconds"])) > float(str(other["uptime_seconds"]))


def test_strangers_get_nowhere(rack: Rack) -> None:
    """A client on the rack's network that does not know the secret is refused."""
    from guest_agents import control
    from orchestrator.network import namespace

    address = rack.bench.status(rack.name)["mb0"]["mgmt_address"]

    def connect(where: tuple[str, int], seconds: float) -> object:
        return namespace.connect(rack.name, where[0], where[1], seconds)

    with pytest.raises(control.ControlError, match="secret"):
        control.ControlClient((address, control.PORT), b"guess", 30, connect)  # type: ignore[arg-type]
