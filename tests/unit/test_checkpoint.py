"""Checkpoint and restart of real programs under the real shim and pager, over stand-in verbs and blades. No VM."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.unit.paging_stage import FLAGS, HERE, NATIVE, PAGER, SHIM, SPLIT, STRESS, missing
from tests.unit.split_blades import Rack, eventually

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(missing() is not None, reason=missing() or ""),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, as on a blade"),
]
WANDER = STRESS.with_name("wander.c")
SECONDS = 60


@dataclass
class Started:
    """A program that runs."""

    process: subprocess.Popen[bytes]
    stdout: Path
    stderr: Path

    def until(self, line: str) -> None:
        """Until it has printed that."""
        eventually(lambda: line + "\n" in self.stdout.read_text(), SECONDS)


class Stage:
    """`split` of a blade pb0, whose memory blades are in the programs themselves."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.vnode = folder, folder / "vnode"
        self.vnode.mkdir()
        self.split, self.wander = folder / "split", str(folder / "wander")
        places = [f'-DMONITOR_SOCKET="{folder}/pb0.sock"', f'-DVNODE="{self.vnode}"']
        builtin = [f"-fno-builtin-{name}" for name in ("malloc", "calloc", "realloc", "free")]
        shared = [*FLAGS, "-fPIC", "-shared"]
        fakes = [HERE / "fake_monitor.c", HERE / "fake_verbs.c"]
        for target, flags, sources in (
            ("split", [*FLAGS, *places], [NATIVE / name for name in SPLIT]),
            ("excache_shim.so", [*shared, *builtin], [NATIVE / name for name in SHIM]),
            ("excache_pager.so", shared, [*(NATIVE / name for name in PAGER), *fakes]),
            ("wander", ["-O2"], [WANDER]),
        ):
            subprocess.run(["cc", *flags, "-o", folder / target, *sources, "-lpthread", "-lm"], check=True)
        self.rack = Rack(folder, ("gm0", "pb0", "mb0", "sb0"))

    def __call__(self, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([self.split, *words], capture_output=True, text=True, timeout=SECONDS, cwd=self.vnode,
                              stdin=subprocess.DEVNULL)  # fmt: skip
        assert done.returncode == code, done
        return done

    def start(self, *command: str, excache: int = 4 << 20, **env: str) -> Started:
        return self.start_split("run", "--excache", str(excache), "--", *command, **env)

    def start_split(self, *words: str, **env: str) -> Started:
        files = self.folder / "stdout", self.folder / "stderr"
        with files[0].open("w") as out, files[1].open("w") as error:
            process = subprocess.Popen([self.split, *words], cwd=self.vnode, stdout=out, stderr=error,
                                       env={**os.environ, "FAKE_ALONE": "1", **env}, stdin=subprocess.DEVNULL)
        return Started(process, *files)

    def program(self) -> str:
        """The one that runs."""
        eventually(lambda: len(self.rack["pb0"].belonging.programs.running()) == 1)
        return next(iter(self.rack["pb0"].belonging.programs.running()))

    def alone(self) -> None:
        """Until the desk has heard of the end of all programs."""
        eventually(lambda: not list((self.folder / "pb0.jobs").iterdir()))


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    made = Stage(tmp_path_factory.mktemp("checkpoint"))
    yield made
    made.rack.close()


def frozen(stage: Stage, program: Started) -> str:
    """Checkpoint the one program; its name."""
    name = stage("checkpoint", stage.program()).stdout.strip()
    assert program.process.wait(SECONDS) == 75
    said = f"rackless: checkpointed as {name}: `rackless restart {name} --on BLADE` goes on with it\n"
    assert program.stderr.read_text() == said
    stage.alone()
    return name


@pytest.mark.parametrize(("mebibytes", "steps", "threads"), [(2, 600, 1), (12, 10, 1), (12, 10, 4)])
def test_a_program_goes_on(stage: Stage, mebibytes: int, steps: int, threads: int) -> None:
    """That fits its ExCache; that does not; with threads. What it prints is what it would have printed at once."""
    words = [stage.wander, str(mebibytes), str(steps), "out", str(threads)]
    whole = stage("run", "--excache", str(4 << 20), "--", *words).stdout
    program = stage.start(*words)
    program.until("step 3")
    name = frozen(stage, program)
    assert name in stage("checkpoint", "--list").stdout
    done = stage("restart", name)
    assert (program.stdout.read_text() + done.stdout, done.stderr) == (whole, "")
    assert (stage.vnode / "out").read_text() == "begin\nend\n"
    assert f"there is no checkpoint {name} (restarted already?)" in stage("restart", name, code=125).stderr


def test_a_program_goes_on_again_and_again(stage: Stage) -> None:
    """A checkpoint of what was restarted; and a process number that is another's meanwhile."""
    words = [stage.wander, "12", "14", "out", "2"]
    whole = stage("run", "--excache", str(4 << 20), "--", *words).stdout
    program = stage.start(*words)
    program.until("step 3")
    number = int(stage.program().rpartition(".")[2])
    first = frozen(stage, program)
    said = program.stdout.read_text()
    Path("/proc/sys/kernel/ns_last_pid").write_text(str(number - 1))
    with subprocess.Popen(["sleep", "60"]) as other:
        assert other.pid == number
        refused = stage("restart", first, code=125).stderr
        assert refused == "rackless: no process can be made with the number that it had: File exists\n"
        other.kill()
    again = stage.start_split("restart", first)
    again.until("step 8")
    name = stage("checkpoint", stage.program()).stdout.strip()
    assert again.process.wait(SECONDS) == 75
    stage.alone()
    done = stage("restart", name)
    assert said + again.stdout.read_text() + done.stdout == whole


READS = "import time, sys\nprint('ready', flush=True)\ntime.sleep(float(sys.argv[1]))\nprint(sum(range(9)))"


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("import socket; s = socket.socket()", "it has a socket open"),
        ("import os; p = os.pipe()", "it has a pipe that is not its standard input or output open"),
        ("import subprocess; c = subprocess.Popen(['sleep', '9'])", "it has a child, process "),
        ("f = open(sys.argv[2] + '/w', 'w')", "which is on this blade only (files under "),
        ("f = open(sys.argv[2] + '/r', 'w+'); import os; os.unlink(f.name)", "it has a file open that has been remov"),
        ("import os; f = os.open('.', 0)", "it has a folder open"),
        ("f = open('locked', 'w'); import fcntl; fcntl.flock(f, 2)", "it holds a lock on "),
        ("import mmap; m = mmap.mmap(-1, 4096)", "it has shared memory, or a removed file, mapped"),
        ("import select; e = select.epoll()", "it has an epoll set open"),
        ("import os; os.setuid(65534)", "it does not run as root"),
        ("block = [bytearray(4096) for i in range(3000)]; import os; p = os.pipe()", "it has a pipe that is not its"),
    ],
)
def test_what_cannot_be_checkpointed_goes_on_unharmed(stage: Stage, before: str, said: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    program = stage.start("python3", "-c", f"import sys\n{before}\n{READS}", "1.5", str(tmp_path))
    program.until("ready")
    name = stage.program()
    error = stage("checkpoint", name, code=1).stderr
    assert error.startswith(f"rackless: {name} cannot be checkpointed: ")
    assert error.count("\n") == 1
    assert said in error
    assert program.process.wait(SECONDS) == 0
    assert (program.stdout.read_text(), program.stderr.read_text()) == ("ready\n36\n", "")
    assert stage("checkpoint", "--list").stdout.count("\n") == 1
    stage.alone()


def test_memory_blades_that_do_not_keep_its_memory(stage: Stage) -> None:
    words = [stage.wander, "12", "8", "out"]
    whole = stage("run", "--excache", str(4 << 20), "--", *words).stdout
    program = stage.start(*words, FAKE_FORGETFUL="1")
    program.until("step 2")
    refused = stage("checkpoint", stage.program(), code=1).stderr
    assert "the memory blades do not keep its memory: mb0 is not there" in refused
    assert program.process.wait(SECONDS) == 0
    assert (program.stdout.read_text(), program.stderr.read_text()) == (whole, "")
    assert os.listdir(stage.vnode / ".checkpoints") == []
    stage.alone()


def test_checkpoints_that_do_not_fit_are_kept(stage: Stage, tmp_path: Path) -> None:
    """A file that is another one now; more memory than there is; a bad image; one that is given up."""
    data = tmp_path / "data"
    data.write_text("a\nb\n")
    code = ("f = open('/dev/null'); import sys, time; g = open(sys.argv[1]); g.readline(1)\n"
            "print('ready'); time.sleep(0.5); print(g.read())")  # fmt: skip
    program = stage.start("python3", "-uc", code, str(data))
    program.until("ready")
    name = frozen(stage, program)
    data.write_text("a\nc\n")
    refused = f"rackless: {name} cannot go on here: {data} is not what it was when the checkpoint was made\n"
    assert stage("restart", name, code=125).stderr == refused
    data.write_text("a\nb\n")
    assert stage("restart", name).stdout == "\nb\n\n"
    program = stage.start("python3", "-uc", "import time; print('ready'); time.sleep(60)", excache=1 << 45)
    program.until("ready")
    name = frozen(stage, program)
    assert f"{name} cannot go on here: it needs 3355443" in stage("restart", name, code=125).stderr
    assert name in stage("checkpoint", "--list").stdout
    assert stage("checkpoint", "--discard", name).stdout == ""
    assert "there is no checkpoint" in stage("restart", name, code=125).stderr
    assert "there is no checkpoint" in stage("checkpoint", "--discard", name, code=1).stderr
    (stage.vnode / ".checkpoints" / "bad").write_bytes(b"x" * 100)
    assert "checkpoint bad cannot be read" in stage("restart", "bad", code=125).stderr
    (stage.vnode / ".checkpoints" / "bad").unlink()
    assert "cannot be a checkpoint" in stage("restart", "../bad", code=2).stderr


def test_a_restart_that_does_not_begin_leaves_the_checkpoint(stage: Stage) -> None:
    """The process monitor is not there; or `split restart` was killed, and all one can do is to forget it."""
    program = stage.start("python3", "-uc", "import time; print('ready'); time.sleep(60)")
    program.until("ready")
    name = frozen(stage, program)
    desk, away = stage.folder / "pb0.sock", stage.folder / "away.sock"
    desk.rename(away)
    assert "no process monitor" in stage("restart", name, code=125).stderr
    away.rename(desk)
    (listed,) = [line for line in stage("checkpoint", "--list").stdout.splitlines() if line.startswith(name)]
    assert not listed.endswith("(being restarted)")
    image = stage.vnode / ".checkpoints" / name
    image.rename(f"{image}.taken")
    assert f"{listed} (being restarted)\n" in stage("checkpoint", "--list").stdout
    assert f"checkpoint {name} is being restarted" in stage("restart", name, code=125).stderr
    assert stage("checkpoint", "--discard", name).stdout == ""
    assert not os.listdir(image.parent)


def test_a_stopped_program_stays_stopped(stage: Stage) -> None:
    program = stage.start("python3", "-c", READS, "0.5")
    program.until("ready")
    name = stage.program()
    number = int(name.rpartition(".")[2])

    def state() -> str:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]

    os.kill(number, signal.SIGSTOP)
    eventually(lambda: state() == "T")
    assert "it is stopped: `split kill ID CONT` lets it go on" in stage("checkpoint", name, code=1).stderr
    eventually(lambda: state() == "T")
    os.kill(number, signal.SIGCONT)
    program.process.send_signal(signal.SIGCONT)
    assert program.process.wait(SECONDS) == 0
    assert program.stdout.read_text() == "ready\n36\n"
    stage.alone()


