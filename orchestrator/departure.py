"""Files leave a storage blade that is to be removed, for another one, while programs use them.

The other blade copies them, and what has changed meanwhile again; the manager then has the first keep still for the
last of it, and changes the vNodes' records (guest_agents/splitkernel/managers/files.py). Until that moment the files
are where they were, whatever ends: this process, an agent, a blade. All can be repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from orchestrator import agents, managers
from orchestrator.errors import RacklessError
from orchestrator.settings import RackPaths
from orchestrator.spec import BladeSpec
from orchestrator.units import format_size

_FETCH_SECONDS = 5.0
_SPARE = 1 << 20
"""Bytes that a disk needs beside the files: folders and names may take more there."""


def used(paths: RackPaths, spec: BladeSpec) -> int:
    """Bytes that the files on a storage blade take. RacklessError when it does not answer."""
    return int(_content(paths, spec)["bytes"])


def refusals(paths: RackPaths, running: Sequence[BladeSpec], spec: BladeSpec) -> list[str]:
    """In words, the files of `spec` if no other storage blade can take them; nothing if one can."""
    content = _content(paths, spec)
    others = [other for other in running if other.kind == "storage" and other != spec]
    whys = {other.name: _obstacle(content, _content(paths, other)) for other in others}
    if None in whys.values() or not _serves(paths, running, spec, content):
        return []
    why = "; ".join(f"{name} {why}" for name, why in whys.items()) or "there is no other storage blade to have them"
    return [f"its files ({format_size(content['bytes'])}: {why})"]


def move(paths: RackPaths, running: Sequence[BladeSpec], spec: BladeSpec) -> int:
    """Move all files to that of the other storage blades that can take them and has the most room; their bytes.

    RacklessError when that does not work: the files are where they were.
    """
    blades = {other.name: other for other in running}
    managers.ask(paths, blades, "storage.leave", storage=spec.name)
    content = _content(paths, spec)
    if not _serves(paths, running, spec, content):
        return 0
    others = {other.name: _content(paths, other) for other in running if other.kind == "storage" and other != spec}
    fit = [name for name, room in others.items() if _obstacle(content, room) is None]
    if not fit:
        raise RacklessError(f"no storage blade can take the files of {spec.name} any more", hint="try again")
    target = blades[max(fit, key=lambda name: int(others[name]["free"]))]
    while not _ask(paths, target, "storage.fetch", source=spec.name, seconds=_FETCH_SECONDS)["ready"]:
        pass
    managers.ask(paths, blades, "storage.move", storage=spec.name, to=target.name)
    return int(content["bytes"])


def cancel(paths: RackPaths, running: Sequence[BladeSpec], spec: BladeSpec) -> None:
    """Have the blade used again, and drop what others have copied. Who does not answer is left out."""
    with suppress(RacklessError):
        managers.ask(paths, {other.name: other for other in running}, "storage.leave", storage=spec.name, cancel=True)
    for other in running:
        if other.kind == "storage" and other != spec:
            with suppress(RacklessError):
                _ask(paths, other, "storage.fetch", source=spec.name, cancel=True)


def _serves(paths: RackPaths, running: Sequence[BladeSpec], spec: BladeSpec, content: dict[str, Any]) -> bool:
    """Whether there is something to move: files, or a vNode that has none yet."""
    vnodes = managers.ask(paths, {other.name: other for other in running}, "vnode.list")["vnodes"]
    return bool(content["names"]) or any(vnode["storage"] == spec.name for vnode in vnodes)


def _obstacle(content: dict[str, Any], there: dict[str, Any]) -> str | None:
    """Why a disk cannot take the files; None if it can."""
    if both := set(content["names"]) & set(there["names"]) - {".vnode-removed"}:
        return f"has {min(both)} already"
    if there["free"] < content["bytes"] + _SPARE or there["free_files"] < content["files"]:
        return f"has room for {format_size(there['free'])}"
    return None


def _content(paths: RackPaths, spec: BladeSpec) -> dict[str, Any]:
    return _ask(paths, spec, "storage.content")


def _ask(paths: RackPaths, spec: BladeSpec, op: str, **fields: Any) -> dict[str, Any]:
    seconds = paths.settings.control_seconds + _FETCH_SECONDS
    return agents.call(paths, spec.name, spec.mgmt_address, op, seconds, **fields)
