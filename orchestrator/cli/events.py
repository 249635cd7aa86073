"""`rackless events`: what happened to a rack, and what happens."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import typer

from orchestrator.cli.common import JsonOption, RackOption, rack_name


def register(app: typer.Typer) -> None:
    """Add the command to the main app."""
    app.command()(events)


def events(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new events as they come.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Events to begin with; 0: none.")] = 20,
    rack: RackOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print the events of a rack: up and down, changes, faults, blades that died, joined or left.

    --json prints one object per line.
    """
    from orchestrator import history
    from orchestrator.settings import RackPaths, Settings

    paths = RackPaths(Settings.from_environment(), rack_name(rack))
    try:
        for event in history.follow(paths, lines) if follow else history.recorded(paths)[-lines:] if lines else []:
            print(json.dumps(event) if as_json else line(event), flush=True)
    except KeyboardInterrupt:  # how it is meant to end
        raise typer.Exit from None


def line(event: dict[str, Any]) -> str:
    """One event for people: when, which blade, what."""
    from orchestrator.history import told

    clock = time.strftime("%H:%M:%S", time.localtime(event["time"]))
    return f"{clock}  {event.get('blade') or event.get('rack') or '':<8}  {told(event)}"
