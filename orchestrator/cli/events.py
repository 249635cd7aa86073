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
    clock = time.strftime("%H:%M:%S", time.localtime(event["time"]))
    return f"{clock}  {event.get('blade') or event.get('rack') or '':<8}  {told(event)}"


def told(event: dict[str, Any]) -> str:
    """What happened, in words; see orchestrator/events.py and history.py for the kinds."""
    kind = event["event"]
    if kind == "step":
        seconds = f" ({event['seconds']:.1f} s)" if event.get("seconds") is not None else ""
        return f"{event['phase']} {event['state']}{seconds}" + (f": {event['message']}" if event["message"] else "")
    if kind == "change":
        return f"to {event['action']}: {'; '.join(event['reasons'])}"
    if kind == "faults":
        return f"broken: {', '.join(event['faults'])}" if event["faults"] else "healed"
    if kind == "ended":
        return f"QEMU ended: {event['reason']}"
    if kind == "member":
        return f"{event['state']}: {event['why']}"
    return str(event.get("message", kind))
