"""Hotpot services on stand-in blades (lite_stack.py), and programs of it, which are processes of their own."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from guest_agents import lite
from guest_agents.hotpot import media
from guest_agents.hotpot.programs import Programs
from guest_agents.hotpot.service import Service
from guest_agents.pmem import Places
from orchestrator import pmem
from orchestrator.settings import BladePaths
from tests.unit.lite_stack import stack

PROJECT = Path(__file__).parents[2]
SECONDS = 120
_PMEM = 32 << 20
_PREAMBLE = """
import sys
from guest_agents import hotpot
session = hotpot.connect()
"""


@dataclass
class Place:
    """Where programs of Hotpot can run: a socket of its service."""

    socket: Path

    def start(self, text: str, *words: Any) -> subprocess.Popen[str]:
        """A Python program on this blade; it finds `hotpot`, `session`, and the words in sys.argv."""
        return subprocess.Popen(
            [sys.executable, "-c", _PREAMBLE + text, *map(str, words)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, cwd=PROJECT, env={**os.environ, "RACKLESS_HOTPOT": str(self.socket)},
        )  # fmt: skip

    def run(self, text: str, *words: Any) -> str:
        """What such a program prints."""
        return output(self.start(text, *words))


_SERVICE = """
import sys
from pathlib import Path
from guest_agents import lite
from guest_agents.hotpot.programs import Programs
from guest_agents.hotpot.service import Service
folder = Path(sys.argv[2])
service = Service(lite.connect(sys.argv[1]), folder / "media", 1).start()
Programs(lambda: service, folder / "hotpot").start()
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def mortal(lite_socket: Path, folder: Path) -> Iterator[tuple[Place, subprocess.Popen[bytes]]]:
    """A service that can be killed, as it is a process; with the same folder it finds what it had before."""
    service = subprocess.Popen([sys.executable, "-c", _SERVICE, str(lite_socket), str(folder)], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, cwd=PROJECT)  # fmt: skip
    try:
        assert service.stdout is not None
        assert service.stdout.readline() == b"ready\n"
        yield Place(folder / "hotpot"), service
    finally:
        service.kill()
        service.wait()


@dataclass
class Blade(Place):
    """A blade with its service, and where the service's media are."""

    service: Service
    folder: Path


def output(program: subprocess.Popen[str]) -> str:
    """What it prints until it ends, which it must do well."""
    try:
        out, errors = program.communicate(timeout=SECONDS)
    finally:
        program.kill()
    assert program.returncode == 0, errors
    return out


@contextmanager
def rack(
    folder: Path, library: Path, *names: str, prepare: Callable[[Path], None] = lambda _folder: None
) -> Iterator[dict[str, Blade]]:
    """Blades by name, the first of which has the dispatcher.

    prepare -- called with each folder of media before the service starts
    """
    with stack(folder, library, *names) as sockets, ExitStack() as exits:
        blades: dict[str, Blade] = {}
        manager = 0
        for name, lite_socket in sockets.items():
            node = exits.enter_context(lite.connect(lite_socket))
            manager = manager or node.node_id
            own = folder / f"media-{name}"
            own.mkdir()
            prepare(own)
            service = Service(node, own, manager)
            exits.callback(service.close)
            service.start()
            path = folder / f"{name}.hotpot"
            programs = Programs(partial(_given, service), path).start()
            exits.callback(programs.close)
            blades[name] = Blade(path, service, own)
        yield blades


def plug(folder: Path) -> None:
    """Give a blade a device whose files are in a folder; with the power back on, it has there what was persisted."""
    files = BladePaths(folder)
    pmem.prepare(files, _PMEM)
    Places("devdax", _PMEM, str(files.pmem_vol), 0, str(files.pmem), 0).save(folder / media.DEVICE)


def _given(service: Service) -> Service:
    return service


class Shell:
    """A program that does line by line what it is told, so that several can take turns."""

    _LOOP = """
import ast, json, os
names = {"session": session, "hotpot": hotpot, "os": os}
for line in sys.stdin:
    text = json.loads(line)
    try:
        try:
            value = eval(compile(text, "<told>", "eval"), names)
        except SyntaxError:
            value = exec(compile(text, "<told>", "exec"), names)
        answer = ["value", repr(value)]
    except hotpot.HotpotError as failure:
        answer = ["error", type(failure).__name__ + ": " + str(failure)]
    except Exception as failure:
        answer = ["failed", repr(failure)]
    print(json.dumps(answer), flush=True)
"""

    def __init__(self, blade: Place) -> None:
        self.process = blade.start(self._LOOP)

    def do(self, text: str) -> Any:
        """The value of an expression, or None of statements. AssertionError if it raises."""
        kind, value = self._tell(text)
        assert kind == "value", value
        return ast.literal_eval(value)

    def refused(self, text: str) -> str:
        """Name and text of the error of Hotpot that it raises."""
        kind, value = self._tell(text)
        assert kind == "error", value
        return value

    def close(self) -> None:
        """End it."""
        if self.process.poll() is None:
            self.process.communicate(timeout=SECONDS)

    def _tell(self, text: str) -> tuple[str, str]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(text) + "\n")
        self.process.stdin.flush()
        kind, value = json.loads(self.process.stdout.readline())
        return kind, value


@contextmanager
def shells(*blades: Place) -> Iterator[list[Shell]]:
    """A shell on each of these, of which some may be the same."""
    made: list[Shell] = []
    try:
        for blade in blades:
            made.append(Shell(blade))
        yield made
        for shell in made:
            shell.close()
    finally:
        for shell in made:
            shell.process.kill()
            shell.process.wait()
