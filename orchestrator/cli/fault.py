"""`rackless fault`, `heal` and `scenario`: break blades and links on purpose, and undo it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli.blade import BladeNames, DryOption
from orchestrator.cli.common import BladeArgument, JsonOption, RackOption, rack_name
from orchestrator.errors import RacklessError

if TYPE_CHECKING:
    from orchestrator.faults.inject import Outcome

Text = str | None
SurviveOption = Annotated[
    Text, typer.Option("--survive", metavar="SHARE", help='Persistent memory: what was stored and not persisted '
                       'survives with this probability, such as "50 %".  [default: 0 %]')
]  # fmt: skip
SeedOption = Annotated[
    int | None, typer.Option("--seed", metavar="NUMBER", min=0, help="For which of it does.  [default: 0]")
]


def register(app: typer.Typer) -> None:
    """Add the commands to the main app."""
    family = typer.Typer(help="Faults of blades and links, for as long as it takes to `heal` them.",
                         no_args_is_help=True)  # fmt: skip
    family.command("list")(list_faults)
    for command in (kill, pause, resume, reset, slow, pressure, link, disk, partition):
        family.command()(command)
    family.command("one-way")(one_way)
    family.command(context_settings={"ignore_unknown_options": True})(clock)
    app.add_typer(family, name="fault")
    app.command()(heal)
    app.command()(scenario)


def list_faults(rack: RackOption = None, as_json: JsonOption = False) -> None:
    """Show what is broken now. (`rackless status` shows it, too.)"""
    from orchestrator.faults import inject
    from orchestrator.settings import Settings

    name = rack_name(rack)
    faults = {blade: found for blade, found in inject.faults(Settings.from_environment(), name).items() if found}
    if as_json:
        typer.echo(json.dumps({"rack": name, "faults": {blade: found.to_json() for blade, found in faults.items()}}))
        return
    for blade, found in faults.items():
        typer.echo(f"{blade}: {', '.join(found.shown())}")
    if not faults:
        typer.echo(f"nothing of {name} is broken on purpose")


def kill(blades: BladeNames = None, survive: SurviveOption = None, seed: SeedOption = None, dry: DryOption = False,
         rack: RackOption = None, as_json: JsonOption = False) -> None:  # fmt: skip
    """Cut the power of blades. Disks, and what was persisted, are kept; `heal` starts them again."""
    _inject(rack, as_json, dry, blades, killed=True, **_how(survive, seed))


def pause(blades: BladeNames = None, dry: DryOption = False, rack: RackOption = None,
          as_json: JsonOption = False) -> None:  # fmt: skip
    """Stop the CPUs of blades, until `fault resume` or `heal`."""
    _inject(rack, as_json, dry, blades, paused=True)


def resume(blades: BladeNames = None, dry: DryOption = False, rack: RackOption = None,
           as_json: JsonOption = False) -> None:  # fmt: skip
    """Let blades that are paused go on."""
    _heal(rack, as_json, dry, _some(blades), ("paused",))


def reset(blade: BladeArgument, survive: SurviveOption = None, seed: SeedOption = None, rack: RackOption = None,
          as_json: JsonOption = False) -> None:  # fmt: skip
    """Cut a blade's power and start it again: disks, and what was persisted, are kept, memory is not."""
    from orchestrator.faults import inject

    how = _how(survive, seed)
    _show(rack, as_json, lambda settings, name, emit: inject.reset(settings, name, blade, emit, **how),
          f"{blade}: reset")  # fmt: skip


