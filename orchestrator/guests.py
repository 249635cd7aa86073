"""Whose the files of a rack are, on a host that is not its home: a rack is known there by its name alone.

The home of a rack is the machine, and the folders on it, that `rackless` was called with. On another host a file in the
rack's folder says who that is; without it, files of that name there are somebody else's. A host that is a namespace of
the home shares its folders and has no such file.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path

from orchestrator.errors import RacklessError
from orchestrator.settings import RackPaths

_MACHINE_ID = Path("/etc/machine-id")  # machine-id(5)


def identity(paths: RackPaths) -> str:
    """This home, in one line: the machine and its folders, two of which may have racks of the same name."""
    machine = "without /etc/machine-id"
    with suppress(OSError):
        machine = _MACHINE_ID.read_text().strip()
    return f"{socket.gethostname()} ({machine}) {paths.settings.state_dir} {paths.settings.run_dir}"


def of(paths: RackPaths) -> str | None:
    """The home of a rack that is a guest on this machine."""
    try:
        return _mark(paths).read_text().strip()
    except FileNotFoundError:
        return None


def insist(paths: RackPaths, home: str) -> None:
    """Raise RacklessError when the rack's files on this host are not those of that home. There may be none."""
    if of(paths) == home:
        return
    for folder in (paths.root, paths.settings.run_dir / paths.name):
        if folder.exists() and any(folder.iterdir()):
            whose = f"a rack of {of(paths)}" if of(paths) else "somebody else's"
            raise RacklessError(f"there is a rack {paths.name} already, {whose}: {folder}",
                                hint="give this one another name; or, if nobody needs that, remove it")  # fmt: skip


def claim(paths: RackPaths, home: str) -> None:
    """Make the rack's files on this host those of that home. RacklessError as by `insist`."""
    insist(paths, home)
    paths.root.mkdir(mode=0o700, parents=True, exist_ok=True)
    with suppress(FileExistsError), _mark(paths).open("x") as file:
        file.write(f"{home}\n")
    insist(paths, home)  # of two that claim it at once one is the first


def refuse(paths: RackPaths) -> None:
    """Raise RacklessError when a rack is a guest on this machine: it is changed from its home."""
    if home := of(paths):
        raise RacklessError(f"rack {paths.name} on this machine is part of one of {home}",
                            hint="give this one another name, or call `rackless` there; if that is gone for good, end "
                            f"its blades with virsh and remove {paths.root}")  # fmt: skip


def _mark(paths: RackPaths) -> Path:
    return paths.root / "guest-of"
