"""The command `rackless`: all families of commands on one app, and the place where errors become lines."""

from __future__ import annotations

import copy
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from orchestrator import __version__
from orchestrator.cli import (
    agents,
    bench,
    blade,
    checkpoint,
    dashboard,
    debug,
    demo,
    doctor,
    events,
    fault,
    graph,
    hotpot,
    image,
    lite,
    on_host,
    pmem,
    programs,
    rack,
    run,
    shell,
    snapshot,
    top,
    vnode,
)
from orchestrator.errors import RacklessError

_INTERRUPTED = 130

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


_FAMILIES = (rack, blade, fault, run, programs, checkpoint, top, events, graph, dashboard, debug, vnode, shell, agents,
             lite, hotpot, pmem, snapshot, image, demo, bench, doctor, on_host)  # fmt: skip
for family in _FAMILIES:
    family.register(app)


def main() -> int:
    """Run the command line; a RacklessError becomes a line with its hint, Ctrl-C the code a shell expects."""
    try:
        _meant(sys.argv[1:2])()
    except RacklessError as error:
        from orchestrator.ui import print_error

        print_error(error)
        return error.exit_code
    except OSError as error:  # such as a full disk, or a folder that only root may write
        from orchestrator.ui import print_error

        print_error(RacklessError(f"{error.filename}: {error.strerror}" if error.filename else str(error)))
        return 1
    except Exception as error:  # a defect of ours: its traceback goes to a file, its user gets a line as always
        from orchestrator.ui import print_error

        print_error(RacklessError(f"internal error: {type(error).__name__}: {error}", log=_keep_traceback()))
        return 1
    except SystemExit as end:
        if not _was_interrupted(end):
            raise
        print("interrupted; `rackless up` goes on from here, `rackless down` cleans up", file=sys.stderr)
        # Threads that wait for blades would hold up an orderly end by minutes, and `up` survives worse than this.
        sys.stderr.flush()
        os._exit(_INTERRUPTED)
    return 0


def _meant(words: list[str]) -> typer.Typer:
    """The app with only the command that is meant: typer would read the options of all, for a tenth of a second."""
    commands = [info for info in app.registered_commands if [_name(info.name, info.callback)] == words]
    groups = [info for info in app.registered_groups if [info.name] == words]
    if not commands and not groups:
        return app
    one = copy.copy(app)
    one.registered_commands, one.registered_groups = commands, groups
    return one


def _name(given: str | None, function: Callable[..., Any] | None) -> str | None:
    return given or (function.__name__.replace("_", "-") if function else None)


def _keep_traceback() -> Path:
    """Write the traceback of the exception being handled to a file of its own; its path."""
    with tempfile.NamedTemporaryFile("w", prefix="rackless-error-", suffix=".log", delete=False) as file:
        file.write(f"{' '.join(sys.argv)}\n{traceback.format_exc()}")
    return Path(file.name)


def _was_interrupted(end: SystemExit) -> bool:
    """Typer makes an exit code of Ctrl-C, as a program in a blade may do: only the cause tells them apart."""
    return end.code == _INTERRUPTED and isinstance(getattr(end.__context__, "__cause__", None), KeyboardInterrupt)


if __name__ == "__main__":
    sys.exit(main())
