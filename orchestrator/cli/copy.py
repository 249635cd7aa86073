"""`rackless cp`: files between this host and blades, by scp."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.common import CurrentRack, JsonOption, current_rack
from orchestrator.errors import RacklessError


@dataclass(frozen=True)
class Place:
    """A file on this host (blade is None) or on a blade, where a relative path starts at root's home."""

    path: str
    blade: str | None = None

    @classmethod
    def parse(cls, text: str) -> Place:
        """Read "PATH" or "BLADE:PATH"; as for scp, a colon after a slash is part of a local path."""
        match = re.fullmatch(r"([^/:]+):(.*)", text, re.DOTALL)
        return cls(match[2], match[1]) if match else cls(text)

    def for_scp(self) -> str:
        """Return it as an argument that scp cannot take for an option or for another machine's file."""
        if self.blade is not None:
            return f"{self.blade}:{self.path}"
        return self.path if self.path.startswith(("/", "./", "../")) else f"./{self.path}"


def cp(
    places: Annotated[
        list[str],
        typer.Argument(metavar="FILE", help="Sources, then destination; BLADE:PATH on a blade."),
    ],
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="Copy folders with what is in them.")] = False,
    rack: Annotated[str | None, typer.Option("--rack", metavar="FILE|NAME", help="Rack file or rack name.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Copy files to blades, from blades, or from blade to blade (through this host)."""
    from orchestrator.ssh.shared import open_shared_connection

    *sources, destination = [Place.parse(text) for text in places]
    if not sources:
        raise RacklessError("cp needs a source and a destination", hint="rackless cp FILE pb0:/tmp/")
    current = current_rack(rack)
    check(current, sources, destination, recursive)
    ssh_config = current.ssh_config()
    for blade in sorted({place.blade for place in [*sources, destination] if place.blade is not None}):
        open_shared_connection(current.paths, ssh_config, blade, current.blade(blade).mgmt_address)
    started = time.monotonic()
    scp(ssh_config, sources, destination, recursive, show_progress=not as_json)
    if as_json:
        seconds = round(time.monotonic() - started, 3)
        copied = {"sources": places[:-1], "destination": places[-1], "seconds": seconds}
        typer.echo(json.dumps({"rack": current.name, **copied}))


def check(current: CurrentRack, sources: list[Place], destination: Place, recursive: bool) -> None:
    """Raise RacklessError for what is known to be wrong before anything is copied."""
    for place in [*sources, destination]:
        if place.blade is None:
            continue
        if place.blade not in current.blades and Path(f"{place.blade}:{place.path}").exists():
            raise RacklessError(
                f"no blade {place.blade} in rack {current.name}",
                hint=f"for the file on this host write ./{place.blade}:{place.path}",
            )
        current.blade(place.blade)
    for source in sources:
        path = Path(source.path)
        if source.blade is not None:
            continue
        if not path.exists():
            raise RacklessError(f"there is no file {path} on this host", hint="a file on a blade is BLADE:PATH")
        if path.is_dir() and not recursive:
            raise RacklessError(f"{path} is a folder", hint="copy it with -r")
    if all(place.blade is None for place in [*sources, destination]):
        raise RacklessError("cp needs a blade on one side", hint=f"rackless cp {sources[0].path} pb0:/tmp/")


def scp(ssh_config: Path, sources: list[Place], destination: Place, recursive: bool, show_progress: bool) -> None:
    """Copy with the host's scp, with its progress on a terminal. Raises RacklessError with its complaint."""
    visible = show_progress and sys.stdout.isatty()
    options = [*(["-r"] if recursive else []), *([] if visible else ["-q"])]
    paths = [place.for_scp() for place in [*sources, destination]]
    done = subprocess.run(
        ["scp", "-3", "-F", ssh_config, *options, "--", *paths],
        stdin=subprocess.DEVNULL, stdout=None if visible else subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, errors="replace", check=False,
    )  # fmt: skip
    if done.returncode != 0:
        reasons = [line.removeprefix("scp: ") for line in done.stderr.splitlines() if line.strip()]
        raise RacklessError(f"not all was copied: {'; '.join(reasons) or f'scp ended with {done.returncode}'}")
