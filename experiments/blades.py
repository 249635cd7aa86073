"""What experiments on running blades share: a rack of their own, and servers that live as long as they are needed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator import engine, rackfile
from orchestrator.errors import RacklessError
from orchestrator.events import Emit
from orchestrator.settings import RackPaths, Settings
from orchestrator.spec import BladeSpec
from orchestrator.ssh import client

if TYPE_CHECKING:
    from fabric import Connection


@contextmanager
def rack(rack_file: Path, name: str, emit: Emit) -> Iterator[tuple[RackPaths, dict[str, BladeSpec]]]:
    """The rack of the file under another name, up: its paths, and its blades in the file's order. Taken down after."""
    settings = Settings.from_environment()
    wanted = rackfile.load(rack_file).model_copy(update={"name": name})
    try:
        engine.up(settings, wanted, emit)
        specs = {blade: seen.spec for blade, seen in engine.observe(settings, name).items()}
        yield RackPaths(settings, name), {blade: spec for blade in wanted.blades if (spec := specs[blade]) is not None}
    finally:
        engine.down(settings, name, emit)


@contextmanager
def serving(connection: Connection, command: str, port: int | None = None, seconds: float = 60) -> Iterator[list[str]]:
    """Run `command` on a blade, from when it is ready until the end of the block; gives the lines that it prints.

    It is ready when it listens on TCP `port`, or without one when it prints the line "ready". Its standard input
    ends, and it is killed, at the end. RacklessError, with what it said, when it is not ready after `seconds`.
    """
    channel = connection.client.get_transport().open_session()
    channel.set_combine_stderr(True)
    channel.exec_command(f"echo $$; exec {command}")
    said = channel.makefile("r")
    pid = int(said.readline())
    heard: list[str] = []
    ready = threading.Event()

    def listen() -> None:
        for line in said:
            heard.append(line)
            if line == "ready\n":
                ready.set()

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        if port is None:
            up = ready.wait(seconds)
        else:
            look = f"kill -0 {pid} || exit 1; ss -Hltn sport = :{port} | grep -q . && exit; sleep 0.2"
            up = not client.run(connection, f"for i in $(seq {round(seconds * 5)}); do {look}; done; exit 1",
                                check=False).exit_code  # fmt: skip
        if not up:
            raise RacklessError(f"`{command}` did not get ready on {connection.host}: {''.join(heard).strip()[-300:]}")
        yield heard
    finally:
        client.run(connection, f"kill {pid}", check=False)
        channel.close()
        listener.join(5)
