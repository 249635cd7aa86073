"""Real racks for tests: the command line as a user types it, on racks with names and folders of their own."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

PROJECT = Path(__file__).resolve().parents[2]
UP_SECONDS = 900.0  # the first `up` of a session may build image and templates


@dataclass
class Bench:
    """A place where racks can be made that nothing else on this host sees: own state and run folders, shared cache."""

    folder: Path
    run: Path
    environment: dict[str, str] = field(default_factory=dict)

    def rackless(self, *words: str, check: bool = True, seconds: float = UP_SECONDS, **more: Any) -> Any:
        """Run ``rackless WORDS``; with ``check`` a failure fails the test and shows what it printed."""
        done = subprocess.run(self.command(*words), env=self.env(), capture_output=True, text=True, timeout=seconds,
                              check=False, **{"stdin": subprocess.DEVNULL, **more})  # fmt: skip
        assert not check or done.returncode == 0, f"rackless {' '.join(words)}: {done.stdout}{done.stderr}"
        return done

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "orchestrator.cli.main", *words]

    def env(self) -> dict[str, str]:
        return {**os.environ, "RACKLESS_STATE": str(self.folder / "state"), "RACKLESS_RUN": str(self.run),
                "PYTHONPATH": str(PROJECT), **self.environment}  # fmt: skip

    def rack_file(self, name: str, source: str = "default", **changes: Any) -> Path:
        """A copy of racks/SOURCE.yml under another rack name, with top-level keys replaced."""
        data = yaml.safe_load((PROJECT / f"racks/{source}.yml").read_text())
        path = self.folder / f"{name}.yml"
        path.write_text(yaml.safe_dump({**data, "name": name, **changes}, sort_keys=False))
        return path

    @contextmanager
    def up(self, prefix: str, source: str = "default", **changes: Any) -> Iterator[Rack]:
        """A rack of its own name (`unique`), from such a file; it is up, and down afterwards."""
        name = unique(prefix)
        file = self.rack_file(name, source, **changes)
        try:
            self.rackless("up", str(file))
            yield Rack(self, name, file)
        finally:
            self.rackless("down", name)

    def status(self, rack: str) -> dict[str, Any]:
        """Blades by name, from ``rackless status --json``."""
        state = json.loads(self.rackless("status", rack, "--json").stdout)
        return {blade["name"]: blade for blade in state["blades"]}


AGENT = "/etc/rackless/services/agent"
"""The agent's service, for runit's sv."""


@dataclass
class Rack:
    """A rack that is up."""

    bench: Bench
    name: str
    file: Path

    def __call__(self, *words: str, **more: Any) -> Any:
        """Run a rackless command that takes ``--rack`` on this rack."""
        return self.bench.rackless(words[0], "--rack", self.name, *words[1:], **more)

    def on(self, blade: str, command: str) -> str:
        """What a shell command prints on a blade; the test fails when it fails."""
        return str(self("ssh", blade, "--", command, seconds=300).stdout)

    def kill_agent(self, blade: str) -> None:
        """End the blade's agent as a crash does; its supervisor starts the next one."""
        self.on(blade, f"kill -9 $(cat {AGENT}/supervise/pid)")


def unique(prefix: str) -> str:
    """A rack name that no other test and no other run has."""
    return f"{prefix}{secrets.token_hex(3)}"


SHARED = "the shared rack"
LONGEST = ("test_playbooks", SHARED, "test_replication", "test_lite", "test_vnode", "test_errors", "test_lite_apps",
           "test_storage", "test_lite_faults", "test_checkpoint", "test_kill", "test_hosts", "test_hotpot_crash",
           "test_snapshot")  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before xdist looks for groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker has all tests of the shared rack, so that there is one; others have a file at a time. The longest
    first: `make test-rack` has two workers, and both shall end at the same time."""
    order: dict[str, int] = {}
    for item in items:
        module = item.path.stem
        shares = "rack" in getattr(item, "fixturenames", ()) and not hasattr(getattr(item, "module", None), "rack")
        group = SHARED if shares else module
        item.add_marker(pytest.mark.xdist_group(group))
        order[item.nodeid] = LONGEST.index(group) if group in LONGEST else len(LONGEST)
    items.sort(key=lambda item: order[item.nodeid])


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Folders for this session's racks; all racks in them are taken down at the end, whatever happened."""
    if os.geteuid() != 0:
        pytest.skip("racks need root")
    made = Bench(tmp_path_factory.mktemp("racks"), Path(f"/run/rackless-t{os.getpid()}"))
    try:
        yield made
    finally:
        racks = made.folder / "state/racks"
        for rack in sorted(racks.glob("*")) if racks.exists() else []:
            made.rackless("down", rack.name, check=False)
        shutil.rmtree(made.run, ignore_errors=True)


@pytest.fixture(scope="session")
def rack(bench: Bench) -> Iterator[Rack]:
    """The default rack, up; shared by the tests that do not harm it."""
    with bench.up("t") as made:
        yield made
