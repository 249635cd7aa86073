"""`rackless lite`: what LITE holds and does on each blade."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from orchestrator.cli.common import BladesArgument, JsonOption, RackOption, current_rack
from orchestrator.errors import RacklessError

RATES = ("reads", "writes", "atomics", "calls", "bytes_read", "bytes_written")
"""Counters of the core that are shown per second."""


def register(app: typer.Typer) -> None:
    """Add the commands to the main app."""
    family = typer.Typer(help="LITE: named memory, messages and locks across the rack.", no_args_is_help=True)
    family.command()(stat)
    family.callback()(_family)
    app.add_typer(family, name="lite")


def _family() -> None:
    """Make `stat` a word of its own: a family with one command would be that command."""


def stat(
    blades: BladesArgument = None,
    rack: RackOption = None,
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, help="Time over which rates are measured.")] = 1.0,
    as_json: JsonOption = False,
) -> None:
    """Show LMRs, handles, queue pairs, memory and rates of each blade."""
    from orchestrator import agents
    from orchestrator.parallel import together
    from orchestrator.ui import table

    current = current_rack(rack)
    chosen = current.select(blades or [])
    patience = current.paths.settings.status_seconds
    samples: list[dict[str, dict[str, Any]]] = [{}, {}]
    failures: dict[str, str] = {}
    for turn, sample in enumerate(samples):
        if turn:
            time.sleep(seconds)

        def ask(name: str, sample: dict[str, dict[str, Any]] = sample) -> None:
            try:
                sample[name] = agents.call(
                    current.paths, name, chosen[name].mgmt_address, "lite.stat", patience
                )
            except RacklessError as error:
                failures[name] = error.message

        together({name: name for name in chosen if name not in failures}, ask)
    shown = {name: _with_rates(samples[0][name], samples[1][name]) for name in chosen if name not in failures}
    if as_json:
        typer.echo(json.dumps({**shown, **{name: {"error": text} for name, text in failures.items()}}, indent=2))
        return
    headers = ("blade", "node", "lmrs", "handles", "clients", "qps", "blocks", "MiB used", "MiB total",
               "reads/s", "writes/s", "atomics/s", "calls/s", "MiB/s in", "MiB/s out")  # fmt: skip
    table(headers, [_row(name, shown.get(name)) for name in chosen])
    for name, text in failures.items():
        typer.echo(f"{name}: {text}", err=True)


def _with_rates(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The later sample, with `rates`: counts per second between the two; None if the agent was restarted between."""
    seconds = now["monotonic"] - before["monotonic"]
    same = before["incarnation"] == now["incarnation"] and seconds > 0
    rates = {name: round((now["core"][name] - before["core"][name]) / seconds, 1) if same else None for name in RATES}
    return {**{key: value for key, value in now.items() if key != "monotonic"}, "rates": rates}


def _row(name: str, stat: Mapping[str, Any] | None) -> tuple[object, ...]:
    if stat is None:
        return (name, *[None] * 14)
    memory, rates = stat["memory"], stat["rates"]
    return (name, stat["node_id"], stat["lmrs"], stat["handles"], len(stat["clients"]), stat["core"]["queue_pairs"],
            memory["blocks"], _mib(memory["bytes_allocated"]), _mib(memory["bytes_total"]), rates["reads"],
            rates["writes"], rates["atomics"], rates["calls"], _mib(rates["bytes_read"]),
            _mib(rates["bytes_written"]))  # fmt: skip


def _mib(size: float | None) -> float | None:
    return None if size is None else round(size / (1 << 20), 1)
