"""`rackless graph`: a drawing of the rack and its links."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.common import RackOption, rack_name


def register(app: typer.Typer) -> None:
    """Add the command to the main app."""
    app.command()(graph)


def graph(
    mermaid: Annotated[bool, typer.Option("--mermaid", help="As Mermaid, for Markdown; without it as SVG.")] = False,
    svg: Annotated[bool, typer.Option("--svg", help="As SVG (the default).")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write it there; without it: print it.")
    ] = None,
    rack: RackOption = None,
) -> None:
    """Draw the rack that is up: its blades, and the links in colours that say how they are (up, shaped, lossy, cut)."""
    from orchestrator import wiring
    from orchestrator.errors import RacklessError
    from orchestrator.settings import Settings

    if svg and mermaid:
        raise RacklessError("--svg and --mermaid exclude each other")
    name = rack_name(rack)
    wires = wiring.look(Settings.from_environment(), name)
    text = wiring.mermaid(name, wires) if mermaid else wiring.svg(name, wires)
    if output is None:
        typer.echo(text, nl=False)
    else:
        output.write_text(text)
