"""`rackless doctor` and the accelerator probe: what they say on hosts that lack things."""

from __future__ import annotations

import json
import os
import platform
import stat
from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv4Network
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from orchestrator import doctor
from orchestrator.cli import doctor as cli
from orchestrator.doctor import Check, host, packages, room, software
from orchestrator.hypervisor import probe
from orchestrator.settings import Settings

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
Fake = Callable[[str, str], None]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(cache_dir=tmp_path / "cache", state_dir=tmp_path / "state", run_dir=tmp_path / "run")


@pytest.fixture
def kernel(settings: Settings) -> Path:
    path = settings.cache_dir / "images/system-abc/vmlinux"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\x7fELF a kernel")
    return path


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Put a shell script in front of a program on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def make(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    make("busybox", "exit 0")
    return make


@pytest.fixture
def kvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A /dev/kvm that opens."""
    device = tmp_path / "kvm"
    device.touch()
    monkeypatch.setattr(probe, "KVM_DEVICE", device)
    return device


# --- the probe ---------------------------------------------------------------------------------------------


def test_without_kvm_there_is_tcg(settings: Settings, kernel: Path, kvm: Path, fake: Fake) -> None:
    fake("qemu-system-x86_64", "exit 0")
    kvm.unlink()
    chosen = probe.accelerator(settings)
    assert (chosen.name, chosen.why) == ("tcg", f"there is no {kvm}")


def test_without_an_image_kvm_is_not_trusted(settings: Settings, kvm: Path, fake: Fake) -> None:
    fake("qemu-system-x86_64", "exit 0")
    chosen = probe.accelerator(settings)
    assert (chosen.name, chosen.probed) == ("tcg", False)
    assert "not probed yet" in chosen.why


def test_kvm_is_chosen_once_a_kernel_booted(settings: Settings, kernel: Path, kvm: Path, fake: Fake) -> None:
    fake("qemu-system-x86_64", f"echo x >>{kvm}; echo {probe.MARKER}")
    assert probe.accelerator(settings).name == "kvm"
    assert probe.accelerator(settings, kernel).name == "kvm"
    assert kvm.read_text() == "x\n", "the second answer comes from the cache"


def test_a_new_kernel_is_probed_again(settings: Settings, kernel: Path, kvm: Path, fake: Fake) -> None:
    fake("qemu-system-x86_64", f"echo x >>{kvm}; echo {probe.MARKER}")
    probe.accelerator(settings)
    kernel.write_bytes(b"\x7fELF another")
    probe.accelerator(settings)
    assert kvm.read_text() == "x\nx\n"


def test_a_damaged_cache_is_no_answer(settings: Settings, kernel: Path, kvm: Path, fake: Fake) -> None:
    fake("qemu-system-x86_64", f"echo {probe.MARKER}")
    (settings.cache_dir / "probe.json").write_text('{"kvm": 3')
    assert probe.accelerator(settings).name == "kvm"
    assert json.loads((settings.cache_dir / "probe.json").read_text())


def test_a_kernel_that_hangs_under_kvm_costs_bounded_time(
    settings: Settings, kernel: Path, kvm: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake("qemu-system-x86_64", "echo early; exec sleep 600")
    monkeypatch.setitem(probe.PROBE_SECONDS, "kvm", 0.5)
    chosen = probe.accelerator(settings)
    assert chosen.name == "tcg"
    assert "does not boot under KVM: not up after 0 s; its last words were: early" in chosen.why


def test_qemu_refusing_kvm_is_quoted(settings: Settings, kernel: Path, kvm: Path, fake: Fake) -> None:
    fake("qemu-system-x86_64", "echo 'qemu-system-x86_64: failed to initialize kvm' >&2; exit 1")
    assert probe.accelerator(settings).why.endswith("failed to initialize kvm")


def test_failure_under_tcg_is_not_kept(settings: Settings, kernel: Path, fake: Fake) -> None:
    fake("qemu-system-x86_64", "exit 1")
    assert not probe.cached_boot(settings, kernel, "tcg").ok
    fake("qemu-system-x86_64", f"echo {probe.MARKER}")
    assert probe.cached_boot(settings, kernel, "tcg").ok


def test_the_user_can_choose(settings: Settings) -> None:
    forced = Settings(settings.cache_dir, settings.state_dir, settings.run_dir, accelerator="kvm")
    assert probe.accelerator(forced) == probe.Accelerator("kvm", "chosen by RACKLESS_ACCEL")


# --- software ----------------------------------------------------------------------------------------------


def test_missing_program_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "PROGRAMS", {"mksquashfs": (["-version"], None)})
    monkeypatch.setattr(software, "find", lambda name: None)
    check = software.programs()
    assert (check.level, check.detail) == ("fail", "mksquashfs is missing")
    assert check.fix
    assert "apt-get install squashfs-tools" in check.fix


def test_old_program_fails(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("qemu-system-x86_64", "echo 'QEMU emulator version 6.2.0 (Debian 1:6.2)'")
    monkeypatch.setattr(software, "PROGRAMS", {"qemu-system-x86_64": (["--version"], (7, 2))})
    check = software.programs()
    assert check.level == "fail"
    assert "6.2.0 is older than 7.2" in check.detail


def test_an_unknown_distribution_gets_a_near_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for release, want in (
        ({"ID": "ubuntu", "VERSION_ID": "24.04"}, "ubuntu:24.04"),
        ({"ID": "linuxmint", "ID_LIKE": "ubuntu debian"}, "ubuntu:24.04"),
        ({"ID": "debian"}, "debian:13"),
    ):
        monkeypatch.setattr(platform, "freedesktop_os_release", lambda release=release: release)
        assert packages.distribution.__wrapped__() == want


# --- host --------------------------------------------------------------------------------------------------


def cgroup2(mount: Path, controllers: str, subtree: str) -> None:
    (mount / "cgroup.controllers").write_text(controllers)
    (mount / "cgroup.subtree_control").write_text(subtree)


def test_cgroup_v2_without_the_controller(tmp_path: Path) -> None:
    cgroup2(tmp_path, "memory pids\n", "\n")
    version, why = host.try_cgroup(tmp_path, "cpu")
    assert version == "v2"
    assert why
    assert "cpu controller is not available" in why


def test_cgroup_v2_at_the_real_root_can_be_switched_on(tmp_path: Path) -> None:
    cgroup2(tmp_path, "cpu memory\n", "\n")
    assert host.try_cgroup(tmp_path, "cpu") == ("v2", None)


def test_cgroup_v2_in_a_container_without_delegation(tmp_path: Path) -> None:
    cgroup2(tmp_path, "cpu memory\n", "\n")
    (tmp_path / "cgroup.type").write_text("domain\n")
    _, why = host.try_cgroup(tmp_path, "cpu")
    assert why
    assert "not delegated" in why


def test_no_cgroups_at_all(tmp_path: Path) -> None:
    checks = list(host.cgroups(tmp_path))
    assert [check.name for check in checks] == ["cgroup cpu", "cgroup memory"]
    assert all(check.level in ("fail", "warn") and check.fix for check in checks)


def test_missing_tun_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "TUN", tmp_path / "net/tun")
    check = host.tun()
    assert check.level == "fail"
    assert check.fix
    assert "modprobe tun" in check.fix


@pytest.mark.netns
@needs_root
def test_namespaces_leave_nothing_behind() -> None:
    def interfaces() -> str:
        return " ".join(sorted(path.name for path in Path("/sys/class/net").iterdir()))

    before = interfaces()
    checks = {check.name: check for check in host.namespaces()}
    assert checks["namespaces"].level == "ok"
    assert checks["bridge"].level == "ok"
    assert checks["qdisc netem"].level in ("ok", "info"), "blades delay by themselves"
    assert interfaces() == before


# --- room --------------------------------------------------------------------------------------------------


def rack(memory: int = 1 << 29) -> Any:
    return SimpleNamespace(
        name="demo",
        blades={"mb0": SimpleNamespace(memory=memory)},
        management=SimpleNamespace(subnet=IPv4Network("10.78.0.0/24")),
        fabric=SimpleNamespace(subnet=IPv4Network("10.77.0.0/24")),
    )


@pytest.mark.parametrize(("size", "level"), [(1 << 29, "ok"), (3 << 30, "warn"), (9 << 30, "fail")])
def test_memory_is_compared_with_the_rack(tmp_path: Path, size: int, level: str) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal: {8 << 20} kB\nMemFree: 1 kB\nMemAvailable: {2 << 20} kB\n")
    assert room.memory(rack(size), meminfo).level == level


def test_disk_is_measured_where_the_folder_will_be(tmp_path: Path) -> None:
    folder = tmp_path / "not/there/yet"
    assert room.disk("disk", folder, 1, "RACKLESS_CACHE").level == "ok"
    full = room.disk("disk", folder, 1 << 60, "RACKLESS_CACHE")
    assert full.level == "fail"
    assert full.fix
    assert "RACKLESS_CACHE" in full.fix
    assert not folder.exists()


def test_unwritable_disk_fails() -> None:
    check = room.disk("disk", Path("/proc/rackless"), 1, "RACKLESS_CACHE")
    assert check.level == "fail"
    assert "/proc cannot be written" in check.detail


def test_clash_of_subnets_matters_only_in_the_hosts_own_network(settings: Settings) -> None:
    assert room.subnets(rack(), [IPv4Network("192.168.1.0/24")], settings).level == "ok"
    clash = room.subnets(rack(), [IPv4Network("10.0.0.0/8")], settings)
    assert clash.level == "info"
    assert "10.77.0.0/24 and 10.0.0.0/8" in clash.detail
    shared = replace(settings, libvirt_uri="qemu:///system")
    assert room.subnets(rack(), [IPv4Network("10.0.0.0/8")], shared).level == "warn"


def test_long_run_folder_fails(settings: Settings) -> None:
    far = Settings(settings.cache_dir, settings.state_dir, Path("/" + "x" * 100))
    assert room.sockets(far).level == "fail"


# --- the command -------------------------------------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, results: list[Check], *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(doctor, "checks", lambda settings: iter(results))
    app = typer.Typer()
    app.callback()(lambda: None)
    cli.register(app)
    outcome = CliRunner().invoke(app, ["doctor", *arguments])
    return outcome.exit_code, outcome.stdout


def test_exit_code_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    fine = [Check("a", "ok", "yes"), Check("b", "warn", "hm", "do c"), Check("c", "info", "by the way")]
    code, text = run(monkeypatch, fine)
    assert code == 0
    assert "fix: do c" in text
    code, text = run(monkeypatch, [*fine, Check("d", "fail", "no", "do [e]")])
    assert code == 1
    assert "fix: do [e]" in text, "square brackets are text, not markup"


def test_json_has_everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RACKLESS_ACCEL", "tcg")
    code, text = run(monkeypatch, [Check("d", "fail", "no", "do e")], "--json")
    answer = json.loads(text)
    assert code == 1
    assert answer == {
        "ok": False,
        "accelerator": "tcg",
        "checks": [{"name": "d", "level": "fail", "detail": "no", "fix": "do e"}],
    }


def test_every_failure_has_a_fix_on_a_bare_host(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is on PATH: doctor still gets to its end, and each failure says what to do."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(software, "find", lambda name: None)
    results = list(doctor.checks(settings))
    assert not doctor.healthy(results)
    assert all(check.fix for check in results if check.level == "fail")


def test_probe_initramfs_is_an_archive_with_an_executable_init(tmp_path: Path) -> None:
    busybox = tmp_path / "busybox"
    busybox.write_bytes(b"binary")
    archive = probe._initramfs(busybox)
    assert archive.startswith(b"070701")
    assert b"init\0" in archive
    assert b"%08X" % (stat.S_IFREG | 0o755) in archive
