"""A rack's private libvirtd and virtlogd, and what `rackless gc` finds of them. Real daemons, no blades."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator import leftovers, lock
from orchestrator.errors import RacklessError
from orchestrator.hypervisor import daemon, remains
from orchestrator.hypervisor.daemon import Daemon
from orchestrator.leftovers import Leftover
from orchestrator.network import namespace
from orchestrator.settings import RackPaths
from tests.unit.netns_racks import ensure_network, like_qemu, needs_root, scratch_rack

pytestmark = [
    pytest.mark.netns,
    needs_root,
    pytest.mark.skipif(shutil.which("libvirtd", path="/usr/sbin:/sbin") is None, reason="needs libvirtd"),
]



def _bring_up(paths: RackPaths) -> None:
    """All of a rack that is there before its first blade."""
    (paths.settings.run_dir / paths.name).mkdir(parents=True)
    ensure_network(paths.name)
    daemon.ensure(paths)


@pytest.fixture(scope="module")
def shared() -> Iterator[RackPaths]:
    """One rack for all tests that leave its daemons running: a first start takes seconds."""
    with scratch_rack() as paths:
        _bring_up(paths)
        yield paths


def _pids(paths: RackPaths) -> dict[str, int | None]:
    return {name: daemon.running(file) for name, file in Daemon.of(paths).pids.items()}


def _host_libvirt() -> dict[str, tuple[int, int]]:
    """Everything in the host's own libvirt folders: size and time."""
    folders = (Path("/etc/libvirt"), Path("/var/lib/libvirt"), Path("/run/libvirt"), Path("/var/log/libvirt"))
    files = (file for folder in folders for file in folder.rglob("*") if file.is_file())
    return {str(file): (file.stat().st_size, file.stat().st_mtime_ns) for file in files}


def test_it_starts_answers_and_stops() -> None:
    before = _host_libvirt()
    with scratch_rack() as paths:
        with daemon.connection(paths) as conn:
            assert conn is None  # asking starts nothing
        assert not Daemon.of(paths).run.exists()
        _bring_up(paths)
        with daemon.connection(paths) as conn:
            assert conn is not None
            assert conn.getType() == "QEMU"
            assert conn.listAllDomains() == []
        pids = _pids(paths)
        assert None not in pids.values()
        daemon.stop(paths)
        assert set(_pids(paths).values()) == {None}
        assert not any(Path(f"/proc/{pid}").exists() and _command(pid) for pid in pids.values())
        assert not Daemon.of(paths).run.exists()
        assert not (paths.root / "libvirt").exists()
        daemon.stop(paths)
        with daemon.connection(paths) as conn:
            assert conn is None
    assert _host_libvirt() == before


def _command(pid: int | None) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_a_second_time_is_nothing(shared: RackPaths) -> None:
    before = _pids(shared)
    started = time.monotonic()
    daemon.ensure(shared)
    assert time.monotonic() - started < 0.2
    assert _pids(shared) == before


def test_it_lives_in_the_racks_namespaces(shared: RackPaths) -> None:
    rack = (namespace.NAMED / namespace.name_of(shared.name)).stat().st_ino
    for pid in _pids(shared).values():
        assert os.stat(f"/proc/{pid}/ns/net").st_ino == rack
        assert os.readlink(f"/proc/{pid}/ns/mnt") != os.readlink("/proc/self/ns/mnt")
        assert Path(f"/proc/{pid}/root/sys/fs/cgroup").stat().st_dev == os.stat("/sys/fs/cgroup").st_dev
        assert os.getsid(pid or 0) != os.getsid(0)  # a terminal's Ctrl-C does not reach it
    assert "/etc/libvirt" not in Path("/proc/self/mounts").read_text()


@pytest.mark.parametrize("name", ["libvirtd", "virtlogd"])
def test_a_killed_daemon_is_noticed_and_started_again(shared: RackPaths, name: str) -> None:
    before = _pids(shared)
    os.kill(before[name] or 0, signal.SIGKILL)
    while daemon.running(Daemon.of(shared).pids[name]):
        time.sleep(0.01)
    if name == "libvirtd":
        with daemon.connection(shared) as conn:
            assert conn is None
    with daemon.connection(shared, start=True) as conn:
        assert conn is not None
        assert conn.listAllDomains() == []
    after = _pids(shared)
    assert after[name] not in (None, before[name])
    assert {n: pid for n, pid in after.items() if n != name} == {n: pid for n, pid in before.items() if n != name}


