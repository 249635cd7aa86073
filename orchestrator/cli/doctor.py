"""`rackless doctor`: what this host can do."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from orchestrator.cli.common import JsonOption

if TYPE_CHECKING:
    from orchestrator.doctor import Check

STYLES = {"ok": "green", "info": "cyan", "warn": "yellow", "fail": "bold red"}


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command()(doctor)


def doctor(as_json: JsonOption = False) -> None:
    """Try out what this host can do, and say the fix for what it cannot. Exits 1 when no rack could run."""
    from rich.console import Console

    from orchestrator.doctor import checks, healthy
    from orchestrator.hypervisor.probe import accelerator
    from orchestrator.settings import Settings

    settings = Settings.from_environment()
    results = []
    with Console(stderr=True).status("trying out this host") as status:
        for check in checks(settings):
            results.append(check)
            status.update(f"trying out this host: {check.name} is {check.level}")
    good = healthy(results)
    if as_json:
        answer = {
            "ok": good,
            "accelerator": accelerator(settings).name,
            "checks": [asdict(c) for c in results],
        }
        typer.echo(json.dumps(answer, indent=2))
    else:
        show(results)
    if not good:
        raise typer.Exit(1)


def show(results: list[Check]) -> None:
    """A table on standard output, then one line that sums up."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(3):
        table.add_column()
    for check in results:
        detail = Text(check.detail)
        if check.fix:
            detail.append(f"\nfix: {check.fix}", style="bold")
        table.add_row(Text(check.level, style=STYLES[check.level]), check.name, detail)
    console = Console()
    console.print(table)
    failed = [check.name for check in results if check.level == "fail"]
    if failed:
        console.print(f"\nNo rack can run here before this is fixed: {', '.join(failed)}.", style="bold red")
    else:
        console.print("\nThis host can run racks.", style="bold green")
