"""`rackless hotpot`: datasets of the rack's shared persistent memory, and what each blade has of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import typer

from orchestrator.cli.common import BladesArgument, JsonOption, RackOption, current_rack
from orchestrator.errors import RacklessError

_STATES = ("owned_chunks", "dirty", "committed", "redundant", "copies")
_COUNTS = ("commits", "retries", "aborts", "migrations", "copies_evicted")
_CACHE_COUNTS = ("faults", "fetches", "cow", "updates", "evicted")


def register(app: typer.Typer) -> None:
    """Add the commands to the main app."""
    family = typer.Typer(help="Hotpot: datasets shared by programs of many blades.", no_args_is_help=True)
    family.command()(stat)
    family.command(name="list")(list_datasets)
    app.add_typer(family, name="hotpot")


def stat(blades: BladesArgument = None, rack: RackOption = None, as_json: JsonOption = False) -> None:
    """Show pages by state, commits, fetches and log space of each blade. Blades where Hotpot was not used show "-"."""
    from orchestrator.ui import table

    names, found, failures = _ask(blades, rack)
    if as_json:
        typer.echo(json.dumps({**found, **{name: {"error": text} for name, text in failures.items()}}, indent=2))
    else:
        headers = ("blade", "dataset", "chunks", *_STATES[1:], *_CACHE_COUNTS, *_COUNTS, "log KiB")
        table(headers, [row for name in names for row in _rows(name, found.get(name))])
    for name, text in failures.items():
        typer.echo(f"{name}: {text}", err=True)


def list_datasets(rack: RackOption = None, as_json: JsonOption = False) -> None:
    """Show the datasets of the rack."""
    from orchestrator.ui import table

    _names, found, failures = _ask(None, rack)
    datasets = [dataset for stat in found.values() for dataset in stat.get("all_datasets", ())]
    by_number = {stat["node_id"]: name for name, stat in found.items() if stat}
    for dataset in datasets:
        for nodes in ("owners", "open"):
            dataset[nodes] = [by_number.get(number, str(number)) for number in dataset[nodes]]
    if as_json:
        typer.echo(json.dumps(datasets, indent=2))
    else:
        headers = ("dataset", "bytes", "mode", "chunk", "address", "owners", "open on")
        table(headers, [(d["name"], d["size"], d["mode"], d["chunk"], hex(d["address"]), " ".join(d["owners"]),
                         " ".join(d["open"])) for d in datasets])  # fmt: skip
    for name, text in failures.items():
        typer.echo(f"{name}: {text}", err=True)


def _ask(blades: list[str] | None, rack: str | None) -> tuple[list[str], dict[str, dict[str, Any]], dict[str, str]]:
    """Names of the blades, what they tell, and why others do not."""
    from orchestrator import agents
    from orchestrator.parallel import together

    current = current_rack(rack)
    chosen = current.select(blades or [])
    found: dict[str, dict[str, Any]] = {}
    failures: dict[str, str] = {}

    def ask(name: str) -> None:
        try:
            found[name] = agents.call(
                current.paths, name, chosen[name].mgmt_address, "hotpot.stat", current.paths.settings.status_seconds
            )
        except RacklessError as error:
            failures[name] = error.message

    together({name: name for name in chosen}, ask)
    return list(chosen), found, failures


def _rows(name: str, stat: Mapping[str, Any] | None) -> list[tuple[object, ...]]:
    """A row for each dataset, the counts of the blade in the first."""
    if not stat:
        return [(name, *[None] * (2 + len(_STATES) - 1 + len(_CACHE_COUNTS) + len(_COUNTS) + 1))]
    counts = [stat["counts"].get(count, 0) for count in _COUNTS] + [(stat["log_used"] + stat["intents_used"]) >> 10]
    rows: list[tuple[object, ...]] = []
    for dataset, has in sorted(stat["datasets"].items()) or [(None, {"counts": {}})]:
        pages = [has.get(state) for state in _STATES] + [has["counts"].get(count) for count in _CACHE_COUNTS]
        rows.append((name, dataset, *pages, *(counts if not rows else [None] * len(counts))))
    return rows
