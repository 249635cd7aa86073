"""The uncompressed kernel out of synthetic bzImages, and the initramfs beside it."""

from __future__ import annotations

import gzip
import lzma
import shutil
import stat
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from orchestrator.errors import RacklessError
from orchestrator.image import initramfs, vmlinux

ELF = b"\x7fELF" + Random(1).randbytes(20_000) * 3
SIZE = struct.pack("<I", len(ELF))  # the kernel build appends it, except with gzip, which has its own


def _pipe(*command: str) -> Callable[[bytes], bytes]:
    def compress(data: bytes) -> bytes:
        if shutil.which(command[0]) is None:
            pytest.skip(f"needs {command[0]}")
        return subprocess.run(command, input=data, capture_output=True, check=True).stdout + SIZE

    return compress


def _xz(data: bytes) -> bytes:
    x86 = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20}]
    return lzma.compress(data, check=lzma.CHECK_CRC32, filters=x86) + SIZE  # as the kernel's xz_wrap.sh does


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xz": _xz,
    "zstd": _pipe("zstd", "-q", "-c"),
    "lz4": _pipe("lz4", "-q", "-l", "-c"),
}


def bzimage(payload: bytes, setup_sectors: int = 7, offset: int = 0x2CC) -> bytes:
    """A file with the header fields that the boot protocol has at these places, and code around the payload."""
    setup = bytearray(((setup_sectors or 4) + 1) * 512)
    setup[0x1F1] = setup_sectors
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", setup, 0x248, offset, len(payload))
    return bytes(setup) + b"\x90" * offset + payload + b"\xcc" * 999


@pytest.mark.parametrize("setup_sectors", [0, 7, 39])
@pytest.mark.parametrize("name", COMPRESSIONS)
def test_each_compression(name: str, setup_sectors: int) -> None:
    assert vmlinux.extract(bzimage(COMPRESSIONS[name](ELF), setup_sectors)) == ELF


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", "not an x86 bzImage"),
        (ELF, "not an x86 bzImage"),
        (bzimage(b"")[:0x206], "not an x86 bzImage"),
        (bzimage(b""), "unknown kernel compression"),
        (bzimage(b"BZh91AY" + b"x" * 90), "unknown kernel compression"),
        (bzimage(gzip.compress(b"no kernel")), "not an ELF"),
        (bzimage(gzip.compress(ELF))[:-1500], "damaged"),
        (bzimage(_xz(ELF))[:-1500], "damaged"),
        (bzimage(_xz(ELF)[:40] + b"damage" * 9 + _xz(ELF)[94:]), "damaged"),
        (bzimage(b"\x28\xb5\x2f\xfd" + b"damage" * 9), "damaged"),
    ],
)
def test_what_is_no_kernel(image: bytes, message: str) -> None:
    with pytest.raises(RacklessError, match=message):
        vmlinux.extract(image)


def test_busybox_reads_the_archive(tmp_path: Path) -> None:
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("needs busybox")
    files = {
        "bin": (stat.S_IFDIR | 0o755, b""),
        "bin/tool": (stat.S_IFREG | 0o755, b"#!/bin/sh\n"),
        "empty": (stat.S_IFREG | 0o600, b""),
        **{f"length-{n}": (stat.S_IFREG | 0o644, b"x" * n) for n in (1, 2, 3, 4, 5, 4096)},
    }
    archive = initramfs.cpio(files)
    assert len(archive) % 4 == 0
    subprocess.run([busybox, "cpio", "-i", "-d"], input=archive, cwd=tmp_path, check=True, capture_output=True)
    found = {str(path.relative_to(tmp_path)): path for path in tmp_path.rglob("*")}
    assert found.keys() == files.keys()
    for name, (mode, data) in files.items():
        assert found[name].stat().st_mode == mode
        assert found[name].is_dir() or found[name].read_bytes() == data


def test_the_archive_is_the_same_every_time() -> None:
    files = {"init": (stat.S_IFREG | 0o755, b"x")}
    assert initramfs.cpio(files) == initramfs.cpio(files)
