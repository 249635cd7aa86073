"""Recipes: what a blade image is made of, as data in ``images/NAME/recipe.yml``."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from orchestrator.errors import RacklessError

PROJECT = Path(__file__).resolve().parents[2]
_INSTALLED = PROJECT / "orchestrator/data/images"
IMAGES = _INSTALLED if _INSTALLED.is_dir() else PROJECT / "images"
AGENTS = PROJECT / "guest_agents"
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, where it is there: each command reads recipes
_MADE = {"__pycache__", "build"}  # folders of made things, which belong to no content hash


class Flavour(BaseModel):
    """What a flavour adds to its recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    packages: tuple[str, ...] = ()


class Recipe(BaseModel):
    """One image recipe; see images/debian13/recipe.yml for the meaning of each field."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    suite: str
    architecture: str
    kernel: str
    packages: tuple[str, ...]
    flavours: dict[str, Flavour]
    modules: tuple[str, ...]
    initramfs_modules: tuple[str, ...]
    drop: tuple[str, ...]
    cmdline: str

    @property
    def folder(self) -> Path:
        """Where the recipe and its files live."""
        return IMAGES / self.name

    def packages_of(self, flavour: str) -> tuple[str, ...]:
        """All packages of a flavour, kernel included, sorted."""
        if flavour not in self.flavours:
            known = ", ".join(self.flavours)
            raise RacklessError(f"image {self.name} has no flavour {flavour!r}", hint=f"choose one of: {known}")
        return tuple(sorted({self.kernel, *self.packages, *self.flavours[flavour].packages}))


def names() -> list[str]:
    """The recipes there are."""
    return sorted(path.parent.name for path in IMAGES.glob("*/recipe.yml"))


def load(name: str) -> Recipe:
    """The recipe called ``name``; RacklessError when there is none or it is not valid."""
    path = IMAGES / name / "recipe.yml"
    try:
        return Recipe.model_validate(yaml.load(path.read_text(), Loader=_LOADER))
    except (FileNotFoundError, NotADirectoryError):
        known = ", ".join(names())
        raise RacklessError(f"there is no image recipe called {name!r}", hint=f"recipes here: {known}") from None
    except (ValidationError, UnicodeDecodeError, yaml.YAMLError) as error:
        first = str(error).splitlines()
        raise RacklessError(f"{path}: not a valid recipe: {' '.join(first[1:3] or first)}") from None


def hash_of(*parts: Any) -> str:
    """A short content hash (16 hex digits) of values and paths (names, modes and bytes of a whole tree)."""
    digest = hashlib.sha256()

    def add(*fields: bytes) -> None:
        for field in fields:  # each after its length: two trees that only divide the same bytes otherwise differ
            digest.update(b"%d:" % len(field))
            digest.update(field)

    for part in parts:
        if isinstance(part, Path):
            files = sorted(_files(part))
            add(b"tree", b"%d" % len(files))
            for file in files:
                mode = b"x" if file.stat().st_mode & 0o100 else b"-"
                add(os.fsencode(file.relative_to(part)), mode, file.read_bytes())
        else:
            add(b"value", repr(part).encode())
    return digest.hexdigest()[:16]


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    # Relative parts: the tree itself may well lie in a folder called build.
    return [p for p in path.rglob("*") if p.is_file() and not _MADE & set(p.relative_to(path).parts)]
