"""The real /vnode on this host: FUSE mounts, each of a processor blade of its own, over one file service.

Mounts are served by a process of their own, because a test that waits for one of its own threads with the interpreter
locked (a page fault in a mapped file) would wait for ever. RPC is a call within that process; what a network does to
it is told on its stdin:

    down        every request is lost before it is sent
    up
    deaf OP     the next request OP is carried out, and its answer lost
    drag S      every answer takes S seconds
    restart     the service starts anew, with nothing kept open
    memory N    N memory blades live: data goes by the buffers of one of them, now this one, now that, and now by none
    counts      as JSON: what the storage blade's service, and the buffers, have done

Without a word there is one memory blade, and data goes by its buffers.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guest_agents.budget import Budget
from guest_agents.splitkernel.memory.buffers import Buffers
from guest_agents.splitkernel.process.buffers import Buffered
from guest_agents.splitkernel.process.patience import Patient
from guest_agents.splitkernel.process.vnode import Vnode
from guest_agents.splitkernel.storage.files import Files
from guest_agents.splitkernel.storage.wire import Op
from guest_agents.verbs.lost import LostError

PROJECT = Path(__file__).resolve().parents[2]
_MNT_DETACH = 2
_PR_SET_PDEATHSIG, _SIGKILL = 1, 9


def missing() -> str | None:
    """Why there can be no mount here; None if there can."""
    if os.geteuid() != 0:
        return "mounting needs root"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as failure:
        return f"no FUSE here: {failure}"
    return None


@dataclass
class Mounts:
    """Mounted, and served."""

    root: Path
    """The directory of the storage blade."""
    blades: list[Path]
    """/vnode of each processor blade."""
    process: subprocess.Popen[str]

    def tell(self, word: str) -> None:
        """Do something to the network; returns when done."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def counts(self) -> dict[str, Any]:
        """What the service and the buffers have done."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("counts\n")
        self.process.stdin.flush()
        counts = json.loads(self.process.stdout.readline())
        assert self.process.stdout.readline() == "done\n"
        return dict(counts)


@contextmanager
def mounted(folder: Path, blades: int = 1, patience: float = 60.0, top: str = "") -> Iterator[Mounts]:
    """Serve `folder`/storage at `folder`/vnode0 and so on."""
    root = folder / "storage"
    (root / top).mkdir(parents=True, exist_ok=True)
    places = [folder / f"vnode{number}" for number in range(blades)]
    libc = ctypes.CDLL(None, use_errno=True)
    words = [sys.executable, __file__, str(root), str(patience), top, *map(str, places)]
    process = subprocess.Popen(
        words, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(PROJECT)},
        preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL),
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "mounted\n"
        yield Mounts(root, places, process)
    finally:
        process.kill()
        process.wait()
        for place in places:
            libc.umount2(os.fsencode(place), _MNT_DETACH)


class Wire:
    """The network: calls the service, unless told otherwise."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = Files(root)
        self.down = False
        self.deaf: Op | None = None
        self.drag = 0.0
        self.buffers = threading.local()

    def call(
        self, opcode: int, first: bytes, second: bytes | memoryview = b"", into: Callable[..., Any] | None = None
    ) -> Any:
        if self.down:
            raise LostError("down", sent=False)
        if not hasattr(self.buffers, "out"):
            self.buffers.out = memoryview(bytearray((1 << 20) + (16 << 10)))
        out = self.buffers.out
        failure: OSError | None = None
        head = data = 0
        try:
            head, data = self.files.handle(opcode, memoryview(first), memoryview(second), out)
        except OSError as raised:
            failure = raised
        if self.drag:
            time.sleep(self.drag)
        if opcode == self.deaf:
            self.deaf = None
            raise LostError("deaf", sent=True)
        if failure is not None:
            raise failure
        return into(out[:head], out[head : head + data]) if into else None


class Memory:
    """The network to the buffers of a memory blade."""

    def __init__(self, wire: Wire) -> None:
        self.buffers = Buffers(Budget(64 << 20), lambda _storage: wire)
        self.local = threading.local()

    def call(
        self, opcode: int, first: bytes, second: bytes | memoryview = b"", into: Callable[..., Any] | None = None
    ) -> Any:
        if not hasattr(self.local, "out"):
            self.local.out = memoryview(bytearray((1 << 20) + (12 << 10)))
        out = self.local.out
        try:
            head, data = self.buffers.handle(opcode, memoryview(first), memoryview(second), out)
        except OSError as failure:
            raise RemoteError(failure.errno, "") from failure
        return into(out[:head], out[head : head + data]) if into else None


class RemoteError(OSError):
    """As rpc.RpcError."""


def _main(root: str, patience: str, top: str, *places: str) -> None:
    wire = Wire(Path(root))
    memories = {f"mb{number}": Memory(wire) for number in range(3)}
    living, turns = 1, itertools.count()

    def home(_path: str) -> tuple[str, str] | None:
        turn = next(turns) % (living + 1) if living > 1 else 0
        return ("sb0", f"mb{turn}") if turn < living else None

    for number, place in enumerate(places):
        vnode = Vnode(Patient(Buffered(wire, home, memories.__getitem__), float(patience)), f"pb{number}", top)
        threading.Thread(target=vnode.serve, args=(Path(place),), daemon=True).start()
    for place in places:
        while f" {place} fuse" not in Path("/proc/mounts").read_text():
            pass
        os.statvfs(place)  # the kernel has been answered
    print("mounted", flush=True)
    for line in sys.stdin:
        match line.split():
            case ["down"]:
                wire.down = True
            case ["up"]:
                wire.down = False
            case ["deaf", name]:
                wire.deaf = Op[name]
            case ["drag", seconds]:
                wire.drag = float(seconds)
            case ["restart"]:
                wire.files = Files(wire.root)
            case ["memory", count]:
                living = int(count)
            case ["counts"]:
                stats = [memory.buffers.stats() for memory in memories.values()]
                print(json.dumps({**wire.files.counts, "by_opcode": wire.files.tally.counts(), "buffers": stats}))
        print("done", flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
