"""Can this kernel, and this user on it, do what a rack needs? Each thing is tried in a scratch namespace."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from orchestrator.doctor.check import Check, Level, attempt
from orchestrator.hypervisor import probe
from orchestrator.settings import Settings

TUN = Path("/dev/net/tun")
CGROUPS = Path("/sys/fs/cgroup")
AS_ROOT = "run it as root: sudo -E .venv/bin/rackless doctor"
CONTAINER = "in a container: run that with --privileged"

# Made in a namespace that ends with the shell, so nothing is left behind, whatever happens.
TAP_ON_BRIDGE = """
ip link set lo up
ip link add rackless0 type bridge
ip link set rackless0 mtu 9000 up
ip tuntap add rackless1 mode tap
ip link set rackless1 mtu 9000 master rackless0 up
"""
QDISCS: dict[str, tuple[str, Level, str]] = {
    "tbf": (
        "tc qdisc add dev rackless1 root tbf rate 100mbit burst 128kb limit 4mb",
        "warn",
        "the bandwidth of links towards blades cannot be limited",
    ),
    "ingress": (
        "tc qdisc add dev rackless1 ingress",
        "info",
        "not needed: blades shape what they send themselves",
    ),
    "netem": (
        "tc qdisc add dev rackless1 root netem delay 1ms",
        "info",
        "not needed: blades delay and drop what they send themselves",
    ),
}


def checks(settings: Settings) -> Iterator[Check]:
    yield root()
    yield tun()
    yield from namespaces()
    yield from cgroups()
    yield accelerator(settings)
    yield from emulation(settings)


def root() -> Check:
    if os.geteuid() == 0:
        return Check("root", "ok", "running as root")
    if shutil.which("sudo"):
        return Check("root", "warn", "not root: most of what follows cannot be tried", AS_ROOT)
    return Check("root", "fail", "not root, and there is no sudo", "run it as root")


def tun() -> Check:
    try:
        os.close(os.open(TUN, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        fix = f"modprobe tun, or: mkdir -p {TUN.parent} && mknod {TUN} c 10 200"
        return Check("tun", "fail", f"there is no {TUN}", fix)
    except PermissionError:
        return Check("tun", *refused(f"{TUN} does not open: permission denied"))
    except OSError as error:
        fix = f"modprobe tun; in a container: --device {TUN}"
        return Check("tun", "fail", f"{TUN} does not open: {error.strerror}", fix)
    return Check("tun", "ok", f"{TUN} opens")


def namespaces() -> Iterator[Check]:
    """Namespace, bridge with taps, and each kind of traffic shaping."""
    for kind in ("net", "mount"):
        why = attempt(["unshare", f"--{kind}", "true"])
        if why:
            yield Check(f"{kind} namespace", *refused(why))
            return
    yield Check("namespaces", "ok", "network and mount namespaces can be made")
    why = in_scratch_network(TAP_ON_BRIDGE)
    if why:
        yield Check("bridge", *refused(why))
        return
    yield Check("bridge", "ok", "a bridge with a tap and MTU 9000 can be made in a namespace")
    for kind, (command, level, loss) in QDISCS.items():
        why = in_scratch_network(TAP_ON_BRIDGE + command)
        if why:
            fix = None if level == "info" else f"modprobe sch_{kind}"
            yield Check(f"qdisc {kind}", level, f"missing in this kernel ({loss})", fix)
        else:
            yield Check(f"qdisc {kind}", "ok", "works in a namespace")


def in_scratch_network(script: str) -> str | None:
    """Run shell commands in a network namespace of their own; None when all succeed, else why not."""
    return attempt(["unshare", "--net", "sh", "-ec", f"PATH=$PATH:/usr/sbin:/sbin\n{script}"])


def cgroups(mount: Path = CGROUPS) -> Iterator[Check]:
    """CPU quotas need the cpu controller, limits on a blade's process the memory controller (v1 or v2)."""
    levels: dict[str, Level] = {"cpu": "fail", "memory": "warn"}
    for controller, level in levels.items():
        name = f"cgroup {controller}"
        version, why = try_cgroup(mount, controller)
        if why is None:
            yield Check(name, "ok", f"{version}, a group with a limit can be made")
        elif os.geteuid() != 0:
            yield Check(name, "warn", f"not tried: {why}", AS_ROOT)
        else:
            yield Check(name, level, why, f"mount the cgroups (apt-get install cgroupfs-mount); {CONTAINER}")


def try_cgroup(mount: Path, controller: str) -> tuple[str, str | None]:
    """Make a group, set a limit in it, remove it. Returns the cgroup version and why it failed, or None."""
    limits = {
        ("v1", "cpu"): ("cpu.cfs_quota_us", "50000"),
        ("v1", "memory"): ("memory.limit_in_bytes", str(1 << 30)),
        ("v2", "cpu"): ("cpu.max", "50000 100000"),
        ("v2", "memory"): ("memory.max", str(1 << 30)),
    }
    if (mount / controller / "cgroup.procs").exists():
        version, parent = "v1", mount / controller
    elif (mount / "cgroup.controllers").exists():
        version, parent = "v2", mount
        if controller not in (mount / "cgroup.controllers").read_text().split():
            return version, f"the {controller} controller is not available in {mount}"
        if controller not in (mount / "cgroup.subtree_control").read_text().split():
            # libvirt switches controllers on by itself, which works only in the real root group.
            if (mount / "cgroup.type").exists():
                return version, f"the {controller} controller is not delegated to groups below {mount}"
            writable = os.access(mount / "cgroup.subtree_control", os.W_OK)
            return version, None if writable else f"{mount} is read-only"
    else:
        return "none", f"no {controller} cgroup is mounted under {mount}"
    group = parent / f"rackless-doctor-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        return version, f"no group can be made in {parent}: {error.strerror}"
    try:
        file, value = limits[version, controller]
        (group / file).write_text(value)
    except OSError as error:
        return version, f"{group.name}/{file} cannot be set: {error.strerror}"
    finally:
        group.rmdir()
    return version, None


def accelerator(settings: Settings) -> Check:
    """KVM or TCG, decided by booting a kernel; racks run with either."""
    chosen = probe.accelerator(settings)
    if chosen.name == "kvm":
        return Check("accelerator", "ok", f"KVM: {chosen.why}")
    fix = "rackless image build, then ask again" if not chosen.probed else None
    return Check("accelerator", "info", f"TCG (slower, works everywhere): {chosen.why}", fix)


def emulation(settings: Settings) -> Iterator[Check]:
    """Without KVM everything rests on TCG: boot the kernel with that as well, once there is one."""
    kernel = probe.newest_kernel(settings)
    if kernel is None or probe.accelerator(settings).name == "kvm":
        return
    boot = probe.cached_boot(settings, kernel, "tcg")
    if boot.ok:
        yield Check("kernel boot", "ok", f"the image's kernel boots under TCG (took {boot.seconds:.1f} s)")
    else:
        why = f"the image's kernel does not boot under TCG: {boot.detail}"
        yield Check("kernel boot", "fail", why, "end what keeps this host busy; rackless image build")


def refused(why: str) -> tuple[Level, str, str]:
    """A refusal means a fix for root, but for a user only that it was not tried."""
    return ("fail", why, CONTAINER) if os.geteuid() == 0 else ("warn", f"not tried: {why}", AS_ROOT)
