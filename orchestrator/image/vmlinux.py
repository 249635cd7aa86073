"""Take the uncompressed kernel out of a packaged vmlinuz.

QEMU starts an ELF ``vmlinux`` through its PVH entry; without KVM that saves about four seconds of decompression in
the guest on every boot.
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
    """The ELF kernel inside a bzImage; RacklessError when it is none, damaged, or compressed in an unknown way."""
    if image[_MAGIC : _MAGIC + 4] != b"HdrS":
        raise RacklessError("the kernel is not an x86 bzImage", hint="check `kernel:` in the image recipe")
    setup = ((image[_SETUP_SECTORS] or 4) + 1) * 512
    offset, length = struct.unpack_from("<II", image, _PAYLOAD)
    # The kernel build appends the uncompressed size, four bytes, to the compressed stream.
    payload = image[setup + offset : setup + offset + length - 4]
    elf = _decompress(payload)
    if elf[:4] != b"\x7fELF":
        raise RacklessError("the kernel's payload is not an ELF file")
    return elf


def _decompress(payload: bytes) -> bytes:
    if payload.startswith(b"\x28\xb5\x2f\xfd"):
        return _pipe(["zstd", "-dcq"], payload)
    if payload.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMADecompressor().decompress(payload)
    if payload.startswith(b"\x1f\x8b"):
        return zlib.decompress(payload, wbits=31)
    if payload.startswith(b"\x02\x21\x4c\x18"):
        return _pipe(["lz4", "-dcq"], payload)
    raise RacklessError(f"unknown kernel compression (starts with {payload[:6].hex()})")


def _pipe(command: list[str], data: bytes) -> bytes:
    return subprocess.run(command, input=data, stdout=subprocess.PIPE, check=True).stdout
