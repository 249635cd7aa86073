"""`rackless blade add | remove | resize | replace | link`: one blade of a rack, in its file and while it runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli.common import (
    BladeArgument,
    JsonOption,
    RackOption,
    complete_blade,
    complete_kind,
    own_rack_file,
    rack_name,
)

if TYPE_CHECKING:
    from orchestrator.topology import Change

DryOption = Annotated[bool, typer.Option("--dry-run", "-n", help="Check everything, say what would be, do nothing.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Even if what the blade holds is lost.")]
BladeNames = Annotated[
    list[str] | None, typer.Argument(metavar="BLADE...", help="Names of blades.", autocompletion=complete_blade)
]
Text = str | None

_NONE = "none"


def _option(flag: str, example: str, what: str) -> Any:
    return typer.Option(flag, metavar=example, help=what)


Memory = Annotated[Text, _option("--memory", "SIZE", 'Memory, such as "512 MiB".')]
Cpus = Annotated[int | None, _option("--cpus", "N", "Virtual CPUs.")]
Quota = Annotated[Text, _option("--cpu-quota", "SHARE", 'Share of each CPU, such as "50 %"; "none" lifts it.')]
Excache = Annotated[Text, _option("--excache", "SIZE", "Processor blades: local memory for pages of memory blades.")]
Pmem = Annotated[Text, _option("--pmem", "SIZE", 'Memory blades: persistent memory; "none" takes it away.')]
DiskSize = Annotated[Text, _option("--disk", "SIZE", "Storage blades: size of the disk.")]
DiskIops = Annotated[Text, _option("--disk-iops", "N", 'Most operations per second; "none" lifts it.')]
DiskRate = Annotated[Text, _option("--disk-bandwidth", "RATE", 'Such as "100 MiB/s"; "none" lifts it.')]


def register(app: typer.Typer) -> None:
    """Add the commands to the main app."""
    family = typer.Typer(help="Blades of a rack: add, remove, resize, replace them.", no_args_is_help=True)
    for command in (add, remove, resize, replace, restart, link):
        family.command()(command)
    app.add_typer(family, name="blade")


def add(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="manager, processor, memory or storage.",
                                        autocompletion=complete_kind)],
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Such as mb2; without, the next free.")] = None,
    memory: Memory = None,
    cpus: Cpus = None,
    cpu_quota: Quota = None,
    excache: Excache = None,
    pmem: Pmem = None,
    disk: DiskSize = None,
    disk_iops: DiskIops = None,
    disk_bandwidth: DiskRate = None,
    dry: DryOption = False,
    rack: RackOption = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Add a blade to the rack file, and to the rack if it is up. Programs that run go on.

    What is not said is as in the rack's first blade of that kind.
    """
    from orchestrator import topology

    fields = {key: value for key, value in _fields(memory, cpus, cpu_quota, excache, pmem, disk, disk_iops,
                                                   disk_bandwidth).items() if value is not None}  # fmt: skip
    _do(rack, as_json, lambda settings, file, emit: topology.add(settings, file, kind, name, fields, dry, emit))


