"""`rackless vnode`: virtual servers that span blades."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from orchestrator.cli.common import JsonOption, RackOption, current_rack
from orchestrator.errors import RacklessError

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Name of a vNode.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the main app."""
    family = typer.Typer(help="vNodes: virtual servers that span blades.", no_args_is_help=True)
    family.command()(create)
    family.command("list")(list_vnodes)
    family.command()(show)
    family.command()(delete)
    app.add_typer(family, name="vnode")


def create(
    name: NameArgument,
    processors: Annotated[str, typer.Option(metavar="PB,PB", help="Processor blades.  [default: all]")] = "",
    memory: Annotated[str, typer.Option(metavar="MB,MB", help="Memory blades.  [default: all]")] = "",
    storage: Annotated[
        str, typer.Option(metavar="SB", help="Storage blade of its files.  [default: the one with the fewest]")
    ] = "",
    placement: Annotated[
        str,
        typer.Option(metavar="POLICY", help="How memory is spread: round-robin, least-requests or most-free."),
    ] = "round-robin",
    rack: RackOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a vNode of some blades; a blade may be in several.

    Programs that are run in it share its processor blades, and have their memory on its memory blades and
    their files on its storage blade.
    """
    chosen = {"processors": _names("--processors", processors), "memory": _names("--memory", memory),
              "storage": _names("--storage", storage)}  # fmt: skip
    made = _ask(rack, "vnode.create", name=name, placement=placement, **chosen)["vnode"]
    if as_json:
        typer.echo(json.dumps(made, indent=2))
    else:
        typer.echo(f"vNode {name} has id {made['id']}; run programs in it: rackless run --vnode {name} -- CMD")


def list_vnodes(rack: RackOption = None, as_json: JsonOption = False) -> None:
    """Show all vNodes; the default one is what programs run in that name none."""
    from orchestrator.ui import table

    vnodes = _ask(rack, "vnode.list")["vnodes"]
    if as_json:
        typer.echo(json.dumps(vnodes, indent=2))
        return
    table(("vnode", "id", "address", "processors", "memory", "storage", "placement", "programs"),
          [(v["name"], v["id"], v["address"], ",".join(v["processors"]), ",".join(v["memory"]), v["storage"],
            v["placement"], v["programs"]) for v in vnodes])  # fmt: skip


def show(name: NameArgument, rack: RackOption = None, as_json: JsonOption = False) -> None:
    """Show one vNode."""
    vnode = _ask(rack, "vnode.list", name=name)["vnodes"][0]
    if as_json:
        typer.echo(json.dumps(vnode, indent=2))
        return
    for key, value in vnode.items():
        typer.echo(f"{key + ':':<12}{', '.join(value) if isinstance(value, list) else '-' if value is None else value}")


def delete(name: NameArgument, rack: RackOption = None, as_json: JsonOption = False) -> None:
    """Delete a vNode in which no program runs. Its files stay on the storage blade."""
    _ask(rack, "vnode.delete", name=name)
    typer.echo(json.dumps({"deleted": name}) if as_json else f"vNode {name} is deleted; its files are kept")


def _ask(rack: str | None, op: str, **fields: Any) -> Mapping[str, Any]:
    from orchestrator import managers

    current = current_rack(rack)
    current.must_be_up()
    return managers.ask(current.paths, current.running(), op, **fields)


def _names(option: str, text: str) -> list[str]:
    """The names in "pb0,pb1". Raises RacklessError if there is an empty one among them."""
    names = [name.strip() for name in text.split(",")] if text else []
    if not all(names):
        raise RacklessError(f"{option}: {text!r} has an empty name in it", hint="write for example mb0,mb1")
    return names
