"""A libvirtd and a virtlogd of the rack's own, in a mount and a network namespace, with no systemd.

The daemons see private folders at libvirt's usual places (/etc, /run, /var/lib, /var/log), so the host's own
libvirt and other racks are not touched. They are entered with ``nsenter --net`` and not ``ip netns exec``,
which mounts /sys anew and so hides the cgroups. They outlive the command that started them, and the domains
outlive them.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from orchestrator.errors import RacklessError
from orchestrator.hypervisor import ends
from orchestrator.image.cache import locked
from orchestrator.network import namespace
from orchestrator.settings import PRIVATE_LIBVIRT, RackPaths
from orchestrator.templates import render

if TYPE_CHECKING:
    import libvirt

_ACCOUNT = "libvirt-qemu"
_START_SECONDS = 60.0  # the first start on a host probes every QEMU binary: 8 to 12 s
_STOP_SECONDS = 10.0


@dataclass(frozen=True)
class Daemon:
    """Files of a rack's private daemons."""

    run: Path
    lib: Path
    log: Path
    etc: Path
    cache: Path

    @classmethod
    def of(cls, paths: RackPaths) -> Daemon:
        """The daemons' files of a rack. Sockets go under the run folder: a path has at most 107 bytes."""
        own = paths.root / "libvirt"
        return cls(
            run=paths.settings.run_dir / paths.name / "libvirt",
            lib=own / "lib",
            log=own / "log",
            etc=own / "etc",
            cache=paths.settings.cache_dir / "libvirt",
        )

    @property
    def socket(self) -> Path:
        return self.run / "libvirt-sock"

    @property
    def pids(self) -> dict[str, Path]:
        return {"virtlogd": self.run / "virtlogd.pid", "libvirtd": self.run / "libvirtd.pid"}


def check(paths: RackPaths) -> None:
    """RacklessError when the rack has blades in another libvirt than that of the settings, or this one will not do.

    The latter also when it has a rack of this name already, which another RACKLESS_RUN made.
    """
    _must_be_here(paths)
    uri = paths.settings.libvirt_uri
    parts = urlsplit(uri)
    ours = parts.scheme in ("qemu", "qemu+unix") and not parts.netloc and parts.path == "/system"
    if uri != PRIVATE_LIBVIRT and not ours:
        raise RacklessError(f"blades cannot live in libvirt at {uri}: it must be this host's, and run as root",
                            hint="set RACKLESS_LIBVIRT_URI to qemu:///system, or unset it")  # fmt: skip
    if uri != PRIVATE_LIBVIRT and _home(paths) is None:
        from orchestrator.hypervisor import domain

        with closing(open_uri(uri)) as conn:
            if domain.owned(conn, paths.name):
                raise RacklessError(f"libvirt at {uri} has a rack called {paths.name}, of another RACKLESS_RUN",
                                    hint="give this one another name")  # fmt: skip


def claim(paths: RackPaths) -> None:
    """Note that the rack's blades are in the libvirt of the settings; of one of its own the folder says so."""
    if paths.settings.libvirt_uri != PRIVATE_LIBVIRT:
        _claim(paths).parent.mkdir(parents=True, exist_ok=True)
        _claim(paths).write_text(paths.settings.libvirt_uri + "\n")


def is_here(paths: RackPaths) -> bool:
    """Are the rack's blades, if it has any, in the libvirt of the settings?

    Under another RACKLESS_LIBVIRT_URI they would look gone, and `down` or `gc` take the files from under them.
    """
    return _home(paths) in (None, paths.settings.libvirt_uri)


def _must_be_here(paths: RackPaths) -> None:
    home = _home(paths)
    if home not in (None, paths.settings.libvirt_uri):
        mend = "unset RACKLESS_LIBVIRT_URI" if home == PRIVATE_LIBVIRT else f"set RACKLESS_LIBVIRT_URI={home}"
        raise RacklessError(f"rack {paths.name} is in another libvirt than RACKLESS_LIBVIRT_URI says", hint=mend)


def _home(paths: RackPaths) -> str | None:
    try:
        return _claim(paths).read_text().strip()
    except OSError:
        return PRIVATE_LIBVIRT if Daemon.of(paths).run.is_dir() else None


def _claim(paths: RackPaths) -> Path:
    return paths.settings.run_dir / paths.name / "libvirt-uri"


@contextmanager
def connection(
    paths: RackPaths, start: bool = False, revive: bool = True
) -> Iterator[libvirt.virConnect | None]:
    """A libvirt connection for the block; None when ``start`` is false and the rack has neither daemon nor blades.

    Blades outlive a libvirtd that was killed: then it is started again, and finds them. Not with ``revive`` false,
    for those who look again and again: one that looks in the middle of `down` would leave a daemon behind.
    """
    _must_be_here(paths)
    uri = paths.settings.libvirt_uri
    if uri == PRIVATE_LIBVIRT:
        daemon = Daemon.of(paths)
        blades = namespace.exists(paths.name) and any(daemon.run.glob("qemu/*.xml"))
        if not (start or blades or running(daemon.pids["libvirtd"])):
            yield None
            return
        if not revive and not _complete(daemon):
            raise RacklessError(f"libvirtd of rack {paths.name} does not run", hint="`rackless status` starts it")
        if revive:
            ensure(paths)
        uri = f"qemu:///system?socket={daemon.socket}"
    elif not start and _home(paths) is None:  # what is there under the rack's name is not ours
        yield None
        return
    with closing(open_uri(uri)) as opened:
        if start:
            claim(paths)  # only now: an address at which nobody answers must not stay
        yield opened


