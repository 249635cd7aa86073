"""The shared connection (OpenSSH's ControlMaster) with which the host's ssh, scp and rsync reach a blade."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from ipaddress import IPv4Address
from pathlib import Path

from orchestrator.errors import RacklessError
from orchestrator.settings import RackPaths

# A Unix socket's path has at most 107 bytes, and ssh makes its master under a temporary name 17 bytes longer.
_LONGEST_PATH_BYTES = 107 - 17
_LONGEST_ADDRESS = "255.255.255.255"
_ASK_SECONDS = 5.0


def control_path(paths: RackPaths, address: str) -> Path:
    """Return the socket of the shared connection to an address (`%h` for ssh to fill in)."""
    return paths.settings.run_dir / paths.name / "ssh" / address


def can_share(paths: RackPaths) -> bool:
    """Whether the run folder's path fits ssh's sockets; if not, every ssh is a new handshake."""
    return len(os.fsencode(control_path(paths, _LONGEST_ADDRESS))) <= _LONGEST_PATH_BYTES


def open_shared_connection(paths: RackPaths, ssh_config: Path, blade: str, address: IPv4Address | str) -> None:
    """Have a shared connection to a blade in the background, ready for ssh -F; it ends after an idle minute.

    Raises RacklessError if the blade does not let us in. So a later ssh's exit code 255 is the program's own,
    and no session depends on the first process that happened to connect.
    """
    if not can_share(paths):
        return
    if control_path(paths, str(address)).exists() and _ask(paths, str(address), "check"):
        return
    opened = subprocess.run(
        ["ssh", "-F", ssh_config, "-f", "-N", blade],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False,
        start_new_session=True,
    )  # fmt: skip
    if opened.returncode != 0:
        reason = opened.stderr.strip().splitlines() or ["ssh says nothing"]
        raise RacklessError(
            f"no SSH session with {blade} ({address}): {reason[-1]}",
            hint=f"see `rackless status` and `rackless console --log {blade}`",
        )


def close_shared_connections(paths: RackPaths, addresses: Iterable[IPv4Address | str]) -> None:
    """End the shared connections to these addresses: their blades go or are replaced.

    Nothing happens where none is open. A master that does not answer only loses its socket.
    """
    for address in addresses:
        socket = control_path(paths, str(address))
        if socket.exists():
            _ask(paths, str(address), "exit")
            socket.unlink(missing_ok=True)


def _ask(paths: RackPaths, address: str, request: str) -> bool:
    """Send a request ("check", "exit") to the master of a shared connection; whether it answered."""
    control = f"ControlPath={control_path(paths, address)}"
    with suppress(subprocess.TimeoutExpired):
        asked = subprocess.run(
            ["ssh", "-F", "none", "-o", control, "-O", request, address],
            stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=_ASK_SECONDS,
        )  # fmt: skip
        return asked.returncode == 0
    return False
