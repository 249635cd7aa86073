"""`rackless plan | up | down | status | gc | schema`: the rack as a whole."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from orchestrator.cli.common import JsonOption, rack_file, rack_name

PENDING = 2  # exit code of `plan` when something is to be done

RackArgument = Annotated[
    str | None,
    typer.Argument(metavar="[RACK.yml]", help="Rack file.  [default: racks/default.yml]", show_default=False),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the main app."""
    for command in (up, down, plan, status, gc, schema):
        app.command()(command)


def up(
    rack: RackArgument = None,
    cold: Annotated[bool, typer.Option("--cold", help="Boot every blade instead of restoring saved ones.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Bring a rack up, or change a running one into what its file says now."""
    from orchestrator import engine
    from orchestrator.rackfile import load
    from orchestrator.settings import Settings
    from orchestrator.ui import progress

    wanted = load(rack_file(rack))
    with progress(wanted.name, as_json) as emit:
        result = engine.up(Settings.from_environment(), wanted, emit, cold)
    if as_json:
        typer.echo(json.dumps(result.to_json()))
    elif result.changed:
        typer.echo(f"{wanted.name}: {len(result.changed)} blades changed in {result.seconds:.1f} s "
                   f"({result.restored} restored, {result.booted} booted)")  # fmt: skip
    else:
        typer.echo(f"{wanted.name}: nothing to do, {len(wanted.blades)} blades are as the file says")


def down(
    rack: RackArgument = None,
    keep_data: Annotated[bool, typer.Option("--keep-data", help="Keep disks, persistent memory and keys.")] = False,
    without: Annotated[
        list[str] | None, typer.Option(metavar="HOST", help="Do nothing on this other host: it is gone for good.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Remove a rack: its blades, its network, its files, and nothing else."""
    from orchestrator import engine
    from orchestrator.settings import Settings
    from orchestrator.ui import progress

    name = rack_name(rack)
    with progress(name, as_json) as emit:
        removed = engine.down(Settings.from_environment(), name, emit, keep_data, without or [])
    if as_json:
        typer.echo(json.dumps({"rack": name, "removed": removed}))
    else:
        typer.echo(f"{name}: {len(removed)} blades removed" if removed else f"{name}: nothing was up")


def plan(rack: RackArgument = None, as_json: JsonOption = False) -> None:
    """Show what `up` would do, with the reason for each blade. Exits 2 when there is something to do."""
    from orchestrator import engine
    from orchestrator.rackfile import load
    from orchestrator.settings import Settings

    made = engine.plan(Settings.from_environment(), load(rack_file(rack)))
    typer.echo(json.dumps(made.to_json(), indent=2) if as_json else "\n".join(made.render()))
    if made.pending:
        raise typer.Exit(PENDING)


def status(rack: RackArgument = None, as_json: JsonOption = False) -> None:
    """Show the blades of a rack and how they are."""
    from orchestrator.settings import Settings
    from orchestrator.status import status as read_status
    from orchestrator.ui import table

    state = read_status(Settings.from_environment(), rack_name(rack))
    if as_json:
        typer.echo(json.dumps(state, indent=2))
        return
    if not state["blades"]:
        typer.echo(f"rack {state['rack']} is not up; `rackless up` starts it")
        return
    spread = any("host" in b for b in state["blades"])
    table(
        ("blade", "kind", *(["host"] if spread else []), "state", "cpus", "memory", "management", "fabric", "rdma",
         "monitors", "faults"),
        [
            (b["name"], b["kind"], *([b["host"]] if spread else []), b["state"], b["cpus"], _size(b["memory_bytes"]),
             b["mgmt_address"], b["fabric_address"], b["agents"].get("rdma"),
             ", ".join(b["agents"].get("monitors", [])) or None, ", ".join(b["faults"]) or None)
            for b in state["blades"]
        ],
    )  # fmt: skip


def _size(size: int | None) -> str | None:
    from orchestrator.units import format_size

    return None if size is None else format_size(size)


def gc(
    remove: Annotated[bool, typer.Option("--remove", help="Remove what is listed.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List what crashed runs left behind and no rack uses; remove it when told to."""
    from orchestrator import leftovers
    from orchestrator.settings import Settings

    settings = Settings.from_environment()
    found = leftovers.find(settings)
    if remove:
        leftovers.remove(settings, found)
    if as_json:
        typer.echo(json.dumps([item.to_json() for item in found], indent=2))
        return
    for name, home in leftovers.left_alone(settings).items():
        typer.echo(f"left alone: rack {name}, which is part of one of {home}")
    for item in found:
        typer.echo(f"{'removed' if remove else 'left over'}: {item}")
    if not found:
        typer.echo("nothing is left over")
    elif not remove:
        typer.echo("`rackless gc --remove` removes these")


def schema() -> None:
    """Print the JSON Schema of rack files, for editors."""
    from orchestrator.rackfile import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))
