"""`rackless ps` and `kill`: the programs on processor blades."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import typer

from orchestrator.cli.common import JsonOption, RackOption, current_rack
from orchestrator.errors import RacklessError


def register(app: typer.Typer) -> None:
    """Add the commands to the main app."""
    app.command()(ps)
    app.command()(kill)


def ps(
    everything: Annotated[bool, typer.Option("--all", "-a", help="Also programs that have ended.")] = False,
    vnode: Annotated[str | None, typer.Option(metavar="NAME", help="Only programs of this vNode.")] = None,
    rack: RackOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the programs that run on the rack, and those that were lost with their blade."""
    from orchestrator import managers
    from orchestrator.ui import table

    current = current_rack(rack)
    current.must_be_up()
    if vnode is not None:
        managers.ask(current.paths, current.running(), "vnode.list", name=vnode)  # says it if there is none
    told = managers.ask(current.paths, current.running(), "program.list")["programs"]
    programs = [program for program in told if (everything or program["state"] != "exited")
                and (vnode is None or program["vnode"] == vnode)]  # fmt: skip
    if as_json:
        typer.echo(json.dumps(programs, indent=2))
        return
    table(("id", "vnode", "state", "code", "seconds", "command"), [_row(program) for program in programs])


def kill(
    program: Annotated[str, typer.Argument(metavar="ID", help="A program, as `rackless ps` names it: pb0.1234.")],
    name: Annotated[str, typer.Argument(metavar="[SIGNAL]", help="Such as TERM, KILL or 9.")] = "TERM",
    rack: RackOption = None,
) -> None:
    """Send a signal to a program."""
    from orchestrator import managers

    blade, _, pid = program.rpartition(".")
    if not blade or not pid.isdecimal():
        raise RacklessError(f"{program} is not the ID of a program", hint="see `rackless ps`; it looks like pb0.1234")
    current = current_rack(rack)
    managers.send_signal(current.paths, current.blade(blade), program, name)


def _row(program: dict[str, Any]) -> tuple[object, ...]:
    seconds = round((program["ended"] or time.time()) - program["started"], 1)
    return (program["id"], program["vnode"], program["state"], program["exit_code"], seconds, program["command"])
