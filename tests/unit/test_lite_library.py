"""liblite, the library for C programs: all of it on all of LITE but the hardware, and answers that make no sense."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest_agents.lite.errors import ERRORS
from tests.unit.lite_stack import stack
from tests.unit.stand_in_lite import StandIn

HERE = Path(__file__).parent / "native"
LIBRARY = Path(__file__).parents[2] / "guest_agents" / "native" / "liblite"
SOURCES = [LIBRARY / name for name in ("liblite.c", "data.c", "control.c", "json.c")]
FLAGS = ["-std=gnu17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", f"-I{LIBRARY}"]
pytestmark = [pytest.mark.long, pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")]


def _build(folder: Path, source: Path, *flags: str) -> Path:
    program = folder / source.stem
    subprocess.run(["cc", *FLAGS, *flags, "-o", program, source, *SOURCES, "-lpthread"], check=True)
    return program


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build(tmp_path_factory.mktemp("lite"), LIBRARY / "example.c", "-fsanitize=address,undefined")


@pytest.fixture(scope="module")
def blades(tmp_path_factory: pytest.TempPathFactory, lite_core: Path) -> Iterator[dict[str, str]]:
    with stack(tmp_path_factory.mktemp("stack"), lite_core, "gm0", "pb0", "mb0") as sockets:
        yield sockets


@pytest.mark.parametrize("where", ["mb0", "pb0"])
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_everything(blades: dict[str, str], sanitizer: str, where: str, tmp_path: Path) -> None:
    program = _build(tmp_path, HERE / "lite_exercise.c", f"-fsanitize={sanitizer}")
    done = subprocess.run([program, where], env={**os.environ, "RACKLESS_LITE": blades["pb0"]}, capture_output=True,
                          text=True, timeout=120)  # fmt: skip
    assert (done.returncode, done.stdout) == (0, f"all of it works with {where}\n"), done.stderr
    assert "Sanitizer" not in done.stderr


def test_the_example(example: Path, tmp_path: Path) -> None:
    agent = StandIn(tmp_path / "lite.sock")
    environment = {**os.environ, "RACKLESS_LITE": str(agent.path)}
    done = subprocess.run([example], env=environment, capture_output=True, text=True, timeout=30)
    assert done.stdout == "Hello from C, by RDMA. (count was 0)\n"
    agent.close()
    lost = subprocess.run([example], env=environment, capture_output=True, text=True, timeout=30)
    assert lost.returncode == 1
    assert "join: no LITE at" in lost.stderr


@pytest.mark.parametrize(
    "answer",
    [
        b"", b"{", b"[]", b"null", b'"ok"', b'{"ok"', b'{"ok":', b'{"ok":true', b'{"ok":true}', b'{"ok":true,"token":"',
        b'{"ok":true,"token":"' + b"x" * 60_000, b'{"ok":false,"code":"x"}', b'{"ok":false,"code":99,"error":"\\u00',
        b"{" * 5000, b'{"ok":true,"a":,"token":"t"}',
        b'{"a":[[[[{"x":"]"}]]]],"ok":false,"code":-7,"error":"b\\"c"}', b"\xff\xfe\x00{",
    ],
)  # fmt: skip
def test_an_agent_that_talks_nonsense(answer: bytes, example: Path, tmp_path: Path) -> None:
    """Malformed and truncated replies to hello: an error, and no sanitizer has a word to say."""
    path = tmp_path / "lite.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(str(path))
        listening.listen()
        process = subprocess.Popen([example], env={**os.environ, "RACKLESS_LITE": str(path)}, stderr=subprocess.PIPE,
                                   stdout=subprocess.PIPE, text=True)  # fmt: skip
        with listening.accept()[0] as control:
            assert json.loads(control.recv(4096)) == {"op": "hello", "mailbox": True}
            if answer:
                control.send(answer)
            control.shutdown(socket.SHUT_WR)
            _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert errors.startswith("join: ")
    assert "Sanitizer" not in errors
    assert "runtime error" not in errors


def test_the_codes_of_the_header_are_those_of_python() -> None:
    header = (LIBRARY / "lite.h").read_text()
    codes = {name: int(code) for name, code in re.findall(r"LT_ERR_(\w+) = (-\d+)", header)}
    assert codes.pop("OTHER") == -100
    assert codes == {kind.name: code for code, kind in ERRORS.items()}


def test_every_function_of_the_header_is_in_the_library_and_visible(tmp_path: Path) -> None:
    library = tmp_path / "liblite.so"
    subprocess.run(["cc", *FLAGS, "-fPIC", "-fvisibility=hidden", "-shared", "-o", library, *SOURCES], check=True)
    listed = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    visible = {line.split()[-1] for line in listed.splitlines()}
    header = re.sub(r"/\*.*?\*/", "", (LIBRARY / "lite.h").read_text(), flags=re.S)
    assert visible == set(re.findall(r"\b(LT_[a-zA-Z_]+)\(", header))
