"""The one exception a user is meant to see."""

from __future__ import annotations

from pathlib import Path


class RacklessError(Exception):
    """Something the user can act on: printed as one line with a hint and a log path, never as a traceback."""

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        log: Path | None = None,
        exit_code: int = 1,
        detail: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.log = log
        self.exit_code = exit_code
        self.detail = detail  # several lines of evidence, such as the tail of a console
