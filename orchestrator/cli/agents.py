"""`rackless agents`: the agents in the blades, their health and version, and new ones for a rack that runs."""

from __future__ import annotations

import json

import typer

from orchestrator.cli.common import BladesArgument, JsonOption, RackOption, current_rack


def register(app: typer.Typer) -> None:
    """Add the commands to the main app."""
    family = typer.Typer(help="The agents in the blades.", no_args_is_help=True)
    family.command("list")(list_agents)
    family.command()(push)
    app.add_typer(family, name="agents")


def list_agents(rack: RackOption = None, as_json: JsonOption = False) -> None:
    """Show health and version of every agent."""
    from orchestrator.status import status as read_status
    from orchestrator.ui import table

    current = current_rack(rack)
    current.must_be_up()
    blades = read_status(current.paths.settings, current.name)["blades"]
    if as_json:
        typer.echo(json.dumps({blade["name"]: blade["agents"] for blade in blades}, indent=2))
        return
    rows = []
    for blade in blades:
        agent = blade["agents"]
        rows.append((blade["name"], blade["state"], agent.get("version"), agent.get("joined"), agent.get("rdma"),
                     agent.get("uptime_seconds"), ", ".join(agent.get("monitors", [])) or None))  # fmt: skip
    table(("blade", "state", "version", "joined", "rdma", "up s", "monitors"), rows)


def push(
    blades: BladesArgument = None,
    rack: RackOption = None,
    as_json: JsonOption = False,
) -> None:
    """Load the agents as they are in guest_agents/ now into running blades, and restart them."""
    from orchestrator.push import push as push_agents
    from orchestrator.ui import progress

    current = current_rack(rack)
    chosen = current.select(blades or [])
    with progress(current.name, as_json) as emit:
        version = push_agents(current.paths, chosen, emit)
    if as_json:
        typer.echo(json.dumps({"rack": current.name, "version": version, "blades": sorted(chosen)}))
    else:
        typer.echo(f"{current.name}: {len(chosen)} blades run agents {version}")
