"""Everything that tells how a rack is, in one folder: status, faults, vNodes, programs, counters, logs, its file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator import agents, engine, managers
from orchestrator.agent_logs import LOG_FOLDER
from orchestrator.errors import RacklessError
from orchestrator.faults import inject
from orchestrator.parallel import together
from orchestrator.settings import RackPaths, Settings
from orchestrator.spec import BladeSpec
from orchestrator.ssh import client
from orchestrator.status import status

DONE = "status.json"
"""Written last: a folder that has it is complete."""

_STATS = {"memory": "memory.stats", "processor": "process.stats", "storage": "storage.stats"}


def collect(settings: Settings, rack: str, folder: Path) -> list[str]:
    """Write what is known of a rack into `folder`, made for it; the names of the files.

    What a blade does not tell any more has its error in its place. RacklessError when the rack is not up.
    """
    paths = RackPaths(settings, rack)
    observed = engine.observe(settings, rack)
    if not observed:
        raise RacklessError(f"rack {rack} is not up", hint="bring it up with `rackless up`")
    folder.mkdir(parents=True, exist_ok=True)
    running = {name: seen.spec for name, seen in observed.items() if seen.spec and seen.state == "running"}
    faults = {name: found.to_json() for name, found in inject.faults(settings, rack).items()}
    _write(folder / "faults.json", faults)
    _write(folder / "specs.json", {name: seen.spec.to_json() for name, seen in observed.items() if seen.spec})
    for name, op in (("vnodes", "vnode.list"), ("programs", "program.list")):
        _write(folder / f"{name}.json", _asked(lambda op=op: managers.ask(paths, running, op)))
    together(running, lambda spec: _write(folder / spec.name / "stats.json", _stats(paths, spec)))
    addresses = {name: spec.mgmt_address for name, spec in running.items()}
    for result in client.run_on_all(paths, addresses, f"cd {LOG_FOLDER} && tail -v -n +1 -- */current"):
        text = result.stdout if result.exit_code == 0 else result.stdout + result.stderr
        (folder / result.blade / "agents.log").write_text(text)
    for name in observed:
        (folder / name).mkdir(exist_ok=True)
        if paths.blade(name).console.exists():
            shutil.copyfile(paths.blade(name).console, folder / name / "console.log")
    _write(folder / DONE, status(settings, rack))
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def _stats(paths: RackPaths, spec: BladeSpec) -> dict[str, Any]:
    ops = [op for op in (_STATS.get(spec.kind), "lite.stat") if op]
    seconds = paths.settings.status_seconds
    return {op: _asked(lambda op=op: agents.call(paths, spec.name, spec.mgmt_address, op, seconds))
            for op in ops}  # fmt: skip


def _asked(ask: Any) -> Mapping[str, Any]:
    try:
        return dict(ask())
    except RacklessError as error:
        return {"error": error.message}


def _write(file: Path, data: object) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(data, indent=2) + "\n")
