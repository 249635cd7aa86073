"""`rackless image`: build and check what blades boot from."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.common import JsonOption

if TYPE_CHECKING:
    from orchestrator.prune import Entry

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Recipe in images/.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the main app."""
    images = typer.Typer(help="Build and check blade images.", no_args_is_help=True)
    images.command()(build)
    images.command("list")(list_images)
    images.command()(prune)
    images.command()(clean)
    app.add_typer(images, name="image")


def build(
    name: NameArgument = "debian13",
    flavour: Annotated[str, typer.Option(metavar="NAME", help="Flavour of the recipe.")] = "blade",
    as_json: JsonOption = False,
) -> None:
    """Build an image, or say where it is when nothing changed since."""
    from orchestrator.image.build import build as build_image
    from orchestrator.settings import Settings
    from orchestrator.ui import progress

    with progress("image", as_json) as emit:
        image = build_image(name, Settings.from_environment().cache_dir / "images", emit, flavour)
    if as_json:
        # fmt: off
        answer = {"name": image.name, "flavour": image.flavour, "key": image.key, "system": str(image.system),
                  "agents": str(image.agents), "manifest": str(image.system.with_name("manifest.json"))}
        # fmt: on
        typer.echo(json.dumps(answer, indent=2))
    else:
        typer.echo(f"{image.name}/{image.flavour} {image.key}: {image.system.parent}")


def list_images(as_json: JsonOption = False) -> None:
    """List what the cache holds, reading every byte of it."""
    from orchestrator.image import cache
    from orchestrator.settings import Settings
    from orchestrator.ui import table
    from orchestrator.units import format_size

    folder = Settings.from_environment().cache_dir
    entries = sorted(p for kind in ("images", "templates") for p in (folder / kind).glob("[!.]*-*") if p.is_dir())
    rows = []
    for entry in entries:
        size = sum(file.stat().st_size for file in entry.iterdir())
        rows.append((entry.name, size, "good" if cache.verify(entry, thorough=True) else "corrupt"))
    if as_json:
        typer.echo(json.dumps([{"name": name, "bytes": size, "state": state} for name, size, state in rows], indent=2))
    else:
        table(
            ("entry", "size", "state"),
            [(name, format_size(size >> 20 << 20), state) for name, size, state in rows],
        )


def clean(
    templates: Annotated[bool, typer.Option("--templates", help="Only the saved blades, not the images.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove what the cache holds; the next `up` makes it again. Racks that run keep what they have open.

    What snapshots need stays.
    """
    from orchestrator import prune as pruning
    from orchestrator.settings import Settings

    found = pruning.everything(Settings.from_environment(), ("templates",) if templates else pruning.KINDS)
    _show_removed(pruning.remove(found), as_json)


def prune(as_json: JsonOption = False) -> None:
    """Remove from the cache what neither the recipes and agents as they are now, nor any blade or snapshot uses."""
    from orchestrator import prune as pruning
    from orchestrator.settings import Settings

    _show_removed(pruning.remove(pruning.stale(Settings.from_environment())), as_json)


def _show_removed(entries: list[Entry], as_json: bool) -> None:
    from orchestrator.units import format_size

    if as_json:
        answer = [{"name": entry.folder.name, "bytes": entry.size, "kept": entry.kept} for entry in entries]
        typer.echo(json.dumps(answer, indent=2))
        return
    for entry in entries:
        done = f"kept, {entry.kept}" if entry.kept else "removed"
        typer.echo(f"{done}: {entry.folder.name} ({format_size(entry.size >> 20 << 20)})")
    if not entries:
        typer.echo("nothing to remove")
