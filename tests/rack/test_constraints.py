"""What the rack file says of a blade holds, seen from the blade and from the host."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from pathlib import Path

import pytest

from tests.rack.conftest import Rack

pytestmark = pytest.mark.rack
_PMEM = "python3 -c 'from guest_agents import pmem; d = pmem.Device(exclusive=False); {}'"


def test_cpus_and_memory_as_the_blade_sees_them(rack: Rack) -> None:
    for blade, mebibytes in (("pb0", 512), ("gm0", 256)):
        assert rack.on(blade, "nproc").strip() == "1"
        kilobytes = int(re.search(r"MemTotal:\s+(\d+)", rack.on(blade, "cat /proc/meminfo"))[1])  # type: ignore[index]
        assert 0.75 * mebibytes < kilobytes / 1024 < mebibytes


def test_cpu_quota_is_in_the_blades_cgroup(rack: Rack) -> None:
    assert _quota(rack, "mb0") == pytest.approx(0.5)
    assert _quota(rack, "mb1") is None


def test_cpu_quota_slows_the_blade(rack: Rack) -> None:
    """Busy blades get no more of a host CPU than their quota gives them (a busy host may give less), and are held back.
    Only the host can tell: clocks in a blade go on while it is held back."""
    rack.on("mb0", "timeout 12 sh -c 'while :; do :; done' >/dev/null 2>&1 &")
    thread = _cpu_thread(rack, "mb0")
    time.sleep(2)
    began, used, held_back = time.monotonic(), _cpu_seconds(thread), _held_back(rack, "mb0")
    time.sleep(5)
    share = (_cpu_seconds(thread) - used) / (time.monotonic() - began)
    assert share < 0.6
    assert _held_back(rack, "mb0") > held_back


def test_disk_size_and_limits(rack: Rack) -> None:
    assert int(rack.on("sb0", "cat /sys/block/vdc/size")) * 512 == 2 << 30
    assert "/srv/vnode ext4" in rack.on("sb0", "cat /proc/mounts")
    throttle = _virsh(rack, "blkdeviotune", f"{rack.name}.sb0", "vdc")
    assert re.search(r"total_iops_sec\s*: 2000", throttle)
    assert re.search(rf"total_bytes_sec\s*: {100 << 20}", throttle)
    # 2000 requests of 4 KiB past any cache take a second or more; without the limit a tenth.
    seconds = rack.on("sb0", "cd /srv/vnode && dd if=/dev/zero of=x bs=4k count=4000 oflag=direct 2>&1; rm x")
    assert float(re.search(r"([\d.]+) s,", seconds)[1]) > 1.5  # type: ignore[index]


def test_link_bandwidth_on_the_tap_and_latency_in_the_blade(rack: Rack) -> None:
    index = int(rack.bench.status(rack.name)["mb1"]["fabric_address"].rsplit(".", 1)[1]) - 10
    shown = _in_namespace(rack, "tc", "qdisc", "show", "dev", f"fabric{index}")
    assert "tbf" in shown
    assert "1Gbit" in shown
    inside = rack.on("mb1", "tc qdisc show dev fabric")
    assert "netem" in inside
    assert "delay 50us" in inside
    assert "rate 1Gbit" in inside


def test_jumbo_frames_on_the_fabric_only(rack: Rack) -> None:
    assert rack.on("pb0", "cat /sys/class/net/fabric/mtu /sys/class/net/mgmt/mtu").split() == ["9000", "1500"]
    assert re.search(r"active_mtu:\s+4096", rack.on("pb0", "ibv_devinfo"))


def test_fabric_addresses_do_not_meet_the_hosts(rack: Rack) -> None:
    address = rack.bench.status(rack.name)["pb0"]["fabric_address"]
    assert address not in subprocess.run(["ip", "-4", "route"], capture_output=True, text=True, check=True).stdout


def test_pmem_survives_a_power_kill(rack: Rack) -> None:
    assert rack.on("mb1", "cat /sys/bus/nd/devices/region*/size").split() == [str(128 << 20)] * 2
    has = json.loads(rack.bench.rackless("pmem", "stat", "mb1", "--rack", rack.name, "--json").stdout)["mb1"]
    assert (has["mode"], has["size"]) == ("devdax", 128 << 20)
    assert has["usable"] >= (128 - 2) << 20
    rack.on("mb1", _PMEM.format('d.scratch[:8] = b"survivor"; d.persist(d.size, 8)'))
    _virsh(rack, "destroy", f"{rack.name}.mb1")
    assert "mb1" not in rack.bench.status(rack.name)
    result = json.loads(rack.bench.rackless("up", str(rack.file), "--json").stdout)
    assert result["changed"] == ["mb1"]
    assert rack.on("mb1", _PMEM.format("print(bytes(d.scratch[:8]).decode())")).strip() == "survivor"


def _cgroup(rack: Rack, blade: str) -> Path:
    """Of the blade's virtual CPU on the host (version 1 or 2)."""
    name = f"qemu-*-{rack.name}.{blade}.libvirt-qemu"
    for kind in ("cpu*/machine*", "machine*"):
        for file in Path("/sys/fs/cgroup").glob(f"{kind}/{name}/**/vcpu0/cpu.stat"):
            return file.parent
    raise AssertionError(f"no cgroup of {blade}")


def _quota(rack: Rack, blade: str) -> float | None:
    """Share of a CPU that the blade's virtual CPU may use."""
    cgroup = _cgroup(rack, blade)
    if (cgroup / "cpu.max").exists():
        quota, period = (cgroup / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    microseconds = int((cgroup / "cpu.cfs_quota_us").read_text())
    return None if microseconds < 0 else microseconds / int((cgroup / "cpu.cfs_period_us").read_text())


def _held_back(rack: Rack, blade: str) -> int:
    """In how many periods it had used up its quota."""
    return int(re.search(r"nr_throttled (\d+)", (_cgroup(rack, blade) / "cpu.stat").read_text())[1])  # type: ignore[index]


def _cpu_thread(rack: Rack, blade: str) -> Path:
    pid = (rack.bench.run / rack.name / f"libvirt/qemu/{rack.name}.{blade}.pid").read_text()
    threads = Path(f"/proc/{pid}/task").iterdir()
    return next(thread for thread in threads if (thread / "comm").read_text().startswith("CPU 0/"))


def _cpu_seconds(thread: Path) -> float:
    fields = (thread / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _virsh(rack: Rack, *words: str) -> str:
    socket = rack.bench.run / rack.name / "libvirt/libvirt-sock"
    return subprocess.run(["virsh", "-c", f"qemu:///system?socket={socket}", *words], capture_output=True, text=True,
                          check=True).stdout  # fmt: skip


def _in_namespace(rack: Rack, *words: str) -> str:
    return subprocess.run(["nsenter", f"--net=/run/netns/rackless-{rack.name}", *words], capture_output=True, text=True,
                          check=True).stdout  # fmt: skip
