"""`rackless gdb | capture | support-bundle`: looking into a rack that does not do what it should."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.common import (
    BladeArgument,
    JsonOption,
    RackOption,
    complete_blade,
    current_rack,
    rack_file,
    rack_name,
)
from orchestrator.errors import RacklessError


def register(app: typer.Typer) -> None:
    """Add the commands to the main app."""
    app.command()(gdb)
    app.command()(capture)
    app.command("support-bundle")(support_bundle)


def gdb(
    blade: BladeArgument,
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[-- OPTION...]", help="What gdb gets besides.", show_default=False)
    ] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Only serve, for a gdb of your own, until Ctrl-C.")] = False,
    rack: RackOption = None,
) -> None:
    """Attach gdb to the kernel of a blade, by QEMU's gdbserver; it is off again when gdb ends.

    The blade stands still while gdb is attached: after `dead_after` seconds its manager takes it for dead.
    """
    from orchestrator.gdbstub import gdbserver

    current = current_rack(rack)
    current.blade(blade)
    program = shutil.which("gdb")
    if program is None and not serve:
        raise RacklessError("gdb is not installed on this host", hint="apt-get install gdb, or use --serve")
    with gdbserver(current.paths, blade) as socket:
        attach = f"target remote {socket}"
        if serve or program is None:
            typer.echo(f"gdb -ex '{attach}'\nCtrl-C ends it", err=True)
            _until_interrupted()
            return
        # Ctrl-C is for gdb, which then stops the blade and asks what to do.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            command = [program, "-q", "-ex", attach, *(words or [])]
            code = subprocess.run(command, check=False, preexec_fn=_interruptible).returncode
        finally:
            signal.signal(signal.SIGINT, before)
    raise typer.Exit(code)


def capture(
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="The pcap file; - is standard output, for a pipe.")
    ],
    blade: Annotated[
        str | None,
        typer.Option("--blade", "-b", metavar="BLADE", help="What this blade sends and gets; without: what all send.",
                     autocompletion=complete_blade),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option("--seconds", "-s", min=0.1, help="How long; without: until Ctrl-C.")
    ] = None,
    rack: RackOption = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Capture the packets of the fabric into a file for Wireshark, which shows them as RoCEv2."""
    from orchestrator.capture import capture as run

    current = current_rack(rack)
    current.must_be_up()
    if blade is not None:
        current.blade(blade)
    with ExitStack() as stack:
        file = sys.stdout.buffer if output == "-" else stack.enter_context(open(output, "wb"))
        try:
            done = run(current.paths, current.running(), blade, file, seconds)
        except BrokenPipeError:  # who read it has seen enough
            raise typer.Exit from None
    told = f"{done.packets} packets" + (f", and {done.dropped} more came too fast" if done.dropped else "")
    if as_json:
        typer.echo(json.dumps({"packets": done.packets, "dropped": done.dropped}), err=output == "-")
    else:
        typer.echo(told if output == "-" else f"{output}: {told}", err=True)


def support_bundle(
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="The archive.  [default: a name with the time]",
                     show_default=False),
    ] = None,
    rack: RackOption = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Pack versions, doctor's findings, the rack file, status, events, logs, consoles and counters into one archive.

    Keys and the rack's secret are left out.
    """
    from orchestrator.settings import Settings
    from orchestrator.support import bundle

    name = rack_name(rack)
    file = rack_file(rack) if rack is None or Path(rack).is_file() else None
    target = output or Path(f"rackless-{name}-{time.strftime('%Y%m%d-%H%M%S')}.tar.gz")
    files = bundle(Settings.from_environment(), name, file, target)
    if as_json:
        typer.echo(json.dumps({"rack": name, "file": str(target), "contents": files}))
    else:
        typer.echo(f"{target}: {len(files)} files, {target.stat().st_size >> 10} KiB")


def _interruptible() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _until_interrupted() -> None:
    try:
        signal.pause()
    except KeyboardInterrupt:
        return
