"""One finding of `rackless doctor`."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "info", "warn", "fail"]
"""ok: works; info: worth knowing, harmless; warn: a rack runs, with something missing; fail: no rack runs."""

COMMAND_SECONDS = 15.0


@dataclass(frozen=True)
class Check:
    """What was found out about one thing, and what to do about it when it is not as it should be."""

    name: str
    level: Level
    detail: str
    fix: str | None = None


def attempt(command: Sequence[str]) -> str | None:
    """Run `command`; None when it succeeds, else why not, in one line."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
    except OSError as error:
        return f"{command[0]}: {error.strerror}"
    except subprocess.TimeoutExpired:
        return f"{command[0]} did not end within {COMMAND_SECONDS:.0f} s"
    if done.returncode == 0:
        return None
    lines = (done.stderr or done.stdout).strip().splitlines()
    return lines[0] if lines else f"{command[0]} ended with {done.returncode}"