def test_signals_that_come_meanwhile_are_not_lost(stage: Stage) -> None:
    """Each that came leaves a byte; the checkpoint is refused at its very end."""
    code = ("import os, signal, sys, time\nblock = [bytearray(4096) for i in range(3000)]\n"
            "heard = os.open('heard', os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK)\n"
            "signal.signal(40, lambda *_: None)\nsignal.signal(15, lambda *_: sys.exit(7))\n"
            "signal.set_wakeup_fd(heard)\nprint('ready')\nwhile True: time.sleep(0.01)")  # fmt: skip
    program = stage.start("python3", "-uc", code, FAKE_FORGETFUL="1")
    program.until("ready")
    name = stage.program()
    sent = 0
    with subprocess.Popen([stage.split, "checkpoint", name], stderr=subprocess.PIPE, text=True) as asked:
        while asked.poll() is None:
            os.kill(int(name.rpartition(".")[2]), 40)
            sent += 1
            time.sleep(0.001)
        assert asked.stderr is not None
        assert "the memory blades do not keep its memory" in asked.stderr.read()
    heard = stage.vnode / "heard"
    with suppress(AssertionError):  # the comparison says more
        eventually(lambda: heard.read_bytes().count(40) == sent)
    assert heard.read_bytes().count(40) == sent
    stage("kill", name, "TERM")
    assert program.process.wait(SECONDS) == 7
    stage.alone()


