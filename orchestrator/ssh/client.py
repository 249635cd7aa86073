"""SSH sessions of the orchestrator itself: Fabric over a socket made where the rack's network is."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Any

from orchestrator.errors import RacklessError
from orchestrator.network import place
from orchestrator.settings import RackPaths
from orchestrator.ssh.keys import known_hosts, user_key

if TYPE_CHECKING:
    from fabric import Connection
    from paramiko import Transport

SSH_PORT = 22
_NO_EXIT_CODE = -1  # Paramiko's, of a command whose channel closed first
EXIT_NO_SESSION = 255  # what ssh itself says when it cannot reach a machine

OnOutput = Callable[[str, str, str], None]
"""Told (blade, "stdout" or "stderr", text) as output comes in, from several threads."""


@dataclass(frozen=True)
class Result:
    """What a command did on a blade. Output that is not UTF-8 has its odd bytes replaced."""

    blade: str
    exit_code: int
    stdout: str
    stderr: str


@contextmanager
def connect(
    paths: RackPaths,
    blade: str,
    address: IPv4Address | str,
) -> Iterator[Connection]:
    """Yield an open fabric.Connection to a blade: it can run, put and get; its host key must be the pinned.

    `settings.ssh_seconds` holds for the TCP connection, `settings.handshake_seconds` for the banner, for the exchange
    of keys and for authentication.
    """
    from fabric import Config, Connection
    from paramiko import RejectPolicy
    from paramiko.ssh_exception import AuthenticationException, BadHostKeyException, SSHException

    timeout = paths.settings.handshake_seconds
    try:
        transport_socket = place.of(paths).connect(str(address), SSH_PORT, paths.settings.ssh_seconds)
    except OSError as error:
        raise RacklessError(
            f"{blade} does not answer on {address} port {SSH_PORT}: {error}",
            hint=f"see `rackless status` and `rackless console --log {blade}`",
        ) from error
    with closing(transport_socket):
        connection = Connection(
            blade,  # the name under which known_hosts has its key
            user="root",
            config=Config(overrides={"load_ssh_configs": False}),
            connect_timeout=timeout,
            connect_kwargs={
                "sock": transport_socket,
                "key_filename": str(user_key(paths)),
                "banner_timeout": timeout,
                "auth_timeout": timeout,
                "transport_factory": _patient_transport(timeout),
                "allow_agent": False,
                "look_for_keys": False,
            },
        )
        connection.client.load_system_host_keys(str(known_hosts(paths)))
        connection.client.set_missing_host_key_policy(RejectPolicy())
        try:
            connection.open()
        except BadHostKeyException as error:
            raise RacklessError(
                f"{blade} shows a host key that is not the one pinned for it",
                hint=f"something else answers on {address}; `rackless up` gives the blade its own key",
            ) from error
        except AuthenticationException as error:
            raise RacklessError(
                f"{blade} does not accept the rack's key {user_key(paths)}",
                hint="the blade was made with another key: run `rackless down`, then `rackless up`",
            ) from error
        except (SSHException, EOFError, OSError) as error:
            # Paramiko does not tell that the exchange of keys has taken too long: it goes on, and finds no session.
            reason = f"no handshake within {timeout:g} s" if str(error) == "No existing session" else error
            raise RacklessError(
                f"no SSH session with {blade} ({address}): {reason}",
                hint=f"see `rackless logs {blade}` and `rackless console --log {blade}`",
            ) from error
        with closing(connection):
            yield connection


def _patient_transport(seconds: float) -> Callable[..., Transport]:
    """Makes transports that give the exchange of keys so long: Paramiko's 15 s are no option of its client.

    A little longer, as it is the client's patience that can be told from other ends.
    """
    from paramiko import Transport

    def make(*arguments: Any, **options: Any) -> Transport:
        made = Transport(*arguments, **options)
        made.handshake_timeout = seconds + 5
        return made

    return make


def run(
    connection: Connection,
    command: str | Sequence[str],
    *,
    check: bool = True,
    timeout: float | None = None,
    on_output: OnOutput | None = None,
) -> Result:
    """Run a command (a shell line, or words that are quoted here) with no stdin and return its result.

    With `check`, an exit code other than 0 raises RacklessError with the end of its stderr.
    `timeout` is in seconds.
    """
    from invoke.exceptions import CommandTimedOut

    line = command if isinstance(command, str) else shlex.join(command)
    blade: str = connection.host
    late = RacklessError(f"`{line}` on {blade} was not done after {timeout} s")
    streams: dict[str, Any] = {"hide": True}
    if on_output is not None:
        streams = {
            "out_stream": _Listener(blade, "stdout", on_output),
            "err_stream": _Listener(blade, "stderr", on_output),
        }
    began = time.monotonic()
    try:
        # Fabric cannot close a command's stdin: without this, one that reads it would wait for ever.
        done = connection.run(
            f"exec < /dev/null\n{line}",
            warn=True,
            in_stream=False,
            timeout=timeout,
            encoding="utf-8",
            **streams,
        )
    except CommandTimedOut as error:
        raise late from error
    if timeout is not None and done.exited == _NO_EXIT_CODE and time.monotonic() - began >= timeout:
        raise late  # the thread that has just closed the channel for being late had not ended yet
    result = Result(blade, done.exited, done.stdout, done.stderr)
    if check and result.exit_code != 0:
        last_line = (result.stderr.strip() or result.stdout.strip() or "no output").splitlines()[-1]
        raise RacklessError(f"`{line}` on {blade} ended with exit code {result.exit_code}: {last_line}")
    return result


def run_on_all(
    paths: RackPaths,
    blades: Mapping[str, IPv4Address | str],
    command: str | Sequence[str],
    on_output: OnOutput | None = None,
) -> list[Result]:
    """Run a command on many blades at once (name -> management address); results in the order of `blades`.

    A blade that cannot be reached does not stop the others: its result has exit code 255, stderr says why.
    """

    opened: list[Connection] = []

    def one(blade: str) -> Result:
        try:
            with connect(paths, blade, blades[blade]) as connection:
                opened.append(connection)
                return run(connection, command, check=False, on_output=on_output)
        except RacklessError as error:
            if on_output is not None:
                on_output(blade, "stderr", f"{error}\n")
            return Result(blade, EXIT_NO_SESSION, "", f"{error}\n")

    with ThreadPoolExecutor(max_workers=max(1, len(blades)), thread_name_prefix="ssh") as pool:
        try:
            return list(pool.map(one, blades))
        except KeyboardInterrupt:
            for connection in opened:
                connection.close()  # ends the wait for its command, and so its thread
            raise


def worst_exit_code(results: Sequence[Result]) -> int:
    """Return the highest exit code, 0 if there are no results."""
    return max((result.exit_code for result in results), default=0)


class _Listener:
    """The file-like object that Fabric wants to write output to."""

    encoding = "utf-8"

    def __init__(self, blade: str, stream: str, on_output: OnOutput) -> None:
        self._blade, self._stream, self._on_output = blade, stream, on_output

    def write(self, text: str) -> None:
        self._on_output(self._blade, self._stream, text)

    def flush(self) -> None:
        """Nothing is held back."""
