"""Load edited agents into blades that run: for people who change guest_agents/ and want to see it in seconds."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from orchestrator import agents, journal, lock
from orchestrator.errors import RacklessError
from orchestrator.events import Emit, step
from orchestrator.hypervisor import daemon, domain
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


def push(paths: RackPaths, blades: Mapping[str, BladeSpec], emit: Emit) -> str:
    """Build the agents as they are in the tree now and restart them in ``blades``; returns their version.

    Programs that run on the blades lose the agents they talk to.
    RacklessError when an agent does not come back.
    """
    emit = journal.recording(paths, emit)
    with lock.hold(paths), _running(paths, blades) as running:
        of = next(iter(running.values())).metadata  # blades of a rack have one image
        built = build.build(of["recipe"], paths.settings.cache_dir / "images", emit, of["flavour"])
        archive = built.agents.with_name("agents.tar")
        together(dict(blades), lambda spec: _push_one(paths, spec, archive, built.key, emit))
        for name, owned in running.items():  # now it is as the tree says, and `plan` has nothing to do
            metadata = {**owned.metadata, "spec": replace(blades[name], image=built.key).to_json()}
            domain.explain(f"mark {name}", partial(domain.write_metadata, owned.domain, metadata))
    return built.key


@contextmanager
def _running(paths: RackPaths, blades: Collection[str]) -> Iterator[dict[str, domain.Owned]]:
    """What libvirt has of the blades. RacklessError when one is not there."""
    with daemon.connection(paths) as conn:
        there = domain.owned(conn, paths.name) if conn else {}
        if gone := sorted(set(blades) - set(there)):
            raise RacklessError(f"{gone[0]} has ended", hint="`rackless up` makes it anew")
        yield {name: there[name] for name in blades}


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
