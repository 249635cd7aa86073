"""Output of many blades on one terminal: whole lines, each with the name of its blade, a colour per blade."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from typing import TextIO

# Foreground colours that are readable on dark and light backgrounds; red is left to errors.
_COLOURS = (36, 33, 32, 35, 34, 96, 93, 92, 95, 94)
_FLUSH_AT = 64 * 1024  # characters; a line longer than that is printed in parts


class PrefixedOutput:
    """Writes blades' output to this process's stdout and stderr; may be used from several threads."""

    def __init__(self, names: Sequence[str]) -> None:
        self._width = max((len(name) for name in names), default=0)
        self._colours = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(names)}
        self._partial: dict[tuple[str, str], str] = {}
        self._lock = threading.Lock()

    def write(self, name: str, stream: str, text: str) -> None:
        """Take some output of a blade; `stream` is "stdout" or "stderr"."""
        with self._lock:
            *lines, rest = (self._partial.pop((name, stream), "") + text).split("\n")
            if len(rest) > _FLUSH_AT:
                lines, rest = [*lines, rest], ""
            if rest:
                self._partial[name, stream] = rest
            self._print(name, stream, lines)

    def close(self) -> None:
        """Print what has come without a final newline."""
        with self._lock:
            for (name, stream), rest in self._partial.items():
                self._print(name, stream, [rest])
            self._partial.clear()

    def _print(self, name: str, stream: str, lines: Sequence[str]) -> None:
        if lines:
            output = sys.stderr if stream == "stderr" else sys.stdout
            prefix = self._prefix(name, output)
            output.write("".join(f"{prefix}{line}\n" for line in lines))
            output.flush()

    def _prefix(self, name: str, output: TextIO) -> str:
        text = f"{name:<{self._width}} | "
        if not output.isatty() or os.environ.get("NO_COLOR") or name not in self._colours:
            return text
        return f"\033[{self._colours[name]}m{text}\033[0m"
