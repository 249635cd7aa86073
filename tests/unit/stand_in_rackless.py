"""The `rackless` command as tests start it, on stand-in blades."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.unit.stand_in import StandInRack

ROOT = Path(__file__).parents[2]

SPLIT = """#!/bin/sh
# A stand-in for the splitkernel: it runs the program, and counts what it was told.
[ "$1" = run ] || exit 90
shift
while [ "$1" != -- ]; do
    case $1 in
    --excache) excache=$2 ;;
    --replicas) replicas=$2 ;;
    --ways | --policy | --victim | --prefetch | --pool | --tier) organisation="$organisation $1 $2" ;;
    --stats) stats=$2 ;;
    --trace) trace=$2 ;;
    --cwd) cd "$2" || exit 125 ;;
    --env) export "$2" ;;
    --vnode) export RACKLESS_VNODE="$2" ;;
    esac
    shift 2
done
shift
[ -z "$organisation" ] || echo "organised:$organisation"
[ -z "$stats" ] || echo "{\\"misses\\": 1, \\"excache\\": \\"$excache\\", \\"replicas\\": \\"$replicas\\"}" > "$stats"
[ -z "$trace" ] || [ -n "$FORGET_TRACE" ] || echo '{"traceEvents": []}' > "$trace"
exec "$@"
"""


class Rackless:
    """The command, run as a process of its own on a stand-in rack."""

    def __init__(self, rack: StandInRack, folder: Path) -> None:
        self.rack, self.folder = rack, folder
        self.vnode, self.logs = folder / "vnode", folder / "logs"
        self.vnode.mkdir()
        self._facts = folder / "facts.json"
        settings = rack.paths.settings
        self.environment = {
            **os.environ,
            "RACKLESS_CACHE": str(settings.cache_dir),
            "RACKLESS_STATE": str(settings.state_dir),
            "RACKLESS_RUN": str(settings.run_dir),
            "PYTHONPATH": str(ROOT),
        }
        self.set_paused()

    def set_paused(self, *names: str) -> None:
        """Have libvirt say that these blades are paused."""
        facts = {
            "specs": [spec.to_json() for spec in self.rack.specs.values()],
            "paused": names,
            "vnode": str(self.vnode),
            "logs": str(self.logs),
        }
        self._facts.write_text(json.dumps(facts))

    def command(self, name: str, *arguments: str | Path) -> list[str]:
        own = [sys.executable, "-m", "tests.unit.stand_in_cli", str(self._facts)]
        return [*own, name, "--rack", self.rack.paths.name, *map(str, arguments)]

    def __call__(self, name: str, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        options = {"stdin": subprocess.DEVNULL, "text": True} | options
        if "input" in options:
            del options["stdin"]
        command = self.command(name, *arguments)
        return subprocess.run(
            command,
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            check=False,
            timeout=60,
            **options,
        )

    def start(self, name: str, *arguments: str | Path, **options: Any) -> subprocess.Popen[bytes]:
        streams: dict[str, Any] = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
        } | options
        command = self.command(name, *arguments)
        return subprocess.Popen(command, env=self.environment, cwd=self.folder, **streams)
