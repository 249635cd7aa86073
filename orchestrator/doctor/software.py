"""Is the software there: Python, the programs we start, the libvirt binding?"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

from orchestrator.doctor.check import Check
from orchestrator.doctor.packages import fix_for
from orchestrator.settings import Settings

MIN_PYTHON = (3, 11)

# Programs a rack needs, how each tells its version, and the oldest that will do (those of Debian 12).
PROGRAMS: dict[str, tuple[list[str], tuple[int, int] | None]] = {
    "qemu-system-x86_64": (["--version"], (7, 2)),
    "qemu-img": (["--version"], None),
    "libvirtd": (["--version"], (9, 0)),
    "virtlogd": (["--version"], (9, 0)),
    "mmdebstrap": (["--version"], None),
    "mksquashfs": (["-version"], None),
    "unsquashfs": (["-version"], None),
    "busybox": (["--help"], None),
    "mke2fs": (["-V"], None),
    "nc": (["-h"], None),
    "nsenter": (["--version"], None),
    "ip": (["-V"], None),
    "ssh": (["-V"], None),
    "rsync": (["--version"], None),
}


def checks(settings: Settings) -> Iterator[Check]:
    yield python()
    yield programs()
    yield libvirt_binding()


def python() -> Check:
    found = platform.python_version()
    if sys.version_info < MIN_PYTHON:
        oldest = ".".join(map(str, MIN_PYTHON))
        return Check("python", "fail", f"{found} is too old", f"use Python {oldest} or newer")
    return Check("python", "ok", f"{found} at {sys.executable}")


def programs() -> Check:
    """All programs in one line when they are there; otherwise what is missing, and the packages to get."""
    versions, wrong, fixes = [], [], []
    for name, (arguments, oldest) in PROGRAMS.items():
        path = find(name)
        if path is None:
            wrong.append(f"{name} is missing")
            fixes.append(fix_for(name))
            continue
        version = version_of([path, *arguments])
        versions.append(f"{name} {version}" if version else name)
        if oldest and version and tuple(map(int, version.split(".")[:2])) < oldest:
            wrong.append(f"{name} {version} is older than {'.'.join(map(str, oldest))}")
            fixes.append("use Debian 12, Debian 13 or Ubuntu 24.04")
    if wrong:
        return Check("programs", "fail", "; ".join(wrong), "; ".join(dict.fromkeys(fixes)))
    return Check("programs", "ok", ", ".join(versions))


def libvirt_binding() -> Check:
    try:
        import libvirt
    except ImportError as error:
        return Check("libvirt-python", "fail", str(error), "rm -rf .venv && make setup")
    library = libvirt.getVersion()
    version = f"{library // 1_000_000}.{library // 1000 % 1000}.{library % 1000}"
    return Check("libvirt-python", "ok", f"with libvirt {version}")


def find(name: str) -> str | None:
    """A program on PATH or among the administrator's, which are not on every user's PATH."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


def version_of(command: list[str]) -> str | None:
    """The first thing like 7.2 or 9.0.0 that the command prints, on either stream."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(rb"\d+(\.\d+)+", done.stdout)
    return match.group().decode() if match else None
