"""`rackless checkpoint`, `restart` and `migrate`: a program goes on on another processor blade."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.common import CurrentRack, RackOption, complete_blade, current_rack
from orchestrator.cli.run import check_writable, processor_address
from orchestrator.errors import RacklessError

ProgramArgument = Annotated[str, typer.Argument(metavar="ID", help="A program, as `rackless ps` names it: pb0.1234.")]
OnOption = Annotated[
    str, typer.Option("--on", metavar="BLADE", help="Processor blade to go on on.", autocompletion=complete_blade)
]
StatsOption = Annotated[Path | None, typer.Option(metavar="FILE", help="Write its counters here, as JSON.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the main app."""
    app.command()(checkpoint)
    app.command()(restart)
    app.command()(migrate)


def checkpoint(
    program: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="A program, as `rackless ps` names it: pb0.1234.")
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="Show the checkpoints there are.")] = False,
    discard: Annotated[
        str | None, typer.Option(metavar="NAME", help="Forget a checkpoint, and its memory at the memory blades.")
    ] = None,
    rack: RackOption = None,
) -> None:
    """End a program so that it can go on elsewhere, and print the checkpoint's name.

    Its memory stays where it is, at the memory blades; the rest of it is kept on the storage blade.
    """
    if sum((program is not None, listed, discard is not None)) != 1:
        raise RacklessError("checkpoint takes one of: ID, --list, --discard NAME", hint="see `rackless ps` for IDs")
    current = current_rack(rack)
    current.must_be_up()
    if program is not None:
        typer.echo(_freeze(current, program))
        return
    words = ["--list"] if listed else ["--discard", str(discard)]
    typer.echo(_split(current, _any_processor(current), "checkpoint", *words), nl=False)


def restart(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A checkpoint: see `rackless checkpoint --list`.")],
    on: OnOption,
    stats: StatsOption = None,
    rack: RackOption = None,
) -> None:
    """Go on with a program where its checkpoint was made; stdin, stdout, stderr and exit code are yours now."""
    raise typer.Exit(_thaw(current_rack(rack), name, on, stats))


def migrate(program: ProgramArgument, on: OnOption, stats: StatsOption = None, rack: RackOption = None) -> None:
    """Move a program to another processor blade: `checkpoint` and `restart` in one."""
    current = current_rack(rack)
    current.must_be_up()
    processor_address(current, on)  # before the program is touched
    if stats is not None:
        check_writable(stats)
    name = _freeze(current, program)
    code = _thaw(current, name, on, stats)
    listed = _split(current, on, "checkpoint", "--list").splitlines()
    if any(line.startswith(f"{name} ") and not line.endswith("(being restarted)") for line in listed):
        raise RacklessError(f"{program} does not run any more, but nothing of it is lost",
                            hint=f"`rackless restart {name} --on BLADE` goes on with it")  # fmt: skip
    raise typer.Exit(code)


def _freeze(current: CurrentRack, program: str) -> str:
    """Checkpoint a program; the checkpoint's name."""
    blade, _, pid = program.rpartition(".")
    if not blade or not pid.isdecimal():
        raise RacklessError(f"{program} is not the ID of a program", hint="see `rackless ps`; it looks like pb0.1234")
    return _split(current, blade, "checkpoint", program).strip()


def _thaw(current: CurrentRack, name: str, on: str, stats: Path | None) -> int:
    from orchestrator.remote_run import Job, run_job

    if stats is not None:
        check_writable(stats)
    return run_job(Job(_ssh(current, on), on, [name], stats=stats, restart=True))


def _any_processor(current: CurrentRack) -> str:
    processors = sorted(spec.name for spec in current.running().values() if spec.kind == "processor")
    if not processors:
        raise RacklessError("no processor blade runs", hint="see `rackless status`; `rackless up` mends it")
    return processors[0]


def _split(current: CurrentRack, blade: str, *words: str) -> str:
    """What `split WORDS` prints on a processor blade. RacklessError with what it says against it."""
    done = subprocess.run([*_ssh(current, blade), "-T", blade, shlex.join(["split", *words])], capture_output=True,
                          text=True, check=False, stdin=subprocess.DEVNULL)  # fmt: skip
    if done.returncode:
        said = done.stderr.strip().removeprefix("rackless: ")
        raise RacklessError(said or f"{blade} does not answer", hint="see docs/programs.md, Checkpoints")
    return done.stdout


def _ssh(current: CurrentRack, blade: str) -> tuple[str, ...]:
    from orchestrator.ssh.shared import open_shared_connection

    address, ssh_config = processor_address(current, blade), current.ssh_config()
    open_shared_connection(current.paths, ssh_config, blade, address)
    return ("ssh", "-F", str(ssh_config))
