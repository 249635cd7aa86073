"""`rackless ssh`, `exec` and `ssh-config`: commands on blades."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import asdict
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from orchestrator.cli import console, copy, logs
from orchestrator.cli.common import (
    BladeArgument,
    JsonOption,
    RackOption,
    complete_blade,
    complete_kind,
    current_rack,
)
from orchestrator.errors import RacklessError

_COMMAND = "rackless.command"


class _CommandAfterDashes(TyperCommand):
    """A command line whose words after `--` are a command for blades, apart from the arguments before."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[_COMMAND] = []
        if "--" in args:
            place = args.index("--")
            args, ctx.meta[_COMMAND] = args[:place], args[place + 1 :]
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "-- CMD..."]


def register(app: typer.Typer) -> None:
    """Add ssh, exec, cp, console, logs and ssh-config to the main app."""
    # As with ssh itself, options after the blade's name belong to the command.
    app.command("ssh", context_settings={"allow_interspersed_args": False})(ssh)
    app.command("exec", cls=_CommandAfterDashes)(execute)
    app.command("cp")(copy.cp)
    app.command("console")(console.console)
    app.command("logs")(logs.logs)
    app.command("ssh-config")(print_ssh_config)


def ssh(
    blade: BladeArgument,
    command: Annotated[list[str] | None, typer.Argument(metavar="CMD", help="Command; without one, a shell.")] = None,
    rack: RackOption = None,
) -> None:
    """Open a shell on a blade, or run a command there. The exit code is the command's."""
    from orchestrator.ssh.shared import open_shared_connection

    current = current_rack(rack)
    address = current.blade(blade).mgmt_address
    ssh_config = current.ssh_config()
    open_shared_connection(current.paths, ssh_config, blade, address)
    words = command[1:] if command and command[0] == "--" else command or []
    terminal = ["-t"] if os.isatty(0) and os.isatty(1) else []
    line = [shell_line(words)] if words else []
    os.execvp("ssh", ["ssh", "-F", str(ssh_config), *terminal, blade, *line])


def execute(
    ctx: typer.Context,
    patterns: Annotated[
        list[str] | None,
        typer.Argument(metavar="PATTERN", help="Blades, such as pb0 or 'mb*'.", autocompletion=complete_blade),
    ] = None,
    kind: Annotated[
        str | None, typer.Option("--kind", "-k", help="Blades of this kind.", autocompletion=complete_kind)
    ] = None,
    rack: RackOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a command on many blades at once, all of them by default. The exit code is the worst."""
    from orchestrator.cli.prefixed import PrefixedOutput
    from orchestrator.ssh.client import run_on_all, worst_exit_code

    words: list[str] = ctx.meta[_COMMAND]
    if not words:
        raise RacklessError("no command to run", hint="write it after --: rackless exec -k memory -- uptime")
    current = current_rack(rack)
    blades = {name: spec.mgmt_address for name, spec in current.select(patterns or [], kind).items()}
    output = PrefixedOutput(list(blades))
    on_output = None if as_json else output.write
    try:
        results = run_on_all(current.paths, blades, shell_line(words), on_output)
    finally:
        output.close()
    if as_json:
        typer.echo(json.dumps({"rack": current.name, "results": [asdict(result) for result in results]}))
    raise typer.Exit(worst_exit_code(results))


def print_ssh_config(rack: RackOption = None, as_json: JsonOption = False) -> None:
    """Print an ssh_config for the blades, with which ssh, scp, rsync, Fabric and Ansible work."""
    current = current_rack(rack)
    current.must_be_up()
    path = current.ssh_config()
    text = path.read_text(encoding="utf-8")
    if as_json:
        about = {"rack": current.name, "path": str(path), "blades": sorted(current.running())}
        typer.echo(json.dumps({**about, "text": text}))
    else:
        typer.echo(text, nl=False)


def shell_line(words: list[str]) -> str:
    """One word is a line for the blade's shell, as it is for ssh; several are a command and its arguments."""
    return words[0] if len(words) == 1 else shlex.join(words)
