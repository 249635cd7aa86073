"""Commands that do not outlive the builder that started them, not even when it is killed by kill -9."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence


def mortal(command: Sequence[str | os.PathLike[str]]) -> list[str]:
    """``command`` in a PID namespace that ends, with everything in it, when the calling thread or process does.

    A builder that is killed would else leave apt, dpkg or a compiler at work in a folder that the next builder
    clears. The kernel kills `unshare` with its parent, `unshare` its child, and the end of a PID namespace's first
    process is that of all others. FileNotFoundError when the program is missing, as from subprocess itself.
    """
    program = shutil.which(command[0])
    if program is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(command[0]))
    return ["setpriv", "--pdeathsig", "KILL", "unshare", "--pid", "--fork", "--kill-child", "--mount-proc",
            "--", program, *(os.fspath(word) for word in command[1:])]  # fmt: skip


def plain(command: Sequence[object]) -> str:
    """A command as a person would type it, without what `mortal` put before it."""
    words = list(map(str, command))
    return " ".join(words[words.index("--") + 1 :] if words[:1] == ["setpriv"] else words)
