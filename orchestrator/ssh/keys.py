"""A rack's secrets on the host: user key, one host key per blade, known_hosts and the agents' secret.

The host makes every key, so that it can pin a blade's host key before the blade has ever been seen.
Files are 0600 in directories 0700; each appears complete or not at all. Functions are idempotent: a key that
exists is kept, because blades that are running already trust it.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

from orchestrator.errors import RacklessError
from orchestrator.settings import RackPaths

SECRET_BYTES = 32


@dataclass(frozen=True)
class RackKeys:
    """The key that lets this host into every blade of a rack."""

    private_key: Path
    public_key_line: str


def user_key(paths: RackPaths) -> Path:
    """Return where the private key lies that lets this host into the rack's blades."""
    return paths.ssh / "id_ed25519"


def host_key(paths: RackPaths, blade: str) -> Path:
    """Return where the private host key of a blade lies."""
    return paths.ssh / "hostkeys" / blade


def known_hosts(paths: RackPaths) -> Path:
    """Return where the pinned host keys lie, in OpenSSH's known_hosts format."""
    return paths.ssh / "known_hosts"


def ensure_rack_keys(paths: RackPaths) -> RackKeys:
    """Return the rack's user key, made at the first call."""
    _, public_line = _ensure_key(user_key(paths), f"rackless-{paths.name}", paths)
    return RackKeys(user_key(paths), public_line)


def ensure_host_key(paths: RackPaths, blade: str) -> tuple[str, str]:
    """Return (private key in OpenSSH format, public line) of one blade's host key, made at the first call."""
    return _ensure_key(host_key(paths, blade), f"{blade}.{paths.name}", paths)


def forget_host_key(paths: RackPaths, blade: str) -> None:
    """Remove the host key of a blade that has left the rack; no error if there is none."""
    (host_key(paths, blade)).unlink(missing_ok=True)


def write_known_hosts(paths: RackPaths, blades: Mapping[str, IPv4Address | str]) -> Path:
    """Pin the host key of every blade, under its name, its rack-qualified name and its management address.

    `blades` maps a blade's name to its management address.
    """
    lines = [
        f"{name},{name}.{paths.name},{address} {_without_comment(ensure_host_key(paths, name)[1])}\n"
        for name, address in sorted(blades.items())
    ]
    write_private(known_hosts(paths), "".join(lines))
    return known_hosts(paths)


def ensure_secret(paths: RackPaths) -> bytes:
    """Return the 32 random bytes that authenticate host and agents of a rack to each other."""
    if not paths.secret.exists():
        _create_private(paths.secret, secrets.token_hex(SECRET_BYTES) + "\n")
    try:
        secret = bytes.fromhex(paths.secret.read_text(encoding="ascii"))
    except ValueError:
        secret = b""
    if len(secret) != SECRET_BYTES:
        raise RacklessError(f"{paths.secret} is not a rack secret", hint=_replace_hint(paths.secret))
    return secret


def write_private(path: Path, text: str) -> None:
    """Write a file of mode 0600 that is seen either as it was or complete."""
    temporary = _temporary_private(path, text)
    try:
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _ensure_key(path: Path, comment: str, paths: RackPaths) -> tuple[str, str]:
    # Imported only here and below: `status` needs no keys, and is to be quick.
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_private_key

    for directory in (paths.ssh, path.parent):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)  # it may have been made under another umask
    if not path.exists():
        _create_private(path, _new_private_key())
    path.chmod(0o600)  # ssh refuses a key that others can read
    private_text = path.read_text(encoding="ascii", errors="replace")
    try:
        key = load_ssh_private_key(private_text.encode(), password=None)
        public_line = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    except ValueError as error:
        raise RacklessError(f"{path} is not an SSH key: {error}", hint=_replace_hint(path)) from error
    return private_text, f"{public_line} {comment}"


def _new_private_key() -> str:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = Ed25519PrivateKey.generate()
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()).decode()


def _create_private(path: Path, text: str) -> None:
    """Like write_private, but whoever comes first wins: two processes never end with different keys."""
    temporary = _temporary_private(path, text)
    try:
        with suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink()


def _temporary_private(path: Path, text: str) -> Path:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mkstemp makes it 0600
    try:
        with open(descriptor, "wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        os.unlink(name)
        raise
    return Path(name)


def _without_comment(public_line: str) -> str:
    return " ".join(public_line.split()[:2])


def _replace_hint(path: Path) -> str:
    return f"run `rackless down`, remove {path} and run `rackless up`: the rack gets a new one"
