"""Python programs on blades that a test talks to line by line."""

from __future__ import annotations

import os
import select
import shlex
import subprocess
import textwrap

from tests.rack.conftest import Rack

BEGIN = """\
import os
from guest_agents import lite
say = lambda *words: print(*words, flush=True)
say(os.getpid())
node = lite.connect()
"""
running: list[Program] = []


class Program:
    """A Python program on a blade that says a line when it has got somewhere, and goes on when it is told a line.

    `source` finds `lite`, `node` and `say`. Programs that a failed test leaves are ended by `end_all`.
    """

    def __init__(self, rack: Rack, blade: str, source: str) -> None:
        command = rack.bench.command("ssh", "--rack", rack.name, blade, "--",
                                     f"exec python3 -u -c {shlex.quote(BEGIN + textwrap.dedent(source))}")  # fmt: skip
        self.rack, self.blade = rack, blade
        self.process = subprocess.Popen(command, env=rack.bench.env(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, bufsize=0)  # fmt: skip
        self._said = b""
        running.append(self)
        self.pid = int(self.hear())

    def hear(self, seconds: float = 120) -> str:
        """Its next line. If that is an exception's first, the test fails with all of it."""
        assert self.process.stdout is not None
        while b"\n" not in self._said:
            ready, _, _ = select.select([self.process.stdout], [], [], seconds)
            assert ready, f"the program on {self.blade} said nothing for {seconds:g} s, but {self._said!r}"
            said = os.read(self.process.stdout.fileno(), 1 << 16)
            if not said:
                break
            self._said += said
        line, _, self._said = self._said.partition(b"\n")
        if line.startswith(b"Traceback"):
            raise AssertionError(f"on {self.blade}: {(line + self._said + self.process.stdout.read()).decode()}")
        return line.decode().strip()

    def tell(self, line: str = "") -> None:
        """What its `input()` returns."""
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")

    def end(self) -> str:
        """The rest of what it says, when it has ended well."""
        rest, _ = self.process.communicate(timeout=120)
        running.remove(self)
        output = (self._said + rest).decode().strip()
        assert self.process.returncode == 0, output
        return output

    def kill(self) -> None:
        """On the blade, if that can be reached, and here."""
        if self.process.poll() is None:
            words = ("ssh", "--rack", self.rack.name, self.blade, "--", f"kill -9 {self.pid}")
            self.rack.bench.rackless(*words, check=False)
        self.process.kill()
        self.process.communicate()


def end_all() -> None:
    """Kill what a failed test has left running, so that the next one finds empty books."""
    while running:
        running.pop().kill()
