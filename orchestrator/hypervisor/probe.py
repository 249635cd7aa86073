"""Find out how fast blades can run on this host, by booting a kernel rather than by believing /dev/kvm.

A host can have /dev/kvm, pass libvirt's checks and still never boot a stock kernel (nested KVM, for one).
So the kernel of the image is booted once to a marker on its serial port; the answer is kept until the kernel,
QEMU or the host's boot changes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import stat
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from orchestrator.settings import Settings

QEMU = "qemu-system-x86_64"
KVM_DEVICE = Path("/dev/kvm")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
MARKER = "RACKLESS-PROBE-BOOTED"
PROBE_SECONDS = {"kvm": 10.0, "tcg": 60.0}
"""Deadlines. A working KVM needs under a second; TCG about three on an idle core."""
CMDLINE = (
    "console=ttyS0 panic=-1 nokaslr mitigations=off no_timer_check edd=off "
    "random.trust_cpu=on cryptomgr.notests quiet"
)
INIT = f"""#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox echo {MARKER} >/dev/ttyS0
/bin/busybox poweroff -f
"""

Name = Literal["kvm", "tcg"]


@dataclass(frozen=True)
class Accelerator:
    """What blades run on, and the reason in words for a person."""

    name: Name
    why: str
    probed: bool = True
    """False when nothing could be booted yet (no image): ask again once there is one."""


@dataclass(frozen=True)
class Boot:
    """What became of one probe."""

    ok: bool
    seconds: float
    detail: str


def accelerator(settings: Settings, kernel: Path | None = None) -> Accelerator:
    """Choose KVM when `kernel` (default: that of the newest cached image) really boots under it, else TCG.

    Takes milliseconds when the answer is cached, at most PROBE_SECONDS["kvm"] when not. What stands in KVM's
    way is no error: it becomes the `why` of TCG.
    """
    if settings.accelerator != "auto":
        return Accelerator(settings.accelerator, "chosen by RACKLESS_ACCEL")
    obstacle = kvm_obstacle()
    if obstacle:
        return Accelerator("tcg", obstacle)
    kernel = kernel or newest_kernel(settings)
    if kernel is None:
        why = f"not probed yet: {KVM_DEVICE} opens, but there is no kernel to try it with"
        return Accelerator("tcg", why, probed=False)
    boot = cached_boot(settings, kernel, "kvm")
    if boot.ok:
        return Accelerator("kvm", f"the image's kernel booted under KVM in {boot.seconds:.1f} s")
    why = f"{KVM_DEVICE} opens, but the image's kernel does not boot under KVM: {boot.detail}"
    return Accelerator("tcg", why)


def kvm_obstacle() -> str | None:
    """Why KVM cannot even be tried, or None when it can."""
    if shutil.which(QEMU) is None:
        return f"{QEMU} is not installed"
    try:
        os.close(os.open(KVM_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return f"there is no {KVM_DEVICE}"
    except OSError as error:
        return f"{KVM_DEVICE} does not open: {error.strerror}"
    return None


def newest_kernel(settings: Settings) -> Path | None:
    """The kernel of the image built last, or None before the first `rackless image build`."""
    kernels = list(settings.cache_dir.glob("images/system-*/vmlinux"))
    return max(kernels, key=os.path.getmtime, default=None)


def cached_boot(settings: Settings, kernel: Path, name: Name) -> Boot:
    """`try_boot`, once per kernel, QEMU and boot of the host; whoever asks meanwhile waits for it."""
    answers = settings.cache_dir / "probe.json"
    try:
        key = f"{name} {_fingerprint(kernel)}"
    except OSError as error:
        return Boot(False, 0.0, f"{kernel} cannot be read: {error.strerror}")
    known = _read(answers).get(key)
    if known:
        return known
    try:
        answers.parent.mkdir(parents=True, exist_ok=True)
        lock = answers.with_suffix(".lock").open("w")
    except OSError:
        return try_boot(kernel, name)  # the cache is for doctor to complain about
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = _read(answers).get(key)
        if known:
            return known
        boot = try_boot(kernel, name)
        if name == "tcg" and not boot.ok:
            return boot  # not kept: TCG works everywhere, so the host was too busy
        # Answers for other kernels and older boots are dropped: they will hardly be asked for again.
        current = {k: v for k, v in _read(answers).items() if k.split(" ", 1)[1] == key.split(" ", 1)[1]}
        _write(answers, {**current, key: boot})
        return boot


def try_boot(kernel: Path, name: Name, seconds: float | None = None) -> Boot:
    """Boot `kernel` (vmlinux or bzImage) with a one-file initramfs until its marker or the deadline."""
    limit = PROBE_SECONDS[name] if seconds is None else seconds
    busybox = shutil.which("busybox")
    if busybox is None:
        return Boot(False, 0.0, "busybox is missing (apt-get install busybox-static)")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rackless-probe-") as folder:
        initramfs = Path(folder) / "initramfs"
        initramfs.write_bytes(_initramfs(Path(busybox)))
        command = [
            QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-machine", "q35", "-accel", name, "-cpu", "max", "-m", "256",
            "-serial", "stdio",
            "-kernel", os.fspath(kernel), "-initrd", os.fspath(initramfs), "-append", CMDLINE,
        ]  # fmt: skip
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit, check=False
            )
            output, complaint = done.stdout, done.stderr
        except subprocess.TimeoutExpired as expired:  # run() has killed QEMU and waited for it
            output, complaint = expired.stdout or b"", b""
        except OSError as error:
            return Boot(False, 0.0, f"{QEMU} does not start: {error.strerror}")
    took = time.monotonic() - started
    if MARKER.encode() in output:
        return Boot(True, took, "booted")
    return Boot(False, took, _reason(output, complaint, took, limit))


def _reason(output: bytes, complaint: bytes, took: float, limit: float) -> str:
    text = (complaint or output).decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if complaint and lines:
        return lines[0].removeprefix(f"{QEMU}: ")
    said = f"its last words were: {lines[-1]}" if lines else "it printed nothing"
    if took >= limit:
        return f"not up after {limit:.0f} s; {said}"
    return f"it stopped after {took:.1f} s; {said}"


def _initramfs(busybox: Path) -> bytes:
    from orchestrator.image.initramfs import cpio

    return cpio(
        {
            "dev": (stat.S_IFDIR | 0o755, b""),
            "bin": (stat.S_IFDIR | 0o755, b""),
            "bin/busybox": (stat.S_IFREG | 0o755, busybox.read_bytes()),
            "init": (stat.S_IFREG | 0o755, INIT.encode()),
        }
    )


def _fingerprint(kernel: Path) -> str:
    """Everything the answer depends on. QEMU by its file, not --version: quicker, and sees rebuilds too."""
    with kernel.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    qemu = Path(shutil.which(QEMU) or QEMU)
    with suppress(OSError):
        status = qemu.resolve().stat()
        boot = BOOT_ID.read_text().strip()
        return f"kernel={digest} qemu={status.st_size}-{status.st_mtime_ns} boot={boot}"
    return f"kernel={digest}"


def _read(answers: Path) -> dict[str, Boot]:
    # Missing or damaged: then nothing is known, and the probe simply runs again.
    with suppress(OSError, ValueError, TypeError, AttributeError):
        return {key: Boot(**value) for key, value in json.loads(answers.read_text()).items()}
    return {}


def _write(answers: Path, boots: dict[str, Boot]) -> None:
    part = answers.with_suffix(".part")
    with suppress(OSError):
        part.write_text(json.dumps({key: asdict(boot) for key, boot in boots.items()}, indent=1) + "\n")
        part.replace(answers)
