"""`split`, compiled, with a real process monitor's desk: streams, directories, vNodes, signals, errors. No VM."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.paging_stage import SPLIT
from tests.unit.split_blades import Rack, eventually

NATIVE = Path(__file__).parents[2] / "guest_agents" / "native"
pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make a mount namespace")


class Split:
    """The command on pb0 of a rack in this process."""

    def __init__(self, rack: Rack, binary: Path, vnode: Path) -> None:
        self.rack, self.binary, self.vnode = rack, binary, vnode

    def __call__(self, *words: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
        options = {"stdin": subprocess.DEVNULL, "cwd": self.vnode, **more}
        if "input" in options:
            del options["stdin"]
        return subprocess.run([self.binary, *words], capture_output=True, text=True, timeout=60, check=False, **options)

    def start(self, *words: str) -> subprocess.Popen[str]:
        command = [str(self.binary), "run", *words]
        return subprocess.Popen(command, cwd=self.vnode, stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Split]:
    folder = tmp_path_factory.mktemp("split")
    vnode = folder / "vnode"
    vnode.mkdir()
    binary = folder / "split"
    flags = ["-std=gnu17", "-O1", "-g", "-Wall", "-Wextra", "-Werror"]
    places = [f'-DMONITOR_SOCKET="{folder}/pb0.sock"', f'-DVNODE="{vnode}"']
    sources = [NATIVE / name for name in SPLIT]
    subprocess.run(["cc", *flags, *places, "-o", binary, *sources], check=True)
    sources = [NATIVE / f"{name}.c" for name in ("shim", "malloc", "mappings", "descriptors", "heap", "arena")]
    builtin = [f"-fno-builtin-{name}" for name in ("malloc", "calloc", "realloc", "free")]
    subprocess.run(["cc", *flags, *builtin, "-fPIC", "-shared", "-o", folder / "excache_shim.so", *sources], check=True)
    rack = Rack(folder, ("gm0", "pb0", "pb1", "mb0", "sb0"))
    rack.host("vnode.create", name="web", processors=["pb0"])
    rack.host("vnode.create", name="elsewhere", processors=["pb1"])
    yield Split(rack, binary, vnode)
    rack.close()


def test_a_program_runs_as_at_a_shell(split: Split, tmp_path: Path) -> None:
    done = split("run", "sh", "-c", "cat; pwd; echo $A $B; echo err >&2; exit 42", input="in\n", cwd=tmp_path,
                 env={**os.environ, "A": "inherited"})  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (42, f"in\n{tmp_path}\ninherited\n", "err\n")
    done = split("run", "--env", "A=1 2", "--env", "B=", "--", "sh", "-c", 'echo "$A" ${B-unset}.', cwd=tmp_path)
    assert done.stdout == "1 2 .\n"
    for options, copies in (((), "1\n"), (("--replicas", "2"), "2\n")):
        assert split("run", *options, "sh", "-c", "echo $RACKLESS_REPLICAS").stdout == copies
    said = 'echo $RACKLESS_WAYS $RACKLESS_POLICY $RACKLESS_VICTIM $RACKLESS_PREFETCH $RACKLESS_POOL'
    organised = ("--ways", "8", "--policy", "lru", "--victim", "16", "--prefetch", "4", "--pool", "off")
    assert split("run", *organised, "sh", "-c", said).stdout == "8 lru 16 4 off\n"
    inner = f"{split.binary} run --policy fifo sh -c '{said}'"
    assert split("run", *organised, "sh", "-c", inner).stdout == "fifo\n"  # another program, an ExCache of its own
    assert split("run", "sh", "-c", "kill -9 $$").returncode == 137


def test_the_working_directory(split: Split, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    script = tmp_path / "sub" / "app"
    script.write_text("#!/bin/sh\necho $PWD $(pwd)\n")
    script.chmod(0o755)
    where = f"{tmp_path}/sub {tmp_path}/sub\n"
    assert split("run", "--cwd", "sub", "./app", cwd=tmp_path).stdout == where
    assert split("run", "--cwd", tmp_path / "sub", "--", "./app").stdout == where
    assert split("run", "sub/app", cwd=tmp_path).stdout.split()[1] == str(tmp_path)
    done = split("run", "--cwd", "none", "true", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (125, "rackless: cannot start in none: No such file or directory\n")


@needs_root
def test_a_vnode_has_files_of_its_own(split: Split) -> None:
    (split.vnode / "all").write_text("")
    assert split("run", "--vnode", "web", "sh", "-c", "pwd; echo mine > f; ls; echo $RACKLESS_VNODE").stdout == (
        f"{split.vnode}\nf\nweb\n")  # fmt: skip
    assert (split.rack.folder / "sb0" / "web" / "f").read_text() == "mine\n"
    assert split("run", "ls").stdout == "all\n"
    assert os.listdir(split.vnode) == ["all"]
    inner = f"{split.binary} run sh -c 'ls; echo $RACKLESS_VNODE'"
    assert split("run", "--vnode", "web", "sh", "-c", inner).stdout == "f\nweb\n"  # a program's programs too


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that is linked statically, and needs no C library for that."""
    program = tmp_path_factory.mktemp("static") / "still"
    source = b"void _start(void) { for (;;) ; }"
    subprocess.run(["cc", "-static", "-nostdlib", "-x", "c", "-o", program, "-"], input=source, check=True)
    return program


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("no-such-program",), 127, "no-such-program: command not found (it must be on this blade, or in "),
        (("./none",), 127, "./none: command not found"),
        (("",), 127, "command not found"),
        (("./data",), 126, "./data: Permission denied (chmod +x makes a file executable)"),
        (("./folder",), 126, "./folder: is a directory"),
        (("./arm",), 126, "./arm: is a program for another machine (aarch64); compile it for this blade's"),
        (("./odd",), 126, "./odd: is a program for another machine (machine 4660)"),
        (("./lost",), 127, "./lost: the interpreter that it names is not on this blade"),
        (("--vnode", "wen", "true"), 125, "there is no vNode 'wen' (there are: elsewhere, web)"),
        (("--vnode", "elsewhere", "true"), 125, "pb0 is not a processor blade of vNode elsewhere (these are: pb1)"),
        (("--vnode", "a b", "true"), 2, "'a b' cannot name a vNode"),
        (("--env", "A", "true"), 2, "--env takes NAME=VALUE, not 'A'"),
        (("--excache", "16MiB", "true"), 2, "--excache takes a number of bytes, not '16MiB'"),
        (("--replicas", "3", "true"), 2, "--replicas takes 1 or 2, not '3'"),
        (("--ways", "0", "true"), 2, "--ways takes a number of lines, 1 or more, not '0'"),
        (("--ways", "-8", "true"), 2, "--ways takes a number of lines, 1 or more, not '-8'"),
        (("--prefetch", "33", "true"), 2, "--prefetch takes a number of lines, 1 to 32, not '33'"),
        (("--victim", "8k", "true"), 2, "--victim takes a number of lines, 1 or more, not '8k'"),
        (("--policy", "mru", "true"), 2, "--policy takes one of: fifo lru random; not 'mru'"),
        (("--pool", "", "true"), 2, "--pool takes one of: on off; not ''"),
        (("--tier", "disk", "true"), 2, "--tier takes one of: excache swap; not 'disk'"),
        (("--tier", "swap", "--replicas", "2", "true"), 2, "true: --replicas 2 is not to be had in the second tier"),
        (("--replicas", "2", "./still"), 2, "./still: --replicas 2 is not to be had in the second tier"),
        (("--tier", "excache", "./still"), 126, "./still: is linked statically and cannot have an ExCache"),
        (("--tier", "excache", "./scripted"), 126, "./scripted: is linked statically"),
        (("--ways", "8", "--pool", "on", "true"), 2, "--pool on and --ways exclude each other"),
        (("--excache", "4194304", "--ways", "705", "true"), 2, "--ways 705 does not fit an ExCache of 1024 lines "
         "(4 KiB each), 64 of them victims: at most 704"),
        (("--excache", "4194304", "--victim", "513", "true"), 2, "--victim 513 leaves too little of an ExCache of 1024 "
         "lines (4 KiB each): at most 512"),
        ((), 2, "no command given"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_in_a_line(
    split: Split, static: Path, tmp_path: Path, words: tuple[str, ...], code: int, said: str
) -> None:
    (tmp_path / "data").write_text("#!/bin/sh\n")
    (tmp_path / "folder").mkdir()
    elf = bytearray(Path("/bin/true").read_bytes()[:64])
    for name, machine in (("arm", 183), ("odd", 0x1234)):
        elf[18:20] = machine.to_bytes(2, "little")
        (tmp_path / name).write_bytes(elf)
    (tmp_path / "lost").write_text("#!/no/interpreter\n")
    (tmp_path / "still").write_bytes(static.read_bytes())
    (tmp_path / "scripted").write_text(f"#! {static} -x\n")
    for name in ("arm", "odd", "lost", "still", "scripted"):
        (tmp_path / name).chmod(0o755)
    done = split("run", *words, cwd=tmp_path)
    assert done.returncode == code
    assert done.stderr.startswith("rackless: ")
    assert said in done.stderr
    assert (done.stderr.count("\n"), done.stdout) == (1, "")


def test_ps_and_kill(split: Split) -> None:
    process = split.start("sh", "-c", "trap 'echo got it; exit 7' USR1; echo ready; while :; do sleep 0.05; done")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    eventually(lambda: "running" in split.rack.programs().values())
    name = next(name for name, state in split.rack.programs().items() if state == "running")
    shown = next(line for line in split("ps").stdout.splitlines() if line.startswith(f"{name} "))
    assert shown.split()[:4] == [name, "default", "running", "-"]
    assert "sh -c trap 'echo got it;" in shown
    assert split("kill", name, "USR1").returncode == 0
    assert process.wait(20) == 7
    assert process.stdout.read() == "got it\n"
    eventually(lambda: split.rack.programs()[name] == "exited")
    done = split("kill", name)
    hint = "see `rackless ps`, on a blade `split ps`"
    assert done.stderr == f"rackless: no program {name} runs on pb0 ({hint})\n"
    assert done.returncode == 1
    assert split("kill").returncode == 2


def test_when_split_is_killed_so_is_the_program(split: Split) -> None:
    process = split.start("sh", "-c", "echo $$; exec sleep 600")
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    eventually(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split())
    eventually(lambda: split.rack.programs().get(f"pb0.{pid}") == "exited")
    assert not list((split.rack.folder / "pb0.jobs").iterdir())


def test_stats_and_the_end_of_the_books(split: Split, tmp_path: Path) -> None:
    done = split("run", "--stats", "stats.json", "--excache", "1048576", "true", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert '"excache_bytes": 1048576' in (tmp_path / "stats.json").read_text()
    for number in range(40):
        assert split("run", "sh", "-c", f"exit {number}").returncode == number
    eventually(lambda: [p["exit_code"] for p in split.rack.host("program.list")["programs"]][-32:]
               == list(range(8, 40)))  # fmt: skip
