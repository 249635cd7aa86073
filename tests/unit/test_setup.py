"""The build: package table, set-up script, Makefile and lock agree with each other and with the project."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from orchestrator.doctor import packages
from orchestrator.doctor.software import PROGRAMS

TREE = Path(__file__).parents[2]
SETUP = TREE / "scripts/setup"
DPKG = """#!/bin/sh
for name; do grep -qx "$name" "$FAKE_INSTALLED" && echo "install ok installed $name"; done
exit 1
"""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned() -> dict[str, str]:
    lines = (TREE / "requirements.lock").read_text().splitlines()
    matches = [re.match(r"([A-Za-z0-9._-]+)==([^ ;]+)", line) for line in lines]
    return {normal(match[1]): match[2] for match in matches if match}


def test_table_says_for_every_package_why_and_what_it_is_called() -> None:
    for package in packages.table():
        assert package.why, package.name
        assert set(package.names) == set(packages.DISTRIBUTIONS)
        for name in (name for names in package.names.values() for name in names):
            assert re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", name)
    names = [package.name for package in packages.table()]
    assert len(names) == len(set(names))


def test_every_program_that_doctor_wants_comes_from_a_package_on_every_distribution() -> None:
    for distribution in packages.DISTRIBUTIONS:
        brought = {c for package in packages.table() if package.names[distribution] for c in package.commands}
        assert set(PROGRAMS) <= brought, distribution


def test_malformed_table_line_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = tmp_path / "host-packages.txt"
    bad.write_text("# comment\nqemu | = | why\n")
    monkeypatch.setattr(packages, "TABLE", bad)
    with pytest.raises(ValueError, match=r"host-packages.txt:2: write 6 columns, not 3"):
        packages.table.__wrapped__()


def test_lock_pins_every_dependency_and_names_no_place() -> None:
    project = tomllib.loads((TREE / "pyproject.toml").read_text())
    wanted = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    for extra in project["project"]["optional-dependencies"].values():
        wanted += extra
    names = {normal(re.split(r"[<>=!~ ;\[]", text)[0]) for text in wanted}
    assert names <= set(pinned())
    assert not re.search(
        r"https?:|://|--(extra-)?index|--find-links|\bfile:", (TREE / "requirements.lock").read_text()
    )


def test_build_tools_that_setup_installs_first_are_pinned() -> None:
    match = re.search(r"grep -E '\^\(([^)]*)\)==' requirements.lock", SETUP.read_text())
    assert match
    assert set(match[1].split("|")) <= set(pinned())


def test_make_alone_lists_every_target() -> None:
    shown = subprocess.run(["make"], cwd=TREE, capture_output=True, text=True, check=True).stdout
    phony = re.search(r"^\.PHONY: (.*)$", (TREE / "Makefile").read_text(), re.MULTILINE)
    assert phony
    listed = {line.split()[0] for line in shown.splitlines() if line.startswith("  ")}
    assert listed == set(phony[1].split())
    assert {"testbed", "test", "test-unit", "images", "lint", "bench", "down", "clean", "help"} <= listed


def test_ci_runs_make_test_and_nothing_else() -> None:
    commands = [line for line in (TREE / ".ci/run").read_text().splitlines() if not line.startswith("#")]
    assert [line.rpartition("exec ")[2] for line in commands] == ["make test"]
    assert os.access(TREE / ".ci/run", os.X_OK)


def missing(tmp_path: Path, installed: list[str], column: int) -> list[str]:
    """What scripts/setup would install on a machine that has `installed`."""
    (tmp_path / "dpkg-query").write_text(DPKG)
    (tmp_path / "dpkg-query").chmod(0o755)
    (tmp_path / "installed").write_text("\n".join(installed) + "\n")
    text = SETUP.read_text()
    function = text[text.index("missing_packages() {") : text.index("# While we install")]
    script = f"set -euo pipefail; PACKAGES={packages.TABLE}\n{function}\nmissing_packages {column}"
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script],
        env={"PATH": path, "FAKE_INSTALLED": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        check=True,
    )
    return [line.split("\t")[0] for line in done.stdout.splitlines()]


@pytest.mark.parametrize(("column", "distribution"), [*enumerate(packages.DISTRIBUTIONS, start=2)])
def test_setup_and_doctor_read_the_same_table(tmp_path: Path, column: int, distribution: str) -> None:
    wanted = [name for package in packages.table() for name in package.names[distribution]]
    assert missing(tmp_path, [], column) == wanted
    assert missing(tmp_path, wanted[1:], column) == wanted[:1]
    assert missing(tmp_path, wanted, column) == []


def tree_with_fake_python(tmp_path: Path) -> Path:
    """A copy of what set-up needs, and a python3 whose `venv` and `pip` only pretend."""
    tree = tmp_path / "tree"
    (tree / "scripts").mkdir(parents=True)
    (tree / "orchestrator").mkdir()
    shutil.copy(SETUP, tree / "scripts/setup")
    for name in ("requirements.lock", "pyproject.toml"):
        shutil.copy(TREE / name, tree / name)
    fake = tree / "python"
    fake.write_text(
        f"""#!/bin/bash