def test_a_killed_libvirtd_with_blades_is_started_by_whoever_asks(shared: RackPaths) -> None:
    _known_to_libvirt(shared, "mb0", 1)
    libvirtd = Daemon.of(shared).pids["libvirtd"]
    os.kill(daemon.running(libvirtd) or 0, signal.SIGKILL)
    while daemon.running(libvirtd):
        time.sleep(0.01)
    with daemon.connection(shared) as conn:
        assert conn is not None
    for file in (Daemon.of(shared).run / "qemu").glob("*.mb0.*"):
        file.unlink()


def test_several_commands_start_it_once() -> None:
    with scratch_rack() as paths:
        ensure_network(paths.name)
        seen: list[dict[str, int | None]] = []

        def ensure() -> None:
            daemon.ensure(paths)
            seen.append(_pids(paths))

        threads = [threading.Thread(target=ensure) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(seen) == 4
        assert seen.count(seen[0]) == 4
        assert None not in seen[0].values()


def test_racks_have_daemons_of_their_own(shared: RackPaths) -> None:
    with scratch_rack() as other:
        _bring_up(other)
        assert not set(_pids(other).values()) & set(_pids(shared).values())
        daemon.stop(other)
    assert None not in _pids(shared).values()


def test_a_pid_file_that_names_another_process_is_not_believed(shared: RackPaths, tmp_path: Path) -> None:
    file = tmp_path / "libvirtd.pid"
    for text in ("", "x", "-1", "0", str(os.getpid()), str(_pids(shared)["libvirtd"]), "99999999"):
        file.write_text(text)
        assert daemon.running(file) is None, text
    file.unlink()
    assert daemon.running(file) is None


def test_without_a_network_it_is_one_line() -> None:
    with scratch_rack() as paths, pytest.raises(RacklessError, match="libvirtd did not start") as caught:
        daemon.ensure(paths)
    assert caught.value.hint


def test_an_unreachable_uri_is_one_line() -> None:
    with scratch_rack() as paths:
        elsewhere = RackPaths(replace(paths.settings, libvirt_uri="qemu:///system?socket=/nowhere"), paths.name)
        with (
            pytest.raises(RacklessError, match="cannot reach libvirt at qemu:///system"),
            daemon.connection(elsewhere, start=True),
        ):
            pass


# leftovers


def _kinds(paths: RackPaths) -> list[str]:
    found = leftovers.find(paths.settings)
    assert {item.rack for item in found} <= {paths.name}  # other racks of this host are none of ours
    return [item.kind for item in found]


def test_a_rack_without_blades_is_left_over_and_can_be_removed() -> None:
    with scratch_rack() as paths:
        _bring_up(paths)
        pids = _pids(paths)
        found = leftovers.find(paths.settings)
        run = paths.settings.run_dir / paths.name
        assert found == [
            Leftover("daemons", str(Daemon.of(paths).run), paths.name),
            Leftover("namespace", namespace.name_of(paths.name), paths.name),
            Leftover("folder", str(run), paths.name),
        ]
        assert all(_command(pid) for pid in pids.values())  # looking changes nothing
        leftovers.remove(paths.settings, found)
        assert set(_pids(paths).values()) == {None}
        assert not namespace.exists(paths.name)
        assert not run.exists()
        assert leftovers.find(paths.settings) == []


def test_a_rack_that_is_being_changed_is_left_alone() -> None:
    with scratch_rack() as paths:
        (paths.settings.run_dir / paths.name).mkdir(parents=True)
        ensure_network(paths.name)
        with lock.hold(paths):
            assert leftovers.find(paths.settings) == []
        found = leftovers.find(paths.settings)
        assert [item.kind for item in found] == ["namespace", "folder"]
        with lock.hold(paths), pytest.raises(RacklessError, match="being changed by"):
            leftovers.remove(paths.settings, found)
        assert namespace.exists(paths.name)


# It sleeps in the rack's namespace.
BLADE = "import time; time.sleep(600)"


@pytest.fixture
def pretend(request: pytest.FixtureRequest) -> Callable[[RackPaths, str], subprocess.Popen[bytes]]:
    """Starts a process that looks like the QEMU of a blade."""

    def start(paths: RackPaths, blade: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(["nsenter", f"--net={namespace.NAMED / namespace.name_of(paths.name)}",
                                    *like_qemu(paths, blade, BLADE)])  # fmt: skip
        request.addfinalizer(process.wait)
        request.addfinalizer(process.kill)
        while not _command(process.pid).startswith(os.fsencode(sys.executable)):
            time.sleep(0.01)
        return process

    return start


def _known_to_libvirt(paths: RackPaths, blade: str, pid: int) -> None:
    folder = Daemon.of(paths).run / "qemu"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{paths.name}.{blade}.pid").write_text(str(pid))
    (folder / f"{paths.name}.{blade}.xml").write_text("<domstatus/>")


def test_a_rack_in_use_is_not_left_over(pretend: Callable[..., subprocess.Popen[bytes]]) -> None:
    with scratch_rack() as paths:
        (paths.settings.run_dir / paths.name).mkdir(parents=True)
        ensure_network(paths.name)
        _known_to_libvirt(paths, "mb0", pretend(paths, "mb0").pid)
        (paths.blades / "mb0").mkdir(parents=True)
        assert _kinds(paths) == []
        for scratch in ("clone.save", "disk.new", "pmem.new"):
            (paths.blades / "mb0" / scratch).touch()
        (paths.blades / "template-0123").mkdir()
        found = leftovers.find(paths.settings)
        assert [item.kind for item in found] == ["file", "file", "file", "folder"]
        leftovers.remove(paths.settings, found)
        assert namespace.exists(paths.name)
        assert [path.name for path in paths.blades.iterdir()] == ["mb0"]
        assert list((paths.blades / "mb0").iterdir()) == []


def test_a_blade_that_no_libvirt_knows_is_left_over(pretend: Callable[..., subprocess.Popen[bytes]]) -> None:
    with scratch_rack() as paths:
        (paths.settings.run_dir / paths.name).mkdir(parents=True)
        ensure_network(paths.name)
        orphan = pretend(paths, "mb0")
        found = leftovers.find(paths.settings)
        assert found[0] == Leftover("process", str(orphan.pid), paths.name)
        assert [item.kind for item in found] == ["process", "namespace", "folder"]
        leftovers.remove(paths.settings, found)
        assert orphan.wait(10) == -signal.SIGKILL
        assert _kinds(paths) == []


def test_it_is_left_over_also_when_its_folders_are_gone(pretend: Callable[..., subprocess.Popen[bytes]]) -> None:
    with scratch_rack() as paths:
        ensure_network(paths.name)
        orphan = pretend(paths, "mb0")
        daemon.stop(paths)
        assert not (paths.root / "libvirt").exists()
        assert leftovers.find(paths.settings)[0] == Leftover("process", str(orphan.pid), paths.name)
        for other in (replace(paths.settings, run_dir=paths.settings.run_dir / "2"),
                      replace(paths.settings, state_dir=paths.settings.state_dir / "2")):  # fmt: skip
            (other.run_dir / paths.name).mkdir(parents=True, exist_ok=True)
            other.state_dir.mkdir(exist_ok=True)
            assert remains.orphans(RackPaths(other, paths.name), []) == [], "another one has this name there"


def test_found_but_in_use_when_it_is_to_be_removed(pretend: Callable[..., subprocess.Popen[bytes]]) -> None:
    with scratch_rack() as paths:
        (paths.settings.run_dir / paths.name).mkdir(parents=True)
        ensure_network(paths.name)
        found = leftovers.find(paths.settings)
        assert "namespace" in [item.kind for item in found]
        _known_to_libvirt(paths, "mb0", pretend(paths, "mb0").pid)  # `up` came between
        leftovers.remove(paths.settings, found)
        assert namespace.exists(paths.name)


def test_a_namespace_of_another_run_folder_is_none_of_ours(shared: RackPaths) -> None:
    """Neither by its name alone, nor when a rack of ours has the same name."""
    with scratch_rack() as own:
        assert leftovers.find(own.settings) == []
        ours = RackPaths(own.settings, shared.name)
        (ours.settings.run_dir / ours.name).mkdir(parents=True)
        assert [item.kind for item in leftovers.find(own.settings)] == ["folder"]
        leftovers.remove(own.settings, [Leftover("namespace", namespace.name_of(ours.name), ours.name)])
        assert namespace.exists(shared.name)


def test_blades_of_another_libvirt_are_not_orphans(pretend: Callable[..., subprocess.Popen[bytes]]) -> None:
    with scratch_rack() as paths:
        there = RackPaths(replace(paths.settings, libvirt_uri="qemu:///system?socket=/nowhere"), paths.name)
        daemon.claim(there)
        ensure_network(paths.name)
        pretend(paths, "mb0")
        assert leftovers.find(paths.settings) == []
        with pytest.raises(RacklessError, match="in another libvirt") as caught, daemon.connection(paths):
            pass
        assert caught.value.hint == "set RACKLESS_LIBVIRT_URI=qemu:///system?socket=/nowhere"
        with pytest.raises(RacklessError, match="cannot reach libvirt"):
            leftovers.find(there.settings)


def test_a_libvirt_that_does_not_answer_is_forgotten() -> None:
    with scratch_rack() as paths:
        wrong = RackPaths(replace(paths.settings, libvirt_uri="qemu:///system?socket=/nowhere"), paths.name)
        with pytest.raises(RacklessError, match="cannot reach libvirt"):
            daemon.check(wrong)
        with pytest.raises(RacklessError, match="cannot reach libvirt"), daemon.connection(wrong, start=True):
            pass
        daemon.check(paths)


def test_a_rack_of_our_own_libvirt_is_not_in_another(shared: RackPaths) -> None:
    with pytest.raises(RacklessError, match="in another libvirt") as caught:
        daemon.check(RackPaths(replace(shared.settings, libvirt_uri="qemu:///system"), shared.name))
    assert caught.value.hint == "unset RACKLESS_LIBVIRT_URI"


@pytest.mark.parametrize("uri", ["qemu+ssh://root@far/system", "qemu:///session", "test:///default", "xen:///system"])
def test_a_libvirt_that_will_not_do(uri: str) -> None:
    with scratch_rack() as paths, pytest.raises(RacklessError, match="blades cannot live in libvirt"):
        daemon.check(RackPaths(replace(paths.settings, libvirt_uri=uri), paths.name))


def test_data_of_a_rack_that_is_down_is_never_listed() -> None:
    with scratch_rack() as paths:
        (paths.blades / "sb0").mkdir(parents=True)
        (paths.blades / "sb0/disk.raw").write_bytes(b"precious")
        paths.ssh.mkdir()
        assert leftovers.find(paths.settings) == []


def test_a_taken_name_in_the_namespace_does_not_confuse(shared: RackPaths) -> None:
    """A process of the user's in the rack's namespace, such as a shell: the namespace is not left over."""
    server = namespace.inside(shared.name, lambda: socket.create_server(("10.78.0.254", 0)))
    with server:
        shell = subprocess.Popen(["nsenter", f"--net={namespace.NAMED / namespace.name_of(shared.name)}", "cat"],
                                 stdin=subprocess.PIPE)  # fmt: skip
        while _command(shell.pid) != b"cat\0":
            time.sleep(0.01)
        assert "namespace" not in _kinds(shared)
        shell.communicate()
    assert "namespace" in _kinds(shared)


def test_who_only_looks_starts_no_daemon() -> None:
    with scratch_rack() as paths:
        ensure_network(paths.name)
        states = Daemon.of(paths).run / "qemu"
        states.mkdir(parents=True)
        (states / "mb0.xml").touch()  # a blade that outlived its libvirtd
        with pytest.raises(RacklessError, match="does not run"), daemon.connection(paths, revive=False):
            pytest.fail("there is nothing to connect to")
        assert not any(_pids(paths).values())
        (states / "mb0.xml").unlink()
        with daemon.connection(paths, revive=False) as conn:
            assert conn is None
