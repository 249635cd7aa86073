"""`rackless dashboard` and `rackless metrics`: the rack in a browser, and for Prometheus."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.common import JsonOption, RackOption, rack_name

_LEAST_TOKEN = 16


def register(app: typer.Typer) -> None:
    """Add the commands to the main app."""
    app.command()(dashboard)
    app.command()(metrics)


def dashboard(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1.  [default: a free one]",
                                      show_default=False)] = 0,
    seconds: Annotated[float, typer.Option("--seconds", "-s", min=0.5, help="Time between looks at the rack.")] = 2.0,
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The token is in this file, which is made if it is not there; "
                                  "without it every start has another.")
    ] = None,
    rack: RackOption = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Serve a web page that shows the rack, live, until Ctrl-C; /metrics there is for Prometheus.

    Only this host can reach it, and only with the token in the printed address.
    """
    from orchestrator.dashboard import serve
    from orchestrator.settings import RackPaths, Settings

    paths = RackPaths(Settings.from_environment(), rack_name(rack))
    token = _token(token_file)

    def ready(address: str) -> None:
        print(json.dumps({"rack": paths.name, "address": address}) if as_json else
              f"rack {paths.name} is shown at {address}\nCtrl-C ends it", flush=True)  # fmt: skip

    try:
        serve(paths, token, port, seconds, ready)
    except KeyboardInterrupt:  # how it is meant to end
        raise typer.Exit from None


def metrics(rack: RackOption = None) -> None:
    """Print the figures of a rack once, as Prometheus's text: of the host and of every blade."""
    from orchestrator.errors import RacklessError
    from orchestrator.metrics import exposition
    from orchestrator.observer import Observer
    from orchestrator.settings import RackPaths, Settings

    paths = RackPaths(Settings.from_environment(), rack_name(rack))
    with Observer(paths) as observer:
        seen = observer.look()
    if not seen.wires:
        raise RacklessError(f"rack {paths.name} is not up", hint="bring it up with `rackless up`")
    typer.echo(exposition(seen), nl=False)


def _token(file: Path | None) -> str:
    """A random token, or the one in a file, which only its owner may read."""
    import secrets

    from orchestrator.errors import RacklessError

    if file is None:
        return secrets.token_urlsafe(24)
    if not file.exists():
        file.touch(mode=0o600)
        file.write_text(secrets.token_urlsafe(24) + "\n")
    if file.stat().st_mode & 0o077:
        raise RacklessError(f"others than its owner may read or change {file}", hint=f"chmod 600 {file}")
    token = file.read_text().strip()
    if len(token) < _LEAST_TOKEN or not token.isascii() or not token.isprintable():
        raise RacklessError(f"{file} does not have a token of {_LEAST_TOKEN} characters or more",
                            hint="remove it, and it is made")  # fmt: skip
    return token