def open_uri(uri: str) -> libvirt.virConnect:
    """A connection to a libvirt. RacklessError when nobody answers there."""
    import libvirt

    libvirt.registerErrorHandler(lambda _context, _error: None, None)  # or libvirt prints every error by itself
    try:
        return libvirt.open(uri)
    except libvirt.libvirtError as error:
        raise RacklessError(f"cannot reach libvirt at {uri}: {error}", hint="check RACKLESS_LIBVIRT_URI") from error


def ensure(paths: RackPaths) -> None:
    """Start the rack's daemons unless they run. The rack's namespace must be there."""
    daemon = Daemon.of(paths)
    if _complete(daemon):
        return
    with locked(daemon.run.parent / "start.lock"):  # `status` may come while `up` starts them
        if not _complete(daemon):
            _start(daemon, paths)


def _complete(daemon: Daemon) -> bool:
    return all(running(file) for file in daemon.pids.values()) and daemon.socket.exists()


def _start(daemon: Daemon, paths: RackPaths) -> None:
    for folder in (daemon.run, daemon.lib, daemon.log, daemon.etc, daemon.cache):
        folder.mkdir(parents=True, exist_ok=True)
    log = daemon.log / "libvirtd.log"
    (daemon.etc / "qemu.conf").write_text(render("qemu.conf.j2"))
    (daemon.etc / "libvirtd.conf").write_text(render("libvirtd.conf.j2", log="/var/log/libvirt/libvirtd.log"))
    mounts = {"/etc/libvirt": daemon.etc, "/run/libvirt": daemon.run, "/var/lib/libvirt": daemon.lib,
              "/var/log/libvirt": daemon.log, "/var/cache/libvirt": daemon.cache}  # fmt: skip
    for place in mounts:
        Path(place).mkdir(parents=True, exist_ok=True)
    mounts |= _accounts(daemon)
    script = ["set -e", *(f"mount --bind '{source}' {place}" for place, source in mounts.items())]
    for name, pid in daemon.pids.items():
        if not running(pid):
            _wait_for_end(pid)
            script.append(f"{_program(name)} --daemon --pid-file '{pid}'")
    command = ["nsenter", f"--net={namespace.NAMED / namespace.name_of(paths.name)}",
               "unshare", "--mount", "--propagation", "private", "sh", "-c", "\n".join(script)]  # fmt: skip
    # A terminal's Ctrl-C must not reach daemons that outlive this command.
    done = subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True)
    if done.returncode:
        raise RacklessError(f"libvirtd did not start: {done.stderr.strip() or 'no output'}",
                            hint="run `rackless doctor`", log=log)  # fmt: skip
    deadline = time.monotonic() + _START_SECONDS
    while not daemon.socket.exists() or not running(daemon.pids["libvirtd"]):
        if time.monotonic() > deadline:
            raise RacklessError(f"libvirtd did not open its socket within {_START_SECONDS:.0f} s",
                                hint="run `rackless doctor`", log=log)  # fmt: skip
        time.sleep(0.02)


def stop(paths: RackPaths) -> None:
    """End the rack's daemons and remove their files. Domains that still run are not touched."""
    daemon = Daemon.of(paths)
    for pid_file in reversed(daemon.pids.values()):
        pid = running(pid_file)
        if pid is None:
            continue
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        if not ends.wait(pid, _STOP_SECONDS):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            ends.wait(pid, _STOP_SECONDS)
    for folder in (daemon.run, daemon.etc.parent):
        shutil.rmtree(folder, ignore_errors=True)


def running(pid_file: Path) -> int | None:
    """The process a pid file names if it lives and is that daemon (pids are used again), else None."""
    try:
        pid = int(pid_file.read_text())
    except (OSError, ValueError):
        return None
    return pid if _is(pid, pid_file) else None


def _is(pid: int, pid_file: Path) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return pid_file.stem.encode() in command and os.fsencode(pid_file) in command


def _wait_for_end(pid_file: Path) -> None:
    """Wait while a killed daemon is being taken apart: its command line is gone, but its pid file still locked."""
    with suppress(OSError, ValueError):
        pid = int(pid_file.read_text())
        if not Path(f"/proc/{pid}/cmdline").read_bytes():
            ends.wait(pid, _STOP_SECONDS)


def _accounts(daemon: Daemon) -> dict[str, Path]:
    """Mounts that give the daemons the accounts they were compiled to look for.

    libvirtd does not start without them, although qemu.conf names root; Debian makes them in a package that
    would also start a libvirtd of the host's.
    """
    additions = {"/etc/passwd": f"{_ACCOUNT}:x:64055:64055::/:/usr/sbin/nologin",
                 "/etc/group": f"{_ACCOUNT}:x:64055:\nkvm:x:64056:"}  # fmt: skip
    mounts = {}
    for place, lines in additions.items():
        known = Path(place).read_text()
        missing = [line for line in lines.splitlines() if f"\n{line.split(':')[0]}:" not in f"\n{known}"]
        if missing:
            mounts[place] = daemon.etc / Path(place).name
            mounts[place].write_text(known.rstrip("\n") + "\n" + "\n".join(missing) + "\n")
    return mounts


def _program(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if found is None:
        raise RacklessError(f"{name} is missing", hint="apt-get install libvirt-daemon, or run `make testbed`")
    return found
