"""`rackless top`: what the blades, programs and managers of a rack do now."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, NamedTuple

import typer

from orchestrator.cli.common import CurrentRack, JsonOption, RackOption, current_rack


class Table(NamedTuple):
    """One part of the view."""

    headers: Sequence[str]
    rows: Sequence[Sequence[object]]


def register(app: typer.Typer) -> None:
    """Add the command to the main app."""
    app.command()(top)


def top(
    once: Annotated[bool, typer.Option("--once", help="Show one look, and end.")] = False,
    seconds: Annotated[
        float, typer.Option("--seconds", "-s", min=0.1, help="Time between looks, over which rates are measured.")
    ] = 2.0,
    rack: RackOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show blades, programs, remote memory, files and managers, with rates, until Ctrl-C.

    On a terminal the view is drawn anew at each look; elsewhere each look is printed below the last one.
    --json prints one look.
    """
    current = current_rack(rack)
    current.must_be_up()
    looks = _looks(rack, current, seconds)
    try:
        if as_json:
            typer.echo(json.dumps(next(looks), indent=2))
        elif once:
            _print(next(looks))
        elif sys.stdout.isatty():
            _draw(looks)
        else:
            for number, look in enumerate(looks):
                if number:
                    typer.echo()
                _print(look)
                sys.stdout.flush()
    except KeyboardInterrupt:  # how it is meant to end
        raise typer.Exit from None
    finally:
        looks.close()


def _looks(rack: str | None, current: CurrentRack, seconds: float) -> Any:
    """What each look shows, for ever; blades may come and go."""
    from orchestrator.rates import view
    from orchestrator.sampler import Sampler

    with Sampler(current.paths) as sampler:
        before = sampler.sample(current.running())
        while True:
            time.sleep(seconds)
            current = current_rack(rack)
            now = sampler.sample(current.running())
            away = [{"name": name, "kind": seen.spec and seen.spec.kind, "error": seen.state}
                    for name, seen in current.blades.items() if name not in now]  # fmt: skip
            shown = view(before, now)
            shown["blades"] += away
            yield {"rack": current.name, "time": round(time.time(), 3), "seconds": seconds, **shown}
            before = now


def _print(look: dict[str, Any]) -> None:
    from orchestrator.ui import table

    typer.echo(_title(look))
    for part in tables(look):
        typer.echo()
        table(part.headers, part.rows)


def _draw(looks: Iterator[dict[str, Any]]) -> None:
    from rich.console import Group
    from rich.live import Live
    from rich.table import Table as Drawn
    from rich.text import Text

    def drawn(look: dict[str, Any]) -> Group:
        parts: list[Text | Drawn] = [Text(_title(look), style="bold")]
        for part in tables(look):
            grid = Drawn(box=None, padding=(0, 2, 0, 0), header_style="cyan")
            for number, header in enumerate(part.headers):
                right = all(not isinstance(row[number], str) for row in part.rows)
                grid.add_column(header, no_wrap=True, justify="right" if right else "left")
            for row in part.rows:
                grid.add_row(*(Text("-" if cell is None else str(cell)) for cell in row))
            parts += [Text(""), grid]
        return Group(*parts)

    with Live(Text("the first look takes a moment"), screen=True, auto_refresh=False) as live:
        live.refresh()
        for look in looks:
            live.update(drawn(look), refresh=True)


def tables(look: dict[str, Any]) -> list[Table]:
    """The parts of a look that have something to show."""
    parts = [_blades(look), _programs(look), _memory(look), _storage(look), _managers(look)]
    return [part for part in parts if part.rows]


def _title(look: dict[str, Any]) -> str:
    clock = time.strftime("%H:%M:%S", time.localtime(look["time"]))
    running = len(look["programs"])
    return f"{look['rack']}  {clock}  {running or 'no'} program{'s' if running != 1 else ''}, in {look['seconds']:g} s"


def _blades(look: dict[str, Any]) -> Table:
    rows = [(b["name"], b["kind"], b["error"] or "up", b.get("cpu_percent"), b.get("agent_cpu_percent"),
             _mib(b.get("memory_used")), _mib(b.get("memory_total"))) for b in look["blades"]]  # fmt: skip
    return Table(("blade", "kind", "state", "cpu %", "agent cpu %", "MiB used", "MiB total"), rows)


def _programs(look: dict[str, Any]) -> Table:
    rows = []
    for program in look["programs"]:
        rates, counted = program["rates"], program["counters"]
        rows.append((program["id"], _mib(program["excache"]), program["excache_pages"], _mib(program["bytes_held"]),
                     _mib(program["working_set_at_most"]), rates["faults"], rates["misses"], rates["flushes"],
                     rates["zero_fills"], _mib(rates["bytes_in"]), _mib(rates["bytes_out"]),
                     counted["hit_ratio_of_faults"], program["command"][:40]))  # fmt: skip
    return Table(("program", "ExCache MiB", "pages in it", "MiB held", "MiB used <=", "faults/s", "misses/s",
                  "flushes/s", "zero-fills/s", "MiB/s in", "MiB/s out", "hits of faults", "command"), rows)  # fmt: skip


def _memory(look: dict[str, Any]) -> Table:
    rows = []
    for blade in look["memory"]:
        rates = blade["rates"]
        rows.append((blade["name"], _mib(blade["bytes_allocated"]), _mib(blade["bytes_total"]), blade["regions"],
                     blade["connections"], blade["refused"], rates["misses"], rates["flushes"],
                     _mib(rates["bytes_in"]), _mib(rates["bytes_out"]), _mib(blade["buffers"]["bytes"]),
                     blade["buffer_rates"]["hits"], blade["buffer_rates"]["misses"]))  # fmt: skip
    return Table(("memory", "MiB lent", "MiB total", "regions", "programs", "refused", "misses/s", "flushes/s",
                  "MiB/s read", "MiB/s written", "MiB buffers", "file hits/s", "misses/s"), rows)  # fmt: skip


def _storage(look: dict[str, Any]) -> Table:
    rows = []
    for blade in look["storage"]:
        rates = blade["rates"]
        busiest = sorted(((rate, name) for name, rate in blade["request_rates"].items() if rate), reverse=True)[:3]
        rows.append((blade["name"], _mib(blade["bytes_free"]), _mib(blade["bytes_total"]), rates["requests"],
                     _mib(rates["bytes_out"]), _mib(rates["bytes_in"]),
                     ", ".join(f"{name} {rate:g}" for rate, name in busiest)))  # fmt: skip
    return Table(("storage", "MiB free", "MiB total", "ops/s", "MiB/s read", "MiB/s written", "most of them"), rows)


def _managers(look: dict[str, Any]) -> Table:
    stats = look["managers"]
    if stats is None:
        return Table((), [])
    rows: list[tuple[object, ...]] = []
    rows += [("process", blade, f"{known['programs']} running") for blade, known in stats["process"].items()]
    rows += [("memory", blade, f"{_mib(known['free'])} MiB free, {known['requests']} requests, "
              f"said so {known['age_seconds']:g} s ago") for blade, known in stats["memory"].items()]  # fmt: skip
    rows += [("storage", blade, f"{known['vnodes']} vNodes") for blade, known in stats["storage"].items()]
    return Table(("manager", "blade", "what it knows"), rows)


def _mib(size: float | None) -> float | None:
    return None if size is None else round(size / (1 << 20), 1)
