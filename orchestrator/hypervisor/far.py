"""Another host: how it is reached, and one `rackless on-host` there that does what is asked (see deeds.py).

What its URI says decides how commands get there: by ssh, or, when its libvirt has a socket on this machine, into the
network and the mounts of the process that has it.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import struct
import subprocess
import tempfile
import threading
from collections.abc import Collection, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as LateError
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from orchestrator import __version__, guests
from orchestrator.errors import RacklessError
from orchestrator.hypervisor import daemon
from orchestrator.model import Host
from orchestrator.settings import RackPaths

if TYPE_CHECKING:
    import libvirt

REACH_SECONDS = 20.0
"""For a host to say hello: ssh has half of it to connect."""
_ANSWER_SECONDS = 600.0  # a guard against a host that vanished, not a measure: deeds have deadlines of their own

_COPY = """
umask 077
fresh=$0.$$
trap 'rm -f "$fresh"' EXIT
mkdir -p "$1" && cat > "$fresh" && [ "$(stat -c %s "$fresh")" = "$2" ] && mv "$fresh" "$0"
"""  # $0: the file, $1: its folder, $2: its size


@dataclass(frozen=True)
class Far:
    """Another host that was reached."""

    name: str
    host: Host
    conn: libvirt.virConnect
    worker: Worker

    def do(self, deed: str, **fields: Any) -> Any:
        """What a deed of deeds.py returns there. RacklessError says what was wrong, and where."""
        return self.worker.ask(deed, fields)

    @cached_property
    def hello(self) -> dict[str, Any]:
        """See deeds.hello."""
        told: dict[str, Any] = self.do("hello")
        return told

    def supply(self, folders: Collection[Path]) -> None:
        """Copy entries of the cache there, as far as they are not there.

        A file gets its name when it is whole: another `rackless` may copy it, too, and a connection may end.
        """
        files = {str(file): file.stat().st_size for folder in folders for file in folder.iterdir() if file.is_file()}
        for path in self.do("missing", files=files):
            words = ["sh", "-c", _COPY, path, os.path.dirname(path), str(files[path])]
            with open(path, "rb") as file:
                done = subprocess.run(command(self.name, self.host, words), stdin=file, capture_output=True, text=True,
                                      check=False)  # fmt: skip
            if done.returncode:
                raise RacklessError(f"cannot copy {path} to host {self.name}: {_last(done.stderr)}",
                                    hint="is its disk full?")  # fmt: skip


@contextmanager
def reached(name: str, host: Host, worker: Worker) -> Iterator[Far]:
    """A host for the block. RacklessError when it cannot be reached, or has not what it takes."""
    assert host.uri is not None
    version = worker.ask("hello", {}, REACH_SECONDS)["rackless"]
    if version != __version__:
        raise RacklessError(f"host {name} has Rackless {version}, and this machine {__version__}",
                            hint="install the same version on both")  # fmt: skip
    try:
        opened = daemon.open_uri(host.uri)
    except RacklessError as error:
        raise RacklessError(f"host {name} cannot be reached: {error.message}",
                            hint=f"does `virsh -c '{host.uri}' list` work?") from error  # fmt: skip
    with closing(opened) as conn:
        yield Far(name, host, conn, worker)


def command(name: str, host: Host, words: list[str]) -> list[str]:
    """The words that run a command on a host. RacklessError when nobody is at its socket."""
    parts = urlsplit(host.uri or "")
    options = {key: values[0] for key, values in parse_qs(parts.query).items()}
    if not by_ssh(host):
        pid = _at_socket(name, options["socket"])
        return ["nsenter", "--target", str(pid), "--net", "--mount", "--", *words]
    ssh = [options.get("command", "ssh"), "-T", "-e", "none", "-o", "BatchMode=yes",
           "-o", f"ConnectTimeout={REACH_SECONDS / 2:.0f}",
           # A host that loses power says nothing: it is gone after 20 s.
           "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=4"]  # fmt: skip
    if "keyfile" in options:
        ssh += ["-i", options["keyfile"]]
    if parts.port:
        ssh += ["-p", str(parts.port)]
    who = f"{parts.username}@{parts.hostname}" if parts.username else str(parts.hostname)
    return [*ssh, "--", who, shlex.join(words)]


def by_ssh(host: Host) -> bool:
    """Else it is a namespace of this machine."""
    return urlsplit(host.uri or "").scheme == "qemu+ssh"


class Worker:
    """A `rackless on-host` that runs on another host until this is closed. Many threads may ask at once."""

    def __init__(self, paths: RackPaths, name: str, host: Host) -> None:
        self._name = name
        self._complaints: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - until `close`
        self._lock = threading.Lock()
        self._waiting: dict[int, Future[dict[str, Any]]] = {}
        self._numbers = count()
        self._ended = False
        words = command(name, host, [host.rackless, "on-host"])
        try:
            # A session of its own: Ctrl-C in the terminal is for us, who then end it in order.
            self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                             stderr=self._complaints, start_new_session=True)  # fmt: skip
        except OSError as error:
            self._complaints.close()
            raise RacklessError(f"host {name} cannot be reached: {words[0]}: {error.strerror}") from error
        threading.Thread(target=self._read, name=f"host-{name}", daemon=True).start()
        folders = {key: str(getattr(paths.settings, key)) for key in ("cache_dir", "state_dir", "run_dir")}
        home = guests.identity(paths) if by_ssh(host) else None
        self._send({"rack": paths.name, "home": home, **folders})

    def ask(self, deed: str, fields: dict[str, Any], seconds: float = _ANSWER_SECONDS) -> Any:
        """The result of a deed there. RacklessError when it is refused, or the host is silent or gone."""
        reply: Future[dict[str, Any]] = Future()
        with self._lock:
            number = next(self._numbers)
            self._waiting[number] = reply
            ended = self._ended
        if ended:
            raise self._gone()
        self._send({"id": number, "deed": deed, "fields": fields})
        try:
            told = reply.result(seconds)
        except LateError:
            raise RacklessError(f"host {self._name} cannot be reached: no answer within {seconds:.0f} s") from None
        if "error" in told:
            raise RacklessError(f"{told['error']} (on host {self._name})", hint=told["hint"])
        return told["result"]

    def close(self) -> None:
        """End it. What it is at is left undone."""
        with suppress(OSError):
            assert self._process.stdin
            self._process.stdin.close()
        self._process.terminate()
        self._process.wait()
        self._complaints.close()

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin
        try:
            with self._lock:
                self._process.stdin.write(json.dumps(message) + "\n")
                self._process.stdin.flush()
        except OSError:
            self._process.wait()
            raise self._gone() from None

    def _read(self) -> None:
        """Give replies to those who wait, until there are no more; then nobody needs to wait."""
        assert self._process.stdout
        for line in self._process.stdout:
            with suppress(ValueError, KeyError, TypeError):  # a shell there may greet
                reply = json.loads(line)
                with self._lock:
                    asked = self._waiting.pop(reply["id"])
                asked.set_result(reply)
        self._process.wait()
        with self._lock:
            self._ended = True
            left = list(self._waiting.values())
        for one in left:
            one.set_exception(self._gone())

    def _gone(self) -> RacklessError:
        with suppress(ValueError):  # it is closed
            self._complaints.seek(0)
            said = _last(self._complaints.read().decode(errors="replace"))
            return RacklessError(f"host {self._name} cannot be reached: {said}",
                                 hint=f"docs/hosts.md says what it needs. {_gone_for_good(self._name)}")  # fmt: skip
        return RacklessError(f"host {self._name} was let go of")


def _at_socket(name: str, path: str) -> int:
    """The process that listens at a Unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError as error:
            raise RacklessError(f"host {name} cannot be reached: nobody answers at {path}: {error.strerror}",
                                hint=f"is its libvirtd running? {_gone_for_good(name)}") from error  # fmt: skip
        pid, _, _ = struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return int(pid)


def _gone_for_good(name: str) -> str:
    return f"`rackless down --without {name}` if it is gone for good"


def _last(text: str) -> str:
    return (text.strip() or "it says nothing").splitlines()[-1].strip()
