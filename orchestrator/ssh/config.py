"""The ssh_config of a rack: with it plain ssh, scp, rsync, Fabric and Ansible reach the blades."""

from __future__ import annotations

import os
from collections.abc import Mapping
from ipaddress import IPv4Address
from pathlib import Path

from orchestrator.network import place
from orchestrator.settings import RackPaths
from orchestrator.ssh.keys import known_hosts, user_key, write_private
from orchestrator.ssh.shared import can_share, close_shared_connections, control_path
from orchestrator.templates import render

__all__ = ["close_shared_connections", "proxy_command", "ssh_config", "ssh_config_text", "write_ssh_config"]


def ssh_config(paths: RackPaths) -> Path:
    """Return where the rack's ssh_config lies."""
    return paths.ssh / "ssh_config"


def ssh_config_text(paths: RackPaths, blades: Mapping[str, IPv4Address | str]) -> str:
    """Return the ssh_config of a rack; `blades` maps a blade's name to its management address.

    Blades are known as NAME, NAME.RACK and by address.
    """
    return render(
        "ssh_config.j2",
        rack=paths.name,
        blades=sorted((name, str(address)) for name, address in blades.items()),
        proxy_command=" ".join(proxy_command(paths)),
        identity_file=_quoted(user_key(paths)),
        known_hosts=_quoted(known_hosts(paths)),
        control_path=_quoted(control_path(paths, "%h")) if can_share(paths) else None,
        connect_timeout=round(paths.settings.scaled("tcg").ssh_seconds),  # the file outlives an accelerator
    )


def write_ssh_config(paths: RackPaths, blades: Mapping[str, IPv4Address | str]) -> Path:
    """Write the rack's ssh_config, make the directory of its shared connections; return the file's path."""
    write_private(ssh_config(paths), ssh_config_text(paths, blades))
    control_path(paths, "%h").parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return ssh_config(paths)


def proxy_command(paths: RackPaths) -> list[str]:
    """Return the command that joins its stdin and stdout to a blade's port, where only it can; else no words.

    `%h` and `%p` are ssh's. nc is Debian's netcat-openbsd: with -N it ends when ssh does. It gets a session
    of its own, so that Ctrl-C in the terminal that opened a shared connection does not end it for the others.
    """
    enter = place.of(paths).entry()
    if not enter:
        return []
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    return ["setsid", *sudo, *enter, "nc", "-N", "%h", "%p"]


def _quoted(path: Path) -> str:
    """A path as ssh_config wants it: quoted for its spaces, % doubled except in our own %h."""
    text = str(path)
    return '"' + text.replace("%", "%%").replace("%%h", "%h") + '"'