def test_unknown_programs(stage: Stage) -> None:
    assert "no program pb0.1 runs on pb0" in stage("checkpoint", "pb0.1", code=1).stderr
    assert "takes the ID of a program" in stage("checkpoint", "", code=2).stderr


def test_a_restarted_program_gets_signals(stage: Stage) -> None:
    program = stage.start("python3", "-uc", "import time; print('ready'); time.sleep(60)")
    program.until("ready")
    name = frozen(stage, program)
    again = stage.start_split("restart", name)
    stage("kill", stage.program(), "TERM")
    assert again.process.wait(SECONDS) == 128 + signal.SIGTERM
    stage.alone()


def test_a_program_goes_on_where_it_was(stage: Stage) -> None:
    """At once, on the same blade: its end is in the books when its checkpoint is there."""
    program = stage.start("python3", "-uc", "import time; print('ready'); time.sleep(1); print('well')")
    program.until("ready")
    name = stage("checkpoint", stage.program()).stdout.strip()
    assert os.stat(stage.vnode / ".checkpoints" / name).st_mode & 0o777 == 0o600
    assert stage("restart", name).stdout == "well\n"
    assert program.process.wait(SECONDS) == 75
    stage.alone()


def test_a_timer_whose_signal_waits_goes_on(stage: Stage) -> None:
    """The kernel begins a timer's next interval when the last signal is taken: here after the restart."""
    code = ("import signal, time\nn = []\nsignal.signal(14, lambda *_: n.append(1))\nsignal.pthread_sigmask(0, {14})\n"
            "signal.setitimer(0, 0.02, 0.02)\ntime.sleep(0.1)\nprint('ready')\ntime.sleep(1)\n"
            "signal.pthread_sigmask(1, {14})\nwhile len(n) < 3:\n    time.sleep(0.01)\n"
            "signal.setitimer(0, 0)\nprint('ticks')")  # fmt: skip
    program = stage.start("python3", "-uc", code)
    program.until("ready")
    name = frozen(stage, program)
    assert stage("restart", name).stdout == "ticks\n"
