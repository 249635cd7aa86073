"""`rackless bench`: run an experiment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.common import JsonOption


def register(app: typer.Typer) -> None:
    """Add the command to the main app."""
    app.command()(bench)


def bench(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Experiment in experiments/, such as `up`.")],
    quick: Annotated[bool, typer.Option("--quick", help="As few rounds as make sense.")] = False,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where raw samples go.")] = Path("out/bench"),
    as_json: JsonOption = False,
) -> None:
    """Run an experiment; the result on standard output, progress on standard error."""
    from orchestrator.bench import run
    from orchestrator.ui import progress, table

    with progress(name, as_json) as emit:
        result = run(name, quick, out, emit)
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    typer.echo(result["title"])
    variants = result["median"]
    quantities = list(dict.fromkeys(quantity for row in variants.values() for quantity in row))
    table(("median of", *variants), [(q, *(row.get(q, "") for row in variants.values())) for q in quantities])
    for variant, reasons in result["missing"].items():
        for quantity, reason in reasons.items():
            typer.echo(f"no {quantity} of {variant}: {reason}")
    for key in result["summary"]:
        typer.echo(f"{key}: {json.dumps(result[key])}")
