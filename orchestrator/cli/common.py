"""What the commands share: the --rack and --json options, the rack they mean, names of blades."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.errors import RacklessError
from orchestrator.settings import RackPaths, Settings

if TYPE_CHECKING:
    from orchestrator.plan import Observed
    from orchestrator.spec import BladeSpec

DEFAULT_RACK_FILE = Path("racks/default.yml")
KINDS = ("processor", "memory", "storage", "manager")


def complete_kind(incomplete: str) -> list[str]:
    """Kinds of blades that begin with what was typed."""
    return [kind for kind in KINDS if kind.startswith(incomplete)]


def complete_blade(ctx: typer.Context, incomplete: str) -> list[str]:
    """Blades of the rack that is up and begin with what was typed; none, silently, if that cannot be told."""
    try:
        blades = current_rack(ctx.params.get("rack")).blades
    except Exception:  # a shell that waits for completions can do nothing with an error
        return []
    return [name for name in blades if name.startswith(incomplete)]


RackOption = Annotated[
    str | None,
    typer.Option("--rack", "-r", metavar="FILE|NAME", help="Rack file or rack name.  [default: racks/default.yml]"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
BladeArgument = Annotated[str, typer.Argument(metavar="BLADE", help="Name of a blade.", autocompletion=complete_blade)]
BladesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[BLADE...]", help="Names or patterns; all without.", autocompletion=complete_blade),
]


@dataclass(frozen=True)
class CurrentRack:
    """A rack as it is on this host now."""

    name: str
    paths: RackPaths
    blades: Mapping[str, Observed]

    def blade(self, name: str) -> BladeSpec:
        """Return the description of a running blade. Raises RacklessError if there is none of this name."""
        self.must_be_up()
        if name not in self.blades:
            raise RacklessError(f"no blade {name} in rack {self.name}", hint=did_you_mean(name, self.blades))
        seen = self.blades[name]
        if seen.state != "running" or seen.spec is None:
            raise RacklessError(f"blade {name} is {seen.state}", hint="see `rackless status`; `rackless up` mends it")
        return seen.spec

    def must_be_up(self) -> None:
        """Raise RacklessError if the rack has no blades at all."""
        if not self.blades:
            raise RacklessError(f"rack {self.name} is not up", hint="bring it up with `rackless up`")

    def running(self) -> dict[str, BladeSpec]:
        """Return the descriptions of the blades that run, by name."""
        return {
            name: seen.spec for name, seen in self.blades.items() if seen.state == "running" and seen.spec is not None
        }

    def select(self, patterns: Iterable[str] = (), kind: str | None = None) -> dict[str, BladeSpec]:
        """Return the running blades of a kind whose names match a pattern (`mb*`), all without patterns.

        Raises RacklessError for a pattern that matches nothing, and when nothing is left.
        """
        self.must_be_up()
        patterns = list(patterns)
        for pattern in patterns:
            if pattern in self.blades or not any(fnmatchcase(name, pattern) for name in self.blades):
                self.blade(pattern)  # says what is wrong with it
        chosen = {
            name: spec
            for name, spec in self.running().items()
            if (not patterns or any(fnmatchcase(name, pattern) for pattern in patterns))
            and (kind is None or spec.kind == kind)
        }
        if not chosen:
            what = f"{kind} blade" if kind else "blade"
            raise RacklessError(f"no such {what} runs in rack {self.name}", hint="see `rackless status`")
        return chosen

    def ssh_config(self) -> Path:
        """Write the ssh_config for the blades that run and return its path."""
        from orchestrator.ssh.config import write_ssh_config

        return write_ssh_config(self.paths, {name: spec.mgmt_address for name, spec in self.running().items()})


def current_rack(rack: str | None) -> CurrentRack:
    """Return the rack that --rack means, with the blades libvirt has of it. A name needs no rack file."""
    from orchestrator.engine import observe

    settings = Settings.from_environment()
    name = rack_name(rack)
    return CurrentRack(name, RackPaths(settings, name), observe(settings, name))


def rack_name(rack: str | None) -> str:
    """Return the name of the rack that --rack means."""
    if rack is not None and not _is_file(rack):
        return _checked_name(rack)
    from orchestrator.rackfile import load

    return load(rack_file(rack)).name


def _checked_name(name: str) -> str:
    # It becomes part of paths that `down` removes: with "." for a name, those of all racks.
    from pydantic import TypeAdapter, ValidationError

    from orchestrator.fields import RackName

    try:
        return TypeAdapter(RackName).validate_python(name)
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise RacklessError(message, hint=f"or give a rack file, such as {DEFAULT_RACK_FILE}") from None


def rack_file(rack: str | None) -> Path:
    """Return the rack file that --rack means: racks/default.yml here, or the one Rackless brings."""
    if rack is not None:
        if not _is_file(rack):
            raise RacklessError(f"{rack} is not a rack file", hint=f"give its path, such as {DEFAULT_RACK_FILE}")
        return Path(rack)
    package = Path(__file__).parent.parent
    places = (DEFAULT_RACK_FILE, package.parent / DEFAULT_RACK_FILE, package / "data" / DEFAULT_RACK_FILE)
    return next((place for place in places if place.is_file()), DEFAULT_RACK_FILE)


def own_rack_file(rack: str | None) -> Path:
    """Return the rack file that --rack means, to be edited: not the one in an installed Rackless, nor a bare name."""
    if rack is not None and not _is_file(rack):
        raise RacklessError(f"{rack} is the name of a rack: its file is to be edited",
                            hint=f"give the file, as in --rack {DEFAULT_RACK_FILE}")  # fmt: skip
    path = rack_file(rack)
    if path.is_relative_to(Path(__file__).parent.parent / "data"):
        raise RacklessError("there is no rack file here to edit", hint=f"mkdir -p racks && cp {path} racks/")
    return path


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint for a name that does not exist."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"there are: {', '.join(names) or 'none'}"


def _is_file(rack: str) -> bool:
    return "/" in rack or rack.endswith((".yml", ".yaml"))
