"""The distribution packages that Rackless needs: the same table that scripts/setup installs from."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TABLE = Path(__file__).parent.parent / "host-packages.txt"
DISTRIBUTIONS = ("debian:12", "debian:13", "ubuntu:24.04")


@dataclass(frozen=True)
class Package:
    """One line of the table."""

    name: str
    names: dict[str, tuple[str, ...]]
    """Per distribution: what it is called there (nothing: it is part of another package)."""
    commands: tuple[str, ...]
    why: str


@cache
def table() -> tuple[Package, ...]:
    """All packages, in the table's order. ValueError names a malformed line."""
    packages = []
    for number, line in enumerate(TABLE.read_text().splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        columns = [column.strip() for column in line.split("|")]
        if len(columns) != 3 + len(DISTRIBUTIONS):
            want = 3 + len(DISTRIBUTIONS)
            raise ValueError(f"{TABLE.name}:{number}: write {want} columns, not {len(columns)}")
        name, *there, commands, why = columns
        names = dict(zip(DISTRIBUTIONS, (_names(name, column) for column in there), strict=True))
        packages.append(Package(name, names, tuple(commands.split()), why))
    return tuple(packages)


def fix_for(command: str) -> str:
    """How to get a missing command on this host."""
    owners = [package for package in table() if command in package.commands]
    names = [name for package in owners for name in package.names[distribution()]]
    return f"apt-get install {' '.join(names)} (or: make setup)" if names else "make setup"


@cache
def distribution() -> str:
    """The column of the table that is for this host; a near one for a distribution that is not in it."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return "debian:13"
    exact = f"{release.get('ID', '')}:{release.get('VERSION_ID', '')}"
    if exact in DISTRIBUTIONS:
        return exact
    family = f"{release.get('ID', '')} {release.get('ID_LIKE', '')}"
    return "ubuntu:24.04" if "ubuntu" in family else "debian:13"


def _names(name: str, column: str) -> tuple[str, ...]:
    if column == "-":
        return ()
    return (name,) if column == "=" else tuple(column.split())
