"""Cache entries that nothing leads to any more: every edit of a recipe or an agent leaves the old ones behind."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator import snapshot
from orchestrator.hypervisor import remains, template
from orchestrator.image import build, cache, recipe
from orchestrator.settings import Settings

KINDS = ("templates", "images")
_EMULATOR = "qemu-system-x86_64"


@dataclass(frozen=True)
class Entry:
    """One entry of the cache; ``kept`` says why it could not be removed."""

    folder: Path
    size: int  # bytes
    kept: str | None = None


def stale(settings: Settings) -> list[Entry]:
    """Entries that neither a recipe as it is now, nor a blade that runs, nor a snapshot uses. Changes nothing."""
    used = _current(settings) | _running(settings) | snapshot.used_images(settings)
    return [entry for entry in everything(settings) if entry.folder not in used]


def everything(settings: Settings, kinds: tuple[str, ...] = KINDS) -> list[Entry]:
    """All entries of the cache; those that snapshots need are to be kept: made anew, they would be others."""
    needed = snapshot.used_images(settings)
    folders = [settings.cache_dir / kind / name for kind in kinds for name in cache.entries(settings.cache_dir / kind)]
    return [Entry(folder, sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()),
                  "a snapshot needs it" if folder in needed else None) for folder in folders]  # fmt: skip


def remove(entries: list[Entry]) -> list[Entry]:
    """Remove entries, each under its lock; one that is kept all the same says why in the result."""
    removed = []
    for entry in entries:
        gone = not entry.kept and cache.remove(entry.folder.parent, entry.folder.name)
        removed.append(entry if gone or entry.kept else replace(entry, kept="it is being built"))
    return removed


def _current(settings: Settings) -> set[Path]:
    """Entries that `up` would take for the recipes and agents in the tree."""
    images, templates = (settings.cache_dir / kind for kind in ("images", "templates"))
    systems, keys = set(), set()
    for name in recipe.names():
        for flavour in recipe.load(name).flavours:
            systems.add(images / f"system-{build.system_key(recipe.load(name), flavour)}")
            keys.add(build.image_key(name, flavour))
    used = systems | {images / f"agents-{key}" for key in keys}
    emulator = shutil.which(_EMULATOR)
    for entry in templates.glob("template-*") if emulator else ():
        kind = template.kind_of(entry)
        if kind and kind.image in keys and entry.name == f"template-{template.template_key(kind, str(emulator))}":
            used.add(entry)
    return used


def _running(settings: Settings) -> set[Path]:
    """Entries whose files a process has on its command line, as QEMU has those of its blade, whoever's rack it is."""
    images = settings.cache_dir / "images"
    folders = [images / name for name in cache.entries(images)]
    commands = [remains.command_of(int(process.name)) for process in Path("/proc").glob("[0-9]*")]
    return {folder for folder in folders if any(f"{folder}/" in command for command in commands)}
