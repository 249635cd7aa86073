"""`rackless run`: an unmodified program on a processor blade, its memory and files on other blades."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.common import CurrentRack, RackOption, complete_blade, current_rack
from orchestrator.errors import RacklessError


class Policy(StrEnum):
    """Which line of a set leaves first."""

    FIFO = "fifo"
    LRU = "lru"
    RANDOM = "random"


class Tier(StrEnum):
    """Where a program's memory goes when it is more than its ExCache."""

    EXCACHE = "excache"
    SWAP = "swap"


def register(app: typer.Typer) -> None:
    """Add the command to the main app."""
    # As with ssh and env, options after the program's name are the program's.
    app.command("run", context_settings={"allow_interspersed_args": False})(run)


def run(
    command: Annotated[list[str], typer.Argument(metavar="CMD", help="Program and its arguments.")],
    on: Annotated[
        str | None,
        typer.Option("--on", metavar="BLADE", help="Processor blade to run on.  [default: the one with the fewest "
                     "programs]", autocompletion=complete_blade),
    ] = None,
    vnode: Annotated[str | None, typer.Option(metavar="NAME", help="vNode to run in: see `rackless vnode`.")] = None,
    cwd: Annotated[
        str | None, typer.Option(metavar="DIR", help="Directory on the blade to start in.  [default: /vnode]")
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Environment of the program; may be repeated.")
    ] = None,
    excache: Annotated[
        str | None, typer.Option(metavar="SIZE", help='Local memory of the program, such as "16 MiB".')
    ] = None,
    replicas: Annotated[
        int | None, typer.Option(min=1, max=2, metavar="N", help="Memory blades that keep each page: 1 or 2.")
    ] = None,
    ways: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Lines of each set of the ExCache.  [default: one set has all]"),
    ] = None,
    policy: Annotated[
        Policy | None, typer.Option(help="Which line of a set leaves first.  [default: fifo]", show_choices=True)
    ] = None,
    victim: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Lines of the victim cache.  [default: an eighth of the ExCache]"),
    ] = None,
    prefetch: Annotated[
        int | None, typer.Option(min=1, max=32, metavar="N", help="Most pages that a miss brings.  [default: 32]")
    ] = None,
    pool: Annotated[
        bool | None, typer.Option("--pool/--no-pool", help="Keep packed pages too.  [default: without --ways]")
    ] = None,
    tier: Annotated[
        Tier | None,
        typer.Option(help="Swap the program's memory as a whole.  [default: only if it is static]", show_choices=True),
    ] = None,
    stats: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the run's counters here, as JSON.")] = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write what its pagers did here, for ui.perfetto.dev.")
    ] = None,
    rack: RackOption = None,
) -> None:
    """Run an unmodified program on a processor blade.

    Its stdin, stdout, stderr and exit code are yours. It starts in /vnode, where the files of its vNode are;
    its memory beyond the ExCache is on the memory blades. With --replicas 2 each page is on two of them, and
    the death of one does not end the program. A static program has no ExCache, but swaps to the memory blades. How
    the ExCache is organised (--ways, --policy, --victim, --prefetch, --pool) is for comparisons: what it does by
    itself serves most programs best.
    """
    from orchestrator.managers import place
    from orchestrator.remote_run import Job, run_job
    from orchestrator.ssh.shared import open_shared_connection

    size = parse_excache(excache)
    check_environment(env or [])
    for option, path in (("--stats", stats), ("--trace", trace)):
        if path is not None:
            check_writable(path, option)
    if stats is not None and trace is not None and stats.resolve() == trace.resolve():
        raise RacklessError(f"--stats and --trace cannot both go to {stats}", hint="give each a file of its own")
    organisation = organise(ways, policy, victim, prefetch, pool)
    if tier is not None:
        organisation["tier"] = tier.value
    current = current_rack(rack)
    if on is not None:
        processor_address(current, on)
    if on is None or vnode is not None:
        current.must_be_up()
        on = place(current.paths, current.running(), vnode, on)
    address = processor_address(current, on)
    ssh_config = current.ssh_config()
    open_shared_connection(current.paths, ssh_config, on, address)
    ssh = ("ssh", "-F", str(ssh_config))
    job = Job(ssh, on, command, size, replicas, organisation, stats, trace, vnode=vnode, cwd=cwd, env=env or [])
    raise typer.Exit(run_job(job))


def organise(
    ways: int | None, policy: Policy | None, victim: int | None, prefetch: int | None, pool: bool | None
) -> dict[str, str | int]:
    """Return the options of `split run` for an organisation. Raises RacklessError if it contradicts itself."""
    if ways is not None and pool:
        raise RacklessError(
            "--pool and --ways exclude each other: sets have as many lines whatever packs", hint="leave one of them out"
        )
    given: dict[str, str | int | None] = {
        "ways": ways,
        "policy": None if policy is None else policy.value,
        "victim": victim,
        "prefetch": prefetch,
        "pool": None if pool is None else "on" if pool else "off",
    }
    return {name: value for name, value in given.items() if value is not None}


def parse_excache(text: str | None) -> int | None:
    """Return the bytes of --excache. Raises RacklessError if it is not a size."""
    from orchestrator.units import parse_size

    try:
        return None if text is None else parse_size(text)
    except ValueError as error:
        raise RacklessError(f"--excache: {error}") from error


def check_environment(settings: list[str]) -> None:
    """Raise RacklessError if one of --env is not NAME=VALUE."""
    for text in settings:
        if not text.partition("=")[0] or "=" not in text:
            raise RacklessError(f"--env: {text!r} is not NAME=VALUE", hint="write for example --env LC_ALL=C")


def check_writable(path: Path, option: str = "--stats") -> None:
    """Raise RacklessError if a file cannot be written at `path`: better before the run than after it."""
    folder = path.parent
    if path.is_dir():
        raise RacklessError(f"{option}: {path} is a folder", hint=f"write for example {path}/{option[2:]}.json")
    if not folder.is_dir():
        raise RacklessError(f"{option}: there is no folder {folder}", hint=f"mkdir -p {folder}")
    if not os.access(folder, os.W_OK):
        raise RacklessError(f"{option}: cannot write into {folder}")


def processor_address(current: CurrentRack, name: str) -> str:
    """Return the management address of a running processor blade. Raises RacklessError if it is not one."""
    blade = current.blade(name)
    if blade.kind != "processor":
        processors = sorted(spec.name for spec in current.running().values() if spec.kind == "processor")
        there = ", ".join(processors) or "this rack has none that is up"
        raise RacklessError(f"{name} is a {blade.kind} blade: it runs no programs", hint=f"processor blades: {there}")
    return blade.mgmt_address
