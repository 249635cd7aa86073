"""Take the uncompressed kernel out of a packaged vmlinuz.

QEMU starts an ELF ``vmlinux`` through its PVH entry; without KVM that saves about four seconds of
decompression in the guest on every boot.
"""

from __future__ import annotations

import lzma
import struct
import subprocess
import zlib

from orchestrator.errors import RacklessError

# Offsets in the x86 boot protocol's header (Linux: Documentation/arch/x86/boot.rst).
_SETUP_SECTORS = 0x1F1
_MAGIC = 0x202
_PAYLOAD = 0x248


def extract(image: bytes) -> bytes:
    """The ELF kernel inside a bzImage; RacklessError when it is none, or damaged, or oddly compressed."""
    if image[_MAGIC : _MAGIC + 4] != b"HdrS" or len(image) < _PAYLOAD + 8:
        raise RacklessError("the kernel is not an x86 bzImage", hint="check `kernel:` in the image recipe")
    setup = ((image[_SETUP_SECTORS] or 4) + 1) * 512
    offset, length = struct.unpack_from("<II", image, _PAYLOAD)
    try:
        elf = _decompress(image[setup + offset : setup + offset + length])
    except (EOFError, lzma.LZMAError, zlib.error, subprocess.CalledProcessError) as error:
        raise RacklessError(f"the kernel's payload is damaged: {error}") from None
    if elf[:4] != b"\x7fELF":
        raise RacklessError("the kernel's payload is not an ELF file")
    return elf


def _decompress(payload: bytes) -> bytes:
    # Except with gzip, the kernel build appends the uncompressed size (4 bytes) to the stream. lzma and zlib stop
    # where the stream ends; the commands would take the size for another stream.
    if payload.startswith(b"\x28\xb5\x2f\xfd"):
        return _pipe(["zstd", "-dcq"], payload[:-4])
    if payload.startswith(b"\xfd7zXZ\0"):
        xz = lzma.LZMADecompressor()
        return _whole(xz.decompress(payload), xz.eof)
    if payload.startswith(b"\x1f\x8b"):
        gzip = zlib.decompressobj(wbits=31)
        return _whole(gzip.decompress(payload), gzip.eof)
    if payload.startswith(b"\x02\x21\x4c\x18"):
        return _pipe(["lz4", "-dcq"], payload[:-4])
    raise RacklessError(f"unknown kernel compression (starts with {payload[:6].hex()})")


def _whole(data: bytes, at_end: bool) -> bytes:
    if not at_end:
        raise EOFError("it ends too early")
    return data


def _pipe(command: list[str], data: bytes) -> bytes:
    return subprocess.run(command, input=data, capture_output=True, check=True).stdout