def slow(
    blade: BladeArgument,
    share: Annotated[str, typer.Argument(metavar="SHARE", help='What is left of each CPU, such as "10 %".')],
    dry: DryOption = False, rack: RackOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Leave a blade only a share of its CPUs."""
    _inject(rack, as_json, dry, [blade], cpu=share)


def pressure(
    blade: BladeArgument,
    size: Annotated[str, typer.Argument(metavar="SIZE", help='Memory that is taken, such as "64 MiB".')],
    dry: DryOption = False, rack: RackOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Take memory from a blade's system."""
    _inject(rack, as_json, dry, [blade], memory=size)


def link(
    blade: BladeArgument,
    down: Annotated[bool, typer.Option("--down", help="Pull the cable.")] = False,
    latency: Annotated[Text, typer.Option(metavar="TIME", help='Added to what it sends, such as "20 ms".')] = None,
    jitter: Annotated[Text, typer.Option(metavar="TIME", help="How far that varies.")] = None,
    loss: Annotated[Text, typer.Option(metavar="SHARE", help='Packets that are lost, such as "10 %".')] = None,
    corruption: Annotated[Text, typer.Option(metavar="SHARE", help="Packets with a wrong bit.")] = None,
    duplication: Annotated[Text, typer.Option(metavar="SHARE", help="Packets that are sent twice.")] = None,
    bandwidth: Annotated[Text, typer.Option(metavar="RATE", help='Most, each way, such as "10 Mbit/s".')] = None,
    dry: DryOption = False, rack: RackOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Make a blade's link to the fabric worse, or pull it. The management network is never touched."""
    given = {"latency": latency, "jitter": jitter, "loss": loss, "corruption": corruption,
             "duplication": duplication, "bandwidth": bandwidth}  # fmt: skip
    wanted: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if down:
        wanted["down"] = True
    if not wanted:
        raise RacklessError("no fault is named", hint="give --down, --latency, --loss or another; see --help")
    _inject(rack, as_json, dry, [blade], **wanted)


def disk(
    blade: BladeArgument,
    latency: Annotated[Text, typer.Option(metavar="TIME", help='Added to each operation, such as "50 ms".')] = None,
    errors: Annotated[Text, typer.Option(metavar="WHAT", help='What fails: "reads", "writes" or "all".')] = None,
    full: Annotated[bool, typer.Option("--full", help="Take all room that is free.")] = False,
    dry: DryOption = False, rack: RackOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Make the data disk of a storage blade slow, full or fail. Healed of errors, the blade is power-cycled."""
    wanted: dict[str, Any] = {"disk_latency": latency, "disk_errors": errors, "disk_full": full or None}
    wanted = {key: value for key, value in wanted.items() if value is not None}
    if not wanted:
        raise RacklessError("no fault is named", hint="give --latency, --errors or --full")
    _inject(rack, as_json, dry, [blade], **wanted)


def clock(
    blade: BladeArgument,
    offset: Annotated[str, typer.Argument(metavar="OFFSET", help='Ahead or back, such as "+1 h" or "-30 s".')],
    dry: DryOption = False, rack: RackOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Set the wall clock of a blade off, at once; `heal` sets it back by as much."""
    _inject(rack, as_json, dry, [blade], clock=offset)


def one_way(
    source: Annotated[str, typer.Argument(metavar="FROM", help="Blade whose packets are dropped.")],
    target: Annotated[str, typer.Argument(metavar="TO", help="Blade that does not get them.")],
    dry: DryOption = False, rack: RackOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Drop what one blade sends to another on the fabric; the way back is left alone."""
    from orchestrator.faults import inject

    deafer = inject.deafening(source, target)
    _show(rack, as_json, lambda settings, name, emit: inject.change(settings, name, deafer, dry, emit))


def partition(
    groups: Annotated[list[str], typer.Argument(metavar="GROUP...", help="Groups of blades: gm0,pb0 mb0,mb1")],
    dry: DryOption = False, rack: RackOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Part the fabric: only blades of one group hear each other. Blades in none are with the manager."""
    from orchestrator.faults import inject

    wanted = [[name.strip() for name in group.split(",") if name.strip()] for group in groups]
    _show(rack, as_json, lambda settings, name, emit: inject.partition(settings, name, wanted, dry, emit))


def heal(
    blades: BladeNames = None,
    everything: Annotated[bool, typer.Option("--all", help="All blades.")] = False,
    only: Annotated[list[str] | None, typer.Option(metavar="FAULT", help="Only these faults; may be repeated.")] = None,
    dry: DryOption = False, rack: RackOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Undo faults: of the named blades, or with --all of the whole rack. Killed blades are started again."""
    if bool(blades) == everything:
        raise RacklessError("heal what?", hint="name blades, or give --all")
    _heal(rack, as_json, dry, blades or [], tuple(only or ()))


def scenario(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Scenario: see docs/operate.md.")],
    seed: Annotated[int | None, typer.Option(metavar="N", help="In place of the file's.")] = None,
    dry: DryOption = False, rack: RackOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Break and heal blades as a file says when. What it breaks and does not heal stays broken."""
    from orchestrator.faults import scenario as scenarios
    from orchestrator.settings import Settings
    from orchestrator.ui import progress

    script = scenarios.load(file, seed)
    name, settings = rack_name(rack), Settings.from_environment()
    acts = scenarios.rehearse(settings, name, script)
    done: list[dict[str, Any]] = []
    if not dry:
        with progress(name, as_json) as emit:
            done = scenarios.play(settings, name, acts, emit)
    if as_json:
        steps = done or [act.to_json() for act in acts]
        typer.echo(json.dumps({"rack": name, "seed": script.seed, "played": not dry, "steps": steps}))
    elif dry:
        typer.echo("\n".join(map(str, acts)))
    else:
        typer.echo(f"{name}: {len(done)} steps done, seed {script.seed}")


def _some(blades: list[str] | None) -> list[str]:
    if not blades:
        raise RacklessError("no blade is named", hint="write for example mb0")
    return blades


def _how(survive: Text, seed: int | None) -> dict[str, Any]:
    """How the power fails, as far as it was said."""
    return {key: value for key, value in (("survive", survive), ("seed", seed)) if value is not None}


def _inject(rack: str | None, as_json: bool, dry: bool, blades: list[str] | None, **faults: Any) -> None:
    from orchestrator.faults import inject

    wanted = dict.fromkeys(_some(blades), faults)
    _show(rack, as_json, lambda settings, name, emit: inject.inject(settings, name, wanted, dry, emit))


def _heal(rack: str | None, as_json: bool, dry: bool, blades: list[str], names: tuple[str, ...]) -> None:
    from orchestrator.faults import inject

    _show(rack, as_json, lambda settings, name, emit: inject.heal(settings, name, blades, names, dry, emit))


def _show(rack: str | None, as_json: bool, change: Any, instead: str | None = None) -> None:
    from orchestrator.settings import Settings
    from orchestrator.ui import progress

    name = rack_name(rack)
    with progress(name, as_json) as emit:
        done: Outcome = change(Settings.from_environment(), name, emit)
    if as_json:
        typer.echo(json.dumps(done.to_json()))
    else:
        typer.echo(instead or "\n".join(done.lines()) or "nothing to do")
