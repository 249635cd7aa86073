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


LONGEST = ("playbooks", "replication", "lite", "vnode", "errors", "lite_apps", "storage", "lite_faults", "checkpoint",
           "kill", "main_job", "paging", "hosts", "hotpot_crash", "hotpot_apps", "snapshot", "observe")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: `make test-rack` has two workers, and both shall end at the same time."""
    order = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Bench]:
    """Folders for this session's racks; all racks in them are taken down at the end, whatever happened. Where a test
    failed, out/rack-tests keeps what is left of blades' consoles and of the hypervisor's logs."""
    if os.geteuid() != 0:
        pytest.skip("racks need root")
    made = Bench(tmp_path_factory.mktemp("racks"), Path(f"/run/rackless-t{os.getpid()}"))
    try:
        yield made
    finally:
        racks = made.folder / "state/racks"
        if request.session.testsfailed:
            for file in [*racks.glob("*/blades/*/console.log"), *racks.glob("*/libvirt/log/qemu/*.log")]:
                kept = PROJECT / "out/rack-tests" / file.relative_to(racks)
                kept.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, kept)
        for rack in sorted(racks.glob("*")) if racks.exists() else []:
            made.rackless("down", rack.name, check=False)
        shutil.rmtree(made.run, ignore_errors=True)


@pytest.fixture(scope="session")
def rack(bench: Bench) -> Iterator[Rack]:
    """The default rack, up; shared by the tests that do not harm it."""
    with bench.up("t") as made:
        yield made
