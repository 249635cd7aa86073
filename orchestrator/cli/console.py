"""`rackless console`: the serial console of a blade, live or as its log."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.common import BladeArgument, CurrentRack, RackOption, current_rack, did_you_mean
from orchestrator.errors import RacklessError
from orchestrator.settings import RackPaths

LEAVE = b"\x1d"
"""Ctrl-], as in telnet and virsh."""

_CHUNK_BYTES = 64 * 1024


def console(
    blade: BladeArgument,
    log: Annotated[bool, typer.Option("--log", help="Print what the console has shown so far.")] = False,
    rack: RackOption = None,
) -> None:
    """Attach to the serial console of a blade; leave it with Ctrl-]."""
    current = current_rack(rack)
    if log:
        typer.echo(read_console_log(current, blade), nl=False)
        return
    from orchestrator.blade_files import console_socket

    host = current.blade(blade).host
    if not (os.isatty(0) and os.isatty(1)):
        raise RacklessError("console needs a terminal", hint=f"use `rackless console --log {blade}`")
    with _attached(current.paths, host, console_socket(current.paths, blade), blade) as wire:
        print(f"console of {blade}; leave it with Ctrl-]", file=sys.stderr)
        with _raw(0):
            relay(wire, 0, 1)
    print(file=sys.stderr)


def read_console_log(current: CurrentRack, blade: str) -> str:
    """Return all that a blade's console has shown, also of one that has stopped."""
    path = current.paths.blade(blade).console
    seen = current.blades.get(blade)
    if seen and seen.spec and seen.spec.host:
        from orchestrator.hypervisor import hosts

        words = hosts.words(current.paths, seen.spec.host, ["cat", str(path)])
        return subprocess.run(words, stdout=subprocess.PIPE, check=False).stdout.decode(errors="replace")
    try:
        return path.read_bytes().decode(errors="replace")
    except FileNotFoundError:
        if blade in current.blades:
            raise RacklessError(f"{blade} has not written to its console", log=path) from None
        current.must_be_up()
        hint = did_you_mean(blade, current.blades)
        raise RacklessError(f"no blade {blade} in rack {current.name}", hint=hint) from None


def relay(wire: socket.socket, keyboard: int, screen: int) -> None:
    """Join a keyboard and a screen (file descriptors) to a console until Ctrl-] or the blade's end."""
    while True:
        ready, _, _ = select.select([wire.fileno(), keyboard], [], [])
        if wire.fileno() in ready:
            output = wire.recv(_CHUNK_BYTES)
            if not output:
                return
            _write_all(screen, output)
        if keyboard in ready:
            typed, leave, _ = os.read(keyboard, _CHUNK_BYTES).partition(LEAVE)
            wire.sendall(typed)
            if leave or not typed:
                return


@contextmanager
def _attached(paths: RackPaths, host: str | None, path: Path, blade: str) -> Iterator[socket.socket]:
    """The console's socket; of a blade on another host the end of a pair, whose other end is carried there."""
    if host is not None:
        from orchestrator.hypervisor import hosts

        ours, theirs = socket.socketpair()
        with ours, theirs:
            words = hosts.words(paths, host, ["nc", "-U", str(path)])
            carrier = subprocess.Popen(words, stdin=theirs.fileno(), stdout=theirs.fileno())
            theirs.close()
            try:
                yield ours
            finally:
                carrier.terminate()
                carrier.wait()
        return
    with socket.socket(socket.AF_UNIX) as wire:
        try:
            wire.connect(os.fspath(path))
        except OSError as error:
            raise RacklessError(
                f"cannot attach to the console of {blade}: {error.strerror}",
                hint="only one terminal at a time can be attached; see `rackless console --log`",
            ) from error
        yield wire


@contextmanager
def _raw(terminal: int) -> Iterator[None]:
    before = termios.tcgetattr(terminal)
    tty.setraw(terminal)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
