"""`rackless on-host`: what the orchestrator starts on another host; not for people, so it is not listed."""

from __future__ import annotations

import sys

import typer


def register(app: typer.Typer) -> None:
    """Add the command to the main app."""
    app.command(hidden=True)(on_host)


def on_host() -> None:
    """Do on this host what the orchestrator of a rack on several hosts asks for; see docs/hosts.md."""
    from orchestrator.deeds import serve

    serve(sys.stdin, sys.stdout)
