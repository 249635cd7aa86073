"""The `rackless` command over stand-in blades: only what libvirt would say is given, by a file.

Run as `python -m tests.unit.stand_in_cli FACTS ARGUMENTS...`: streams, signals and exit codes are real.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import typer

from orchestrator import agent_logs, remote_run
from orchestrator.cli import run, shell
from orchestrator.errors import RacklessError
from orchestrator.plan import Observed
from orchestrator.settings import Settings
from orchestrator.spec import BladeSpec


def main(facts_file: str, *arguments: str) -> None:
    """Run one command. Facts: {"specs": [SPEC...], "paused": [NAME...], "vnode": FOLDER, "logs": FOLDER}."""
    facts = json.loads(Path(facts_file).read_text())
    specs = [BladeSpec.from_json(spec) for spec in facts["specs"]]

    def observe(settings: Settings, rack: str) -> dict[str, Observed]:
        return {
            spec.name: Observed(spec.name, "paused" if spec.name in facts["paused"] else "running", spec)
            for spec in specs
            if spec.rack == rack
        }

    engine = ModuleType("orchestrator.engine")
    engine.observe = observe  # type: ignore[attr-defined]
    sys.modules["orchestrator.engine"] = engine
    remote_run.Job = partial(remote_run.Job, directory=facts["vnode"])  # type: ignore[misc,assignment]
    agent_logs.agent_source = partial(agent_logs.agent_source, folder=facts["logs"])

    app = typer.Typer()
    shell.register(app)
    run.register(app)
    try:
        app(arguments)
    except RacklessError as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main(*sys.argv[1:])
