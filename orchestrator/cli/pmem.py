"""`rackless pmem`: persistent memory of blades: what it is used as, making it durable, and whether it is honest."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from orchestrator.cli.blade import ForceOption
from orchestrator.cli.common import BladeArgument, BladesArgument, JsonOption, RackOption, current_rack, rack_name
from orchestrator.cli.fault import SeedOption, SurviveOption
from orchestrator.errors import RacklessError


def register(app: typer.Typer) -> None:
    """Add the commands to the main app."""
    family = typer.Typer(help="Persistent memory of blades.", no_args_is_help=True)
    for command in (stat, mode, persist, erase):
        family.command()(command)
    family.command("test")(self_test)
    app.add_typer(family, name="pmem")


def stat(blades: BladesArgument = None, rack: RackOption = None, as_json: JsonOption = False) -> None:
    """Show size, mode, device and use of each blade's persistent memory, and what Hotpot has its media on there."""
    from orchestrator.ui import table
    from orchestrator.units import format_size

    chosen = {name: spec for name, spec in current_rack(rack).select(blades or []).items() if spec.pmem}
    found = {name: _ask(rack, name, "pmem.stat") for name in chosen}
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    table(("blade", "size", "usable", "mode", "device", "in use", "hotpot"),
          [(name, *(format_size(has[key]) for key in ("size", "usable")),
            has["mode"], has["device"], "yes" if has["in_use"] else "no", has["hotpot"])
           for name, has in found.items()])  # fmt: skip


def mode(
    blade: BladeArgument,
    name: Annotated[str, typer.Argument(metavar="devdax|fsdax", help="Mapped by programs, or for a file system.")],
    force: ForceOption = False, rack: RackOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Use a blade's persistent memory in another way. It is kept over restarts, and so is what is stored."""
    done = _ask(rack, blade, "pmem.mode", mode=name, force=force)
    typer.echo(json.dumps(done) if as_json else f"{blade}: {done['mode']} at {done['device']}")


def persist(blade: BladeArgument, rack: RackOption = None, as_json: JsonOption = False) -> None:
    """Make all of a blade's persistent memory durable, for programs that cannot do it themselves."""
    done = _ask(rack, blade, "pmem.persist")
    typer.echo(json.dumps(done) if as_json else f"{blade}: {done['bytes']} bytes are durable now that were not")


def erase(
    blade: BladeArgument, sure: Annotated[bool, typer.Option("--yes", help="It is meant.")] = False,
    rack: RackOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Zero a blade's persistent memory, durably: what it holds is lost. Refused while it is in use."""
    if not sure:
        raise RacklessError(f"all that {blade} has in its persistent memory would be lost", hint="--yes does it")
    _ask(rack, blade, "pmem.erase")
    typer.echo(json.dumps({"blade": blade}) if as_json else f"{blade}: persistent memory erased")


def self_test(
    blade: BladeArgument, survive: SurviveOption = None, seed: SeedOption = None, force: ForceOption = False,
    rack: RackOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Cut a blade's power to see that it loses what was not persisted, and only that. Fails if it does not."""
    from orchestrator.powertest import power_test
    from orchestrator.settings import Settings
    from orchestrator.ui import progress
    from orchestrator.units import parse_percent

    try:
        share = parse_percent(survive or "0 %")
    except ValueError as error:
        raise RacklessError(f"--survive: {error}", hint='write for example "50 %"') from None
    name = rack_name(rack)
    with progress(name, as_json) as emit:
        verdict = power_test(Settings.from_environment(), name, blade, share, seed or 0, force, emit)
    typer.echo(json.dumps(verdict.to_json()) if as_json else str(verdict))
    if not verdict.honest:
        raise typer.Exit(1)


def _ask(rack: str | None, blade: str, op: str, **fields: Any) -> dict[str, Any]:
    from orchestrator import agents

    current = current_rack(rack)
    spec = current.blade(blade)
    # How slow blades answer is not known here, and changing a mode takes its time.
    seconds = current.paths.settings.scaled("tcg").control_seconds
    return agents.call(current.paths, blade, spec.mgmt_address, op, seconds, **fields)
