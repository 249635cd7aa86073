"""The `rackless` command over stand-in blades: only what libvirt would say is given, by a file.

Run as `python -m tests.unit.stand_in_cli FACTS ARGUMENTS...`: streams, signals and exit codes are real.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import typer

from orchestrator import agent_logs, remote_run
from orchestrator.cli import checkpoint, programs, run, shell, vnode
from orchestrator.errors import RacklessError
from orchestrator.plan import Observed
from orchestrator.settings import Settings
from orchestrator.spec import BladeSpec
from orchestrator.ui import print_error


def main(facts_file: str, *arguments: str) -> int:
    """Run one command. Facts: {"specs": [SPEC...], "paused": [NAME...], "vnode": FOLDER, "logs": FOLDER}."""
    facts = json.loads(Path(facts_file).read_text())
    install_engine(facts)
    remote_run.Job = partial(remote_run.Job, directory=facts["vnode"])  # type: ignore[misc,assignment]
    agent_logs.agent_source = partial(agent_logs.agent_source, folder=facts["logs"])

    sys.argv = ["rackless", *arguments]
    app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)
    shell.register(app)
    run.register(app)
    checkpoint.register(app)
    programs.register(app)
    vnode.register(app)
    try:
        app(prog_name="rackless")
    except RacklessError as error:
        print_error(error)
        return error.exit_code
    return 0


def install_engine(facts: dict[str, Any]) -> None:
    """Have orchestrator.engine.observe say what the facts say, in place of libvirt."""
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


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
