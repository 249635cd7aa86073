"""The initramfs of a blade: busybox, three modules and a script, as one gzip-compressed cpio archive."""

from __future__ import annotations

import gzip
import lzma
import shutil
import stat
import subprocess
from pathlib import Path

from orchestrator.errors import RacklessError

FOLDERS = (
    "bin",
    "dev",
    "proc",
    "lib",
    "lib/modules",
    "lower",
    "lower/system",
    "lower/agents",
    "upper",
    "root",
)


def build(root: Path, release: str, modules: tuple[str, ...], init: Path) -> bytes:
    """Archive with ``init`` and kernel modules of the image unpacked at ``root`` (kernel ``release``)."""
    files: dict[str, tuple[int, bytes]] = dict.fromkeys(FOLDERS, (stat.S_IFDIR | 0o755, b""))
    files["init"] = (stat.S_IFREG | 0o755, init.read_bytes())
    files["bin/busybox"] = (stat.S_IFREG | 0o755, _busybox().read_bytes())
    for number, path in enumerate(_with_dependencies(root, release, modules)):
        data = path.read_bytes()
        if path.suffix == ".xz":  # unpacked here: one decompression less at every boot
            data = lzma.decompress(data)
        name = f"{number:02}-{path.name.split('.')[0]}.ko"  # the number keeps the order of the dependencies
        files[f"lib/modules/{name}"] = (stat.S_IFREG | 0o644, data)
    return gzip.compress(cpio(files), compresslevel=1, mtime=0)


def cpio(files: dict[str, tuple[int, bytes]]) -> bytes:
    """A "newc" cpio archive of mode and content by name.

    Source: Linux, Documentation/driver-api/early-userspace/buffer-format.rst.
    """
    out = bytearray()
    for number, (name, (mode, data)) in enumerate([*files.items(), ("TRAILER!!!", (0, b""))], start=1):
        encoded = name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
        out += b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        out += b"\0" * (-len(out) % 4) + data
        out += b"\0" * (-len(out) % 4)
    return bytes(out)


def _with_dependencies(root: Path, release: str, modules: tuple[str, ...]) -> list[Path]:
    found: list[Path] = []
    for module in modules:
        shown = subprocess.run(
            ["chroot", root, "modprobe", "-S", release, "--show-depends", module],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        for line in shown.splitlines():
            if line.startswith("insmod "):
                path = root / line.split()[1].lstrip("/")
                if path not in found:
                    found.append(path)
    return found


def _busybox() -> Path:
    path = shutil.which("busybox")
    if path is None:
        raise RacklessError("busybox is missing", hint="apt-get install busybox-static")
    return Path(path)