echo "$*" >>{tree}/calls
case "$*" in
*"-m venv "*) mkdir -p .venv/bin .venv/lib/python3/site-packages/x.dist-info && cp "$0" .venv/bin/python ;;
*"install "*"-e .") touch .venv/bin/rackless ;;
*sys.executable*) echo "$0" ;;
esac
[ ! -e {tree}/fail ] || [[ "$*" != *" install "* ]]
"""
    )
    fake.chmod(0o755)
    return tree


def run_setup(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], "SKIP_PACKAGES": "1", "PYTHON": str(tree / "python")}
    return subprocess.run(
        [str(tree / "scripts/setup"), *arguments],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def calls(tree: Path, what: str) -> int:
    return (tree / "calls").read_text().count(what)


def test_second_setup_does_nothing(tmp_path: Path) -> None:
    tree = tree_with_fake_python(tmp_path)
    assert run_setup(tree, "--check").returncode == 1
    assert run_setup(tree).returncode == 0
    assert run_setup(tree, "--check").returncode == 0
    before = calls(tree, " install ")
    again = run_setup(tree)
    assert (again.returncode, again.stderr, calls(tree, " install ")) == (0, "", before)


def test_half_made_venv_is_made_again(tmp_path: Path) -> None:
    tree = tree_with_fake_python(tmp_path)
    (tree / "fail").touch()
    failed = run_setup(tree)
    assert failed.returncode == 1
    assert "installing build tools failed" in failed.stderr
    assert str(tree / "out/setup.log") in failed.stderr
    (tree / "fail").unlink()
    mended = run_setup(tree)
    assert mended.returncode == 0
    assert "broken or half-made" in mended.stderr


@pytest.mark.parametrize("damage", ["bin/python", "bin/rackless", "lib/python3/site-packages/x.dist-info"])
def test_damaged_venv_is_made_again(tmp_path: Path, damage: str) -> None:
    tree = tree_with_fake_python(tmp_path)
    assert run_setup(tree).returncode == 0
    lost = tree / ".venv" / damage
    lost.rmdir() if lost.is_dir() else lost.unlink()
    assert run_setup(tree).returncode == 0
    assert lost.exists()
    assert calls(tree, "-m venv") == 2


def test_changed_lock_installs_into_the_same_venv(tmp_path: Path) -> None:
    tree = tree_with_fake_python(tmp_path)
    assert run_setup(tree).returncode == 0
    with (tree / "requirements.lock").open("a") as lock:
        lock.write("# changed\n")
    assert run_setup(tree).returncode == 0
    assert (calls(tree, "-m venv"), calls(tree, "-r requirements.lock")) == (1, 2)


def test_moved_tree_gets_a_new_venv(tmp_path: Path) -> None:
    tree = tree_with_fake_python(tmp_path)
    assert run_setup(tree).returncode == 0
    moved = tree.rename(tmp_path / "elsewhere")
    (moved / "python").write_text((moved / "python").read_text().replace(str(tree), str(moved)))
    assert run_setup(moved).returncode == 0
    assert calls(moved, "-m venv") == 2


def test_what_only_tests_need_is_optional(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("needs root, as apt-get does")
    tree = tree_with_fake_python(tmp_path)
    (tree / "tests").mkdir()
    shutil.copy(TREE / "tests/host-packages.txt", tree / "tests/host-packages.txt")
    tools = tree / "tools"
    tools.mkdir()
    for name, text in (("dpkg-query", DPKG), ("apt-get", f'#!/bin/sh\necho "$*" >>{tree}/apt\nexit 1\n')):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    wanted = [line.split() for line in (tree / "tests/host-packages.txt").read_text().splitlines() if line[0] != "#"]
    (tree / "installed").write_text("\n".join(words[0] for words in wanted) + "\n")

    def run() -> subprocess.CompletedProcess[str]:
        env = {"PATH": f"{tools}:{os.environ['PATH']}", "FAKE_INSTALLED": str(tree / "installed")}
        return subprocess.run([tree / "scripts/setup", "--tests"], env=env, capture_output=True, text=True, timeout=60)

    done = run()
    assert (done.returncode, done.stderr) == (0, "")
    (tree / "installed").write_text("\n")
    done = run()
    assert done.returncode == 0, "a package that cannot be had keeps nobody from testing"
    assert done.stderr == "" or "note: tests that need one of these are skipped" in done.stderr
    assert not (tree / "apt").exists() or (tree / "apt").read_text().endswith(" update\n")
    assert not (tree / ".venv").exists()
