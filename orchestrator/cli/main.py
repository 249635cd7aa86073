"""The command `rackless`: all families of commands on one app, and the place where errors become lines."""

from __future__ import annotations

import sys

import typer

from orchestrator import __version__
from orchestrator.cli import agents, demo, doctor, image, rack, run, shell
from orchestrator.errors import RacklessError

app = typer.Typer(
    name="rackless",
    help="A disaggregated rack without the rack: blades as virtual machines on a Soft-RoCE fabric.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def about(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        typer.echo(f"rackless {__version__}")
        raise typer.Exit


for family in (rack, run, shell, agents, image, demo, doctor):
    family.register(app)


def main() -> int:
    """Run the command line; a RacklessError becomes a line with its hint, Ctrl-C the code a shell expects."""
    try:
        app()
    except RacklessError as error:
        from orchestrator.ui import print_error

        print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; `rackless up` goes on from here, `rackless down` cleans up", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
