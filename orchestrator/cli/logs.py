"""`rackless logs`: what the agents, and the blades' consoles, have to say."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.common import CurrentRack, JsonOption, RackOption, complete_blade, current_rack

if TYPE_CHECKING:
    from orchestrator.agent_logs import Line, Source


def logs(
    blades: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="BLADE",
            help="Blades, such as pb0 or 'mb*'; all of them by default.",
            autocompletion=complete_blade,
        ),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new lines as they come.")] = False,
    agent: Annotated[str | None, typer.Option(metavar="NAME", help="Only this agent's log.")] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Lines to begin with, of each log.")] = 20,
    console: Annotated[bool, typer.Option("--console", help="The consoles as well.")] = False,
    rack: RackOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print the logs of the agents in the order of time; with -f, as they come.

    --json prints one object per line.
    """
    from orchestrator.agent_logs import by_time, read
    from orchestrator.cli.prefixed import PrefixedOutput

    current = current_rack(rack)
    sources = log_sources(current, blades or [], agent, lines, follow, console)
    names = sorted({source.blade for source in sources})
    output = PrefixedOutput(names)

    def show(line: Line) -> None:
        if as_json:
            typer.echo(json.dumps(asdict(line)))
        else:
            output.write(line.blade, "stdout", f"{line.agent}: {line.text}\n")

    collected: list[Line] = []

    def complain(blade: str, text: str) -> None:
        output.write(blade, "stderr", f"{text}\n")

    code = read(sources, show if follow else collected.append, complain)
    for line in by_time(collected):
        show(line)
    raise typer.Exit(code)


def log_sources(
    current: CurrentRack, patterns: list[str], agent: str | None, lines: int, follow: bool, console: bool
) -> list[Source]:
    """Return the logs to read from. Raises RacklessError if a blade that is named does not run."""
    from orchestrator.agent_logs import agent_source, console_source

    chosen = current.select(patterns)
    ssh = ("ssh", "-F", str(current.ssh_config()))
    sources = [agent_source(ssh, name, agent, lines, follow) for name in chosen]
    if console:
        from orchestrator.hypervisor.hosts import words

        for name, spec in chosen.items():
            source = console_source(name, current.paths.blade(name).console, lines, follow)
            sources.append(replace(source, command=words(current.paths, spec.host, source.command)))
    return sources
