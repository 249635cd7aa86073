"""Load edited agents into blades that run: for people who change guest_agents/ and want to see it in seconds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from orchestrator import agents, journal, lock
from orchestrator.errors import RacklessError
from orchestrator.events import Emit, step
from orchestrator.hypervisor import domain, hosts
from orchestrator.image import build
from orchestrator.parallel import together
from orchestrator.settings import RackPaths
from orchestrator.spec import BladeSpec
from orchestrator.ssh import client

_REMOTE = "/run/rackless/agents.tar"
_RESTART = (
    f"tar -xf {_REMOTE} -C / --no-same-owner && rm {_REMOTE} && sv -w 30 restart /etc/rackless/services/agent"
)
_POLL_SECONDS = 0.2


def push(paths: RackPaths, blades: Mapping[str, BladeSpec], image: str, emit: Emit) -> str:
    """Build the agents as they are in the tree now and restart them in ``blades``; returns their version.

    Programs that run on the blades lose the agents they talk to.
    RacklessError when an agent does not come back.
    """
    emit = journal.recording(paths, emit)
    with lock.hold(paths):
        built = build.build(image, paths.settings.cache_dir / "images", emit)
        archive = built.agents.with_name("agents.tar")
        together(dict(blades), lambda spec: _push_one(paths, spec, archive, built.key, emit))
        with hosts.opened(paths) as machines:
            running = machines.owned()
            for name, spec in blades.items():  # now it is as the tree says, and `plan` has nothing to do
                if name not in running:
                    raise RacklessError(f"{name} ended meanwhile", hint="`rackless up` makes it anew")
                owned = running[name]
                metadata = {**owned.metadata, "spec": replace(spec, image=built.key).to_json()}
                domain.explain(f"mark {name}", partial(domain.write_metadata, owned.domain, metadata))
        return built.key


def _push_one(paths: RackPaths, spec: BladeSpec, archive: Path, version: str, emit: Emit) -> None:
    with (
        step(emit, paths.name, "push", spec.name),
        client.connect(paths, spec.name, spec.mgmt_address) as connection,
    ):
        connection.put(str(archive), _REMOTE)
        client.run(connection, _RESTART)
    with step(emit, paths.name, "restart", spec.name):
        deadline = time.monotonic() + paths.settings.ready_seconds
        while not _is_back(paths, spec, version):
            if time.monotonic() > deadline:
                raise RacklessError(
                    f"the agent of {spec.name} did not come back", hint=f"see `rackless logs {spec.name}`"
                )
            time.sleep(_POLL_SECONDS)


def _is_back(paths: RackPaths, spec: BladeSpec, version: str) -> bool:
    try:
        status = agents.call(
            paths, spec.name, spec.mgmt_address, "agent.status", paths.settings.status_seconds
        )
    except RacklessError:
        return False  # it is starting
    return bool(status["version"] == version and status["joined"])