def remove(
    name: BladeArgument, force: ForceOption = False, dry: DryOption = False, rack: RackOption = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Remove a blade from the rack file, and from the rack, when its memory and files have moved to other blades.

    Refused if memory, files or programs would be lost all the same.
    """
    from orchestrator import topology

    _do(rack, as_json, lambda settings, file, emit: topology.remove(settings, file, name, force, dry, emit))


def resize(
    name: BladeArgument,
    memory: Memory = None,
    cpus: Cpus = None,
    cpu_quota: Quota = None,
    excache: Excache = None,
    pmem: Pmem = None,
    disk: DiskSize = None,
    disk_iops: DiskIops = None,
    disk_bandwidth: DiskRate = None,
    force: ForceOption = False,
    dry: DryOption = False,
    rack: RackOption = None,
    as_json: JsonOption = False,
) -> None:
    """Change a blade: quota, ExCache, limits of a disk, and memory up to what it was started with, while it runs.

    All else makes it anew.
    """
    from orchestrator import topology

    fields = _fields(memory, cpus, cpu_quota, excache, pmem, disk, disk_iops, disk_bandwidth)
    _do(rack, as_json, lambda settings, file, emit: topology.resize(settings, file, name, fields, force, dry, emit))


def replace(
    name: BladeArgument,
    anew: Annotated[bool, typer.Option("--anew", help="Also if it is well.")] = False,
    force: ForceOption = False,
    dry: DryOption = False,
    rack: RackOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a blade anew that died, hangs, or is not as the rack file says. Its disk is kept."""
    from orchestrator import topology

    _do(rack, as_json,
        lambda settings, file, emit: topology.replace_blade(settings, file, name, anew, force, dry, emit))  # fmt: skip


def restart(
    blades: BladeNames = None,
    agents: Annotated[bool, typer.Option("--agents", help="Only their agents, not the whole blades.")] = False,
    older_than: Annotated[
        float, typer.Option(metavar="SECONDS", help="Only those whose agent has run longer than this.")
    ] = 0.0,
    force: ForceOption = False,
    dry: DryOption = False,
    rack: RackOption = None,
    as_json: JsonOption = False,
) -> None:
    """Restart blades one after the other, all without names. Goes on only as long as all blades are well."""
    from orchestrator import restart as restarts
    from orchestrator.settings import Settings
    from orchestrator.ui import progress

    name, settings = rack_name(rack), Settings.from_environment()
    what: restarts.What = "agents" if agents else "blades"
    with progress(name, as_json) as emit:
        done = restarts.rolling(settings, name, what, blades or (), older_than, force, dry, emit)
    if as_json:
        typer.echo(json.dumps({"rack": name, "restarted": done, "what": what}))
    else:
        typer.echo(f"{name}: {what} restarted: {', '.join(done)}" if done else "nothing to do")


def link(
    name: BladeArgument,
    latency: Annotated[Text, _option("--latency", "TIME", 'Added to every packet, such as "50 us".')] = None,
    jitter: Annotated[Text, _option("--jitter", "TIME", "How far the latency varies.")] = None,
    bandwidth: Annotated[Text, _option("--bandwidth", "RATE", 'Such as "1 Gbit/s".')] = None,
    loss: Annotated[Text, _option("--loss", "SHARE", 'Packets that are lost, such as "0.1 %".')] = None,
    dry: DryOption = False,
    rack: RackOption = None,
    as_json: JsonOption = False,
) -> None:
    """Change a blade's link in the rack file, and while it runs; "none" is the default again. (For a time: `fault`.)"""
    from orchestrator import topology

    given = {"latency": latency, "jitter": jitter, "bandwidth": bandwidth, "loss": loss}
    fields = {key: _meant(value) for key, value in given.items() if value is not None}
    _do(rack, as_json, lambda settings, file, emit: topology.set_link(settings, file, name, fields, dry, emit))


def _fields(memory: Text, cpus: int | None, cpu_quota: Text, excache: Text, pmem: Text, disk: Text, iops: Text,
            bandwidth: Text) -> dict[str, Any]:  # fmt: skip
    """What was given, as in a rack file; None is for "none"."""
    given = {"memory": memory, "cpus": cpus, "cpu_quota": cpu_quota, "excache": excache, "pmem": pmem}
    fields: dict[str, Any] = {key: _meant(value) for key, value in given.items() if value is not None}
    limits = {"size": disk, "iops": iops, "bandwidth": bandwidth}
    if wanted := {key: _meant(value) for key, value in limits.items() if value is not None}:
        fields["disk"] = wanted
    return fields


def _meant(value: str | int) -> str | int | None:
    if isinstance(value, str) and value.isdigit():
        return int(value)
    return None if value == _NONE else value


def _do(rack: str | None, as_json: bool, change: Any) -> None:
    from orchestrator.rackfile import load
    from orchestrator.settings import Settings
    from orchestrator.ui import progress

    file = own_rack_file(rack)
    with progress(load(file).name, as_json) as emit:
        done: Change = change(Settings.from_environment(), file, emit)
    typer.echo(json.dumps(done.to_json(), indent=2) if as_json else "\n".join(done.lines()))
