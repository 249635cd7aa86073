"""What somebody needs who is to find out what is wrong with a rack, in one archive. No key, no secret is in it.

It works on a rack that is up, half up, or down: what cannot be had has its error in its place.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from orchestrator import __version__, collect, doctor, engine, history, leftovers
from orchestrator.errors import RacklessError
from orchestrator.hypervisor.daemon import Daemon
from orchestrator.network import place
from orchestrator.settings import RackPaths, Settings
from orchestrator.ssh import keys
from orchestrator.status import status

_MOST_BYTES = 8 << 20
"""Of one log: its end is kept."""
_COMMAND_SECONDS = 15.0
_PRIVATE_KEY = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
_REMOVED = b"[removed]"
_PROGRAMS = ("qemu-system-x86_64 --version", "libvirtd --version", "ip -V", "mksquashfs -version", "uname -a")
_PACKAGES = ("ansible-core", "libvirt-python", "paramiko", "pydantic", "pyroute2", "typer")
_LOOKS = ("ip -d -s link", "ip addr", "ip route", "tc -s qdisc")


def bundle(settings: Settings, rack: str, rack_file: Path | None, target: Path) -> list[str]:
    """Write the archive (tar.gz); the names of the files in it. Nothing is there before it is whole.

    RacklessError when nothing at all is known of such a rack, and there is no file of it.
    """
    paths = RackPaths(settings, rack)
    if not paths.root.exists() and rack_file is None and not engine.observe(settings, rack):
        raise RacklessError(f"there is no rack {rack} on this host", hint="give its file with --rack")
    name = f"rackless-{rack}"
    with tempfile.TemporaryDirectory(prefix="rackless-support-") as scratch:
        folder = Path(scratch) / name
        folder.mkdir()
        _gather(paths, rack_file, folder)
        secrets = _secrets(paths)
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        for file in files:
            file.write_bytes(scrubbed(file.read_bytes(), secrets))
        archive = Path(scratch) / "archive"
        with tarfile.open(archive, "w:gz") as opened:
            opened.add(folder, arcname=name)
        _publish(archive, target)
        return [str(file.relative_to(folder)) for file in files]


def _publish(archive: Path, target: Path) -> None:
    """Copy the archive to where it was asked for: its owner's alone, and through no link that somebody put there."""
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)  # 0600, O_EXCL, O_NOFOLLOW
    try:
        with archive.open("rb") as source, open(descriptor, "wb") as copy:
            shutil.copyfileobj(source, copy)
        Path(name).rename(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def scrubbed(data: bytes, secrets: list[bytes]) -> bytes:
    """The same without private keys and without these secrets, however they are written: as they are, or in hex."""
    for secret in secrets:
        for written in (secret, secret.hex().encode(), secret.hex().upper().encode()):
            data = data.replace(written, _REMOVED)
    return _PRIVATE_KEY.sub(_REMOVED, data)


def _secrets(paths: RackPaths) -> list[bytes]:
    """What must not be told: the rack's secret, and lines of its private keys."""
    found = []
    if paths.secret.exists():
        with suppress(RacklessError):
            found.append(keys.ensure_secret(paths))
    for key in (file for file in paths.ssh.rglob("*") if file.is_file()):
        with suppress(OSError):
            text = key.read_bytes()
            if b"PRIVATE KEY" in text:
                found += [line for line in text.splitlines() if len(line) > 30 and b"PRIVATE KEY" not in line]
    return [secret for secret in found if len(secret) >= 16]


def _gather(paths: RackPaths, rack_file: Path | None, folder: Path) -> None:
    """Fill the folder, one part after the other."""
    settings, rack = paths.settings, paths.name

    def part(name: str, make: Callable[[], Any]) -> None:
        try:
            made = make()
        except Exception as error:  # a part that is broken may be just what is looked for
            (folder / f"{name}.error").write_text(f"{type(error).__name__}: {error}\n")
        else:
            _write(folder / name, made)

    part("versions.json", _versions)
    part("environment.json", lambda: {k: v for k, v in os.environ.items() if k.startswith("RACKLESS_")})
    part("settings.json", lambda: {name: str(value) for name, value in asdict(settings).items()})
    part("doctor.json", lambda: [asdict(check) for check in doctor.checks(settings)])
    part("leftovers.json", lambda: [item.to_json() for item in leftovers.find(settings)])
    part("host.txt", _host)
    if rack_file is not None:
        part("rack.yml", rack_file.read_text)
    part("status.json", lambda: status(settings, rack))
    part("events.jsonl", lambda: "".join(f"{json.dumps(event)}\n" for event in history.recorded(paths)))
    part("network.txt", lambda: "\n".join(_run([*place.of(paths).entry(), *look.split()]) for look in _LOOKS))
    part("collected", lambda: collect.collect(settings, rack, folder / "collected"))
    for file in paths.blades.glob("*/console.log"):  # also of blades that libvirt does not know any more
        part(f"consoles/{file.parent.name}.log", lambda file=file: _end(file))  # type: ignore[misc]
    for file in Daemon.of(paths).log.rglob("*.log"):
        part(f"libvirt/{file.name}", lambda file=file: _end(file))  # type: ignore[misc]


def _write(file: Path, made: Any) -> None:
    if file.is_dir():  # which `collect` has made
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(made, bytes):
        file.write_bytes(made)
    else:
        file.write_text(made if isinstance(made, str) else json.dumps(made, indent=2) + "\n")


def _versions() -> dict[str, Any]:
    return {
        "rackless": __version__,
        "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "packages": dict(_installed()),
        "programs": {command.split()[0]: _run(command.split()).splitlines()[:1] for command in _PROGRAMS},
    }


def _installed() -> Iterator[tuple[str, str]]:
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            yield name, metadata.version(name)


def _host() -> str:
    files = ("/etc/os-release", "/proc/loadavg", "/proc/meminfo", "/proc/cmdline")
    told = [f"== {name}\n{Path(name).read_text()}" for name in files if Path(name).exists()]
    return "\n".join([*told, _run(["lscpu"]), _run(["df", "-h"])])


def _run(command: list[str]) -> str:
    """What a command prints, under its name; why it cannot be run, if so."""
    head = f"== {' '.join(command)}\n" if len(command) > 2 else ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=False,
                              stdin=subprocess.DEVNULL, errors="replace")  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{head}{error}\n"
    return f"{head}{done.stdout}{done.stderr}"


def _end(file: Path) -> bytes:
    with file.open("rb") as opened:
        size = opened.seek(0, os.SEEK_END)
        opened.seek(max(0, size - _MOST_BYTES))
        return opened.read()
