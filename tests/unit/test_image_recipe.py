"""Image recipes and the content hashes that decide what is built again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import RacklessError
from orchestrator.image import build, recipe

GOOD = """
name: small
suite: trixie
architecture: amd64
kernel: linux-image-amd64
packages: [runit, gawk]
flavours: {blade: {}, lab: {packages: [gdb]}}
modules: [ext4]
initramfs_modules: [squashfs]
drop: ["usr/share/{man,info}"]
cmdline: console=ttyS0
"""


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of recipes with a good one called small."""
    folder = tmp_path / "images"
    (folder / "small/files/etc").mkdir(parents=True)
    (folder / "small/recipe.yml").write_text(GOOD)
    (folder / "small/files/etc/motd").write_text("hello\n")
    (folder / "small/initramfs-init").write_text("#!/bin/sh\n")
    monkeypatch.setattr(recipe, "IMAGES", folder)
    return folder


def test_the_recipe_of_the_project_is_valid() -> None:
    ours = recipe.load("debian13")
    assert ours.name == ours.folder.name == "debian13"
    assert "linux-image-amd64" in ours.packages_of("blade")
    assert set(ours.packages_of("blade")) < set(ours.packages_of("lab"))


def test_packages_are_sorted_and_complete(images: Path) -> None:
    assert recipe.load("small").packages_of("lab") == ("gawk", "gdb", "linux-image-amd64", "runit")


def test_an_unknown_flavour_names_the_known_ones(images: Path) -> None:
    with pytest.raises(RacklessError, match="no flavour 'big'") as caught:
        recipe.load("small").packages_of("big")
    assert caught.value.hint == "choose one of: blade, lab"


@pytest.mark.parametrize("name", ["large", "", "..", "small/recipe.yml"])
def test_an_unknown_recipe_names_the_known_ones(images: Path, name: str) -> None:
    with pytest.raises(RacklessError, match="no image recipe called") as caught:
        recipe.load(name)
    assert caught.value.hint == "recipes here: small"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b"", "dict"),
        (b"[1, 2]", "dict"),
        (b"name: [", "expected"),
        (b"\xff\xfe\x00", ""),
        (GOOD.replace("suite: trixie", "").encode(), "suite"),
        (GOOD.replace("suite", "siute").encode(), "suite"),
        (GOOD.replace("[runit, gawk]", "7").encode(), "packages"),
    ],
)
def test_a_bad_recipe_is_one_line_that_names_the_file(images: Path, text: bytes, word: str) -> None:
    (images / "small/recipe.yml").write_bytes(text)
    with pytest.raises(RacklessError, match="not a valid recipe") as caught:
        recipe.load("small")
    assert caught.value.message.startswith(f"{images}/small/recipe.yml: ")
    assert word in caught.value.message
    assert "\n" not in caught.value.message


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "tree"
    (folder / "etc").mkdir(parents=True)
    (folder / "etc/one").write_text("1")
    (folder / "two").write_text("2")
    return folder


CHANGES: dict[str, Callable[[Path], object]] = {
    "content": lambda tree: (tree / "two").write_text("3"),
    "content of the same size, deeper": lambda tree: (tree / "etc/one").write_text("7"),
    "name": lambda tree: (tree / "two").rename(tree / "three"),
    "place": lambda tree: (tree / "two").rename(tree / "etc/two"),
    "mode": lambda tree: (tree / "two").chmod(0o755),
    "another file": lambda tree: (tree / "etc/empty").touch(),
    "a file less": lambda tree: (tree / "two").unlink(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_hash_of_a_tree_sees_a_changed(tree: Path, change: Callable[[Path], object]) -> None:
    before = recipe.hash_of(tree)
    change(tree)
    assert recipe.hash_of(tree) != before


def test_the_hash_of_a_tree_leaves_out_made_things(tree: Path) -> None:
    before = recipe.hash_of(tree)
    for made in ("__pycache__/x.pyc", "native/build/x.o"):
        (tree / made).parent.mkdir(parents=True)
        (tree / made).write_text("made")
    assert recipe.hash_of(tree) == before


@pytest.mark.parametrize("place", ["build/rackless", "__pycache__", "elsewhere"])
def test_the_hash_of_a_tree_does_not_depend_on_where_it_is(tree: Path, tmp_path: Path, place: str) -> None:
    before = recipe.hash_of(tree)
    (tmp_path / place).parent.mkdir(exist_ok=True)
    moved = tree.rename(tmp_path / place)
    assert recipe.hash_of(moved) == before
    (moved / "two").write_text("3")
    assert recipe.hash_of(moved) != before


def test_a_file_does_not_pass_for_two(tmp_path: Path) -> None:
    """Names, modes and bytes are told apart by their lengths, not by marks that a file may hold as well."""
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    (one / "a").write_bytes(b"1b\0-\0002")
    (two / "a").write_bytes(b"1")
    (two / "b").write_bytes(b"2")
    assert recipe.hash_of(one) != recipe.hash_of(two)


def test_hashes_tell_parts_apart() -> None:
    hashes = [recipe.hash_of(*parts) for parts in ((), ("a",), ("a", "b"), ("ab",), ("b", "a"), (("a", "b"),), (1,))]
    assert len(set(hashes)) == len(hashes)
    assert all(len(text) == 16 for text in hashes)


def test_system_keys_follow_what_the_image_is_made_of(images: Path) -> None:
    def key(flavour: str = "blade") -> str:
        return build.system_key(recipe.load("small"), flavour)

    plain = key()
    assert key("lab") != plain
    (images / "small/recipe.yml").write_text(GOOD.replace("console=ttyS0", "quiet"))
    assert key() == plain  # the command line is no part of the root: minutes of building saved
    (images / "small/recipe.yml").write_text(GOOD.replace("packages: [gdb]", "packages: [gdb, strace]"))
    assert key() == plain  # another flavour's packages
    for file in ("recipe.yml", "files/etc/motd", "initramfs-init"):
        path = images / "small" / file
        before = path.read_text()
        path.write_text(before.replace("ext4", "xfs") if file == "recipe.yml" else before + "#")
        assert key() != plain, file
        path.write_text(before)
    assert key() == plain


def test_an_image_with_another_command_line_is_another_image(images: Path) -> None:
    """Or `plan` would have nothing to do after such a change."""
    before = build.image_key("small")
    (images / "small/recipe.yml").write_text(GOOD.replace("console=ttyS0", "console=ttyS0   # the same"))
    assert build.image_key("small") == before
    (images / "small/recipe.yml").write_text(GOOD.replace("console=ttyS0", "console=ttyS0 quiet"))
    assert build.image_key("small") != before


@pytest.mark.parametrize(
    ("pattern", "expanded"),
    [
        ("var/lib/apt/lists/*", ["var/lib/apt/lists/*"]),
        ("usr/share/{man,info}", ["usr/share/man", "usr/share/info"]),
        ("a/{b,c}/d", ["a/b/d", "a/c/d"]),
        ("a/{b}", ["a/b"]),
    ],
)
def test_braces(pattern: str, expanded: list[str]) -> None:
    assert build._braces(pattern) == expanded
