"""`rackless snapshot`: keep a running rack as it is now, go back to it, or have it twice."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from orchestrator.cli.common import JsonOption, RackOption, rack_name


def complete_snapshot(ctx: typer.Context, incomplete: str) -> list[str]:
    """Snapshots of the rack that begin with what was typed; none, silently, if that cannot be told."""
    from orchestrator import snapshot
    from orchestrator.settings import Settings

    try:
        found = snapshot.of_rack(Settings.from_environment(), rack_name(ctx.params.get("rack")))
    except Exception:  # a shell that waits for completions can do nothing with an error
        return []
    return [one.name for one in found if one.name.startswith(incomplete)]


NewName = Annotated[str, typer.Argument(metavar="NAME", help="Name of the new snapshot.")]
NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of the snapshot.", autocompletion=complete_snapshot)
]


def register(app: typer.Typer) -> None:
    """Add the commands to the main app."""
    family = typer.Typer(help="Snapshots of a whole running rack.", no_args_is_help=True)
    family.command("list")(list_snapshots)
    for command in (create, restore, clone, delete):
        family.command()(command)
    app.add_typer(family, name="snapshot")


def create(name: NewName, rack: RackOption = None, as_json: JsonOption = False) -> None:
    """Save all blades at one instant: memory, disks, persistent memory. They stand still meanwhile, and go on."""
    from orchestrator import freeze
    from orchestrator.settings import Settings
    from orchestrator.ui import progress
    from orchestrator.units import format_size

    which = rack_name(rack)
    with progress(which, as_json) as emit:
        made = freeze.create(Settings.from_environment(), which, name, emit)
    if as_json:
        typer.echo(json.dumps(made.to_json()))
    else:
        typer.echo(f"{which}: snapshot {name} of {len(made.snapshot.blades)} blades in {made.seconds:.1f} s, "
                   f"{format_size(made.snapshot.size >> 20 << 20)}; they stood still for {made.paused:.1f} s")


def list_snapshots(rack: RackOption = None, as_json: JsonOption = False) -> None:
    """Show the snapshots of a rack, the oldest first."""
    from datetime import datetime

    from orchestrator import snapshot
    from orchestrator.settings import Settings
    from orchestrator.ui import table
    from orchestrator.units import format_size

    which = rack_name(rack)
    found = [one.to_json() for one in snapshot.of_rack(Settings.from_environment(), which)]
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    if not found:
        typer.echo(f"{which}: no snapshots; `rackless snapshot create NAME` makes one")
        return
    table(("snapshot", "made", "size", "blades", "state"),
          [(one["name"], datetime.fromtimestamp(one["created"]).isoformat(" ", "seconds"),
            format_size(one["bytes"] >> 20 << 20), ", ".join(one["blades"]),
            "its image is gone" if one["missing"] else "good") for one in found])  # fmt: skip


def restore(name: NameArgument, rack: RackOption = None, as_json: JsonOption = False) -> None:
    """Make the rack what it was when the snapshot was made. What it is now is lost, disks included."""
    from orchestrator import thaw
    from orchestrator.settings import Settings
    from orchestrator.ui import progress

    which = rack_name(rack)
    with progress(which, as_json) as emit:
        made = thaw.restore(Settings.from_environment(), which, name, emit)
    typer.echo(json.dumps(made.to_json()) if as_json else
               f"{which}: {len(made.snapshot.blades)} blades are as they were in {name}, in {made.seconds:.1f} s")


def clone(
    name: NameArgument, other: Annotated[str, typer.Argument(metavar="RACK", help="Name of the new rack.")],
    rack: RackOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Make a second rack of a snapshot, beside the first: same blades and addresses, a network of its own."""
    from orchestrator import thaw
    from orchestrator.settings import Settings
    from orchestrator.ui import progress

    which, new = rack_name(rack), rack_name(other)
    with progress(new, as_json) as emit:
        made = thaw.clone(Settings.from_environment(), which, name, new, emit)
    typer.echo(json.dumps(made.to_json()) if as_json else
               f"{new}: {len(made.snapshot.blades)} blades as in {name} of {which}, in {made.seconds:.1f} s; "
               f"`rackless down {new}` removes it")  # fmt: skip


def delete(name: NameArgument, rack: RackOption = None, as_json: JsonOption = False) -> None:
    """Remove a snapshot. Racks that were made of it are left alone."""
    from orchestrator import snapshot
    from orchestrator.settings import Settings
    from orchestrator.units import format_size

    which = rack_name(rack)
    size = snapshot.delete(Settings.from_environment(), which, name)
    typer.echo(json.dumps({"rack": which, "snapshot": name, "bytes": size}) if as_json else
               f"{which}: snapshot {name} removed ({format_size(size >> 20 << 20)})")  # fmt: skip
