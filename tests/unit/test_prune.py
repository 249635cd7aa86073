"""What `rackless image prune` and `clean` remove, and what they leave alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchestrator import prune
from orchestrator.cli.main import app
from orchestrator.hypervisor import template
from orchestrator.image import build, cache, recipe
from orchestrator.settings import Settings

OLD = "0" * 16


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A cache with what the recipe of the project needs now, and as much that nothing needs."""
    monkeypatch.setenv("RACKLESS_CACHE", str(tmp_path))
    monkeypatch.setattr(template, "emulator_version", lambda _emulator: "QEMU 7.2")
    monkeypatch.setattr(shutil, "which", lambda _name: "/usr/bin/qemu")
    made = Settings.from_environment()
    for name in current() + [f"{kind}-{OLD}" for kind in ("system", "agents")]:
        make(tmp_path / "images", name, b"x" * 1000)
    for kind in (KIND, template.Kind(OLD, "tcg", 1, 1)):
        key = template.template_key(kind, "qemu")
        template.obtain(tmp_path / "templates", kind, key, lambda file: file.touch())
    make(tmp_path / "templates", f"template-{OLD}", b"of a version that wrote nothing down")
    template.obtain(tmp_path / "templates", KIND, "f" * 16, lambda file: file.touch())  # of another QEMU
    return made


KIND = template.Kind(build.image_key("debian13"), "tcg", 256 << 20, 1)


def current() -> list[str]:
    ours = recipe.load("debian13")
    systems = [f"system-{build.system_key(ours, flavour)}" for flavour in ours.flavours]
    return systems + [f"agents-{build.image_key('debian13', flavour)}" for flavour in ours.flavours]


def make(folder: Path, name: str, content: bytes) -> Path:
    def fill(work: Path) -> None:
        (work / "data").write_bytes(content)

    return cache.obtain(folder, name, fill)


def names(settings: Settings) -> set[str]:
    return {path.name for kind in prune.KINDS for path in (settings.cache_dir / kind).iterdir()}


def test_what_recipes_lead_to_stays(settings: Settings) -> None:
    done = CliRunner().invoke(app, ["image", "prune", "--json"])
    gone = {entry["name"] for entry in json.loads(done.stdout)}
    old_template = f"template-{template.template_key(template.Kind(OLD, 'tcg', 1, 1), 'qemu')}"
    assert gone == {f"system-{OLD}", f"agents-{OLD}", f"template-{OLD}", f"template-{'f' * 16}", old_template}
    kept = {*current(), f"template-{template.template_key(KIND, 'qemu')}"}
    assert names(settings) == kept | {f".{name}.lock" for name in kept}  # locks go with their entries
    assert CliRunner().invoke(app, ["image", "prune"]).stdout == "nothing to remove\n"


def test_what_a_blade_runs_from_stays(settings: Settings) -> None:
    """A process that looks like QEMU: with a file of the entry on its command line."""
    disk = settings.cache_dir / f"images/agents-{OLD}/agents.sqfs"
    blade = subprocess.Popen([sys.executable, "-c", "input()", f'{{"filename":"{disk}"}}'], stdin=subprocess.PIPE)
    try:
        assert disk.parent not in {entry.folder for entry in prune.stale(settings)}
    finally:
        blade.communicate()
    assert disk.parent in {entry.folder for entry in prune.stale(settings)}


def test_what_is_being_built_stays(settings: Settings) -> None:
    folder = settings.cache_dir / "images"
    unfinished = folder / f".system-{OLD}.tmp{os.getpid()}"
    unfinished.mkdir()
    with cache.locked(folder / f".system-{OLD}.lock"):
        done = CliRunner().invoke(app, ["image", "clean"])
        assert f"kept, it is being built: system-{OLD} (0 MiB)\n" in done.stdout
        assert names(settings) == {f"system-{OLD}", f".system-{OLD}.lock", unfinished.name}
    assert f"removed: system-{OLD}" in CliRunner().invoke(app, ["image", "clean"]).stdout
    assert names(settings) == set()


def test_clean_can_spare_the_images(settings: Settings) -> None:
    CliRunner().invoke(app, ["image", "clean", "--templates"])
    assert list((settings.cache_dir / "templates").iterdir()) == []
    assert (settings.cache_dir / f"images/system-{OLD}").exists()


def test_an_empty_cache_has_nothing_to_remove(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RACKLESS_CACHE", str(tmp_path / "none"))
    for command in ("prune", "clean"):
        assert CliRunner().invoke(app, ["image", command]).stdout == "nothing to remove\n"
    assert not (tmp_path / "none").exists()


def test_a_lock_that_was_removed_is_no_lock(tmp_path: Path) -> None:
    """Who waited for it must not build beside one who came later and made a new file."""
    lock = tmp_path / ".thing-1.lock"
    waiting = subprocess.Popen(
        [sys.executable, "-c", "import sys; from pathlib import Path; from orchestrator.image import cache\n"
         "with cache.locked(Path(sys.argv[1])): print(Path(sys.argv[1]).stat().st_ino == int(input()))", lock],
        cwd=Path(__file__).parents[2], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with cache.locked(lock):
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(0.5)
        lock.unlink()
        lock.touch()
        there = lock.stat().st_ino
    assert waiting.communicate(f"{there}\n", timeout=30)[0] == "True\n"
