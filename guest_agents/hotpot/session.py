"""A program's connection to Hotpot: what `hotpot.connect()` gives."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

from guest_agents import lite
from guest_agents.hotpot import mapping, userfault, watch
from guest_agents.hotpot.dataset import Dataset
from guest_agents.hotpot.errors import BadArgument, NotJoined, from_reply
from guest_agents.hotpot.records import CHUNK, SETTINGS

SOCKET = "/run/rackless/hotpot.sock"
"""Where the service listens; the environment variable RACKLESS_HOTPOT names another place."""
_MAX_PACKET = 192 << 10


class Session:
    """This process as a program of Hotpot. Threads share it, and wait for each other's requests."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._joining = threading.Lock()
        self._node: lite.Node | None = None
        try:
            self._socket.connect(path)
        except OSError as failure:
            self._socket.close()
            raise NotJoined(f"no Hotpot at {path}: {failure.strerror}") from None
        about = self.ask("hello", settings=SETTINGS)
        self.name: str = about["name"]
        """This blade's name."""
        self.node_id: int = about["node_id"]
        """This blade's number in the rack."""

    # Datasets

    def create(
        self,
        name: str,
        size: int,
        *,
        mode: str = "mrmw",
        chunk: int = CHUNK,
        owners: Sequence[int] | None = None,
        adapt: bool = False,
    ) -> Dataset:
        """Make a dataset of `size` bytes of zero and open it.

        mode -- "mrmw": many write the same pages at a time, and who commits late is told to retry; "mrsw": one writer
            for each page, from acquire to commit
        chunk -- bytes that lie together on one node, a multiple of 4096
        owners -- node ids among which the chunks go round; None: all nodes that have Hotpot
        adapt -- the chunks that one owner has move to another node when that uses them more than all others together
        DatasetExists, NoSpace, BadArgument, NodeLost.
        """
        listed = None if owners is None else list(owners)
        self.ask("create", name=name, size=size, mode=mode, chunk=chunk, owners=listed, adapt=adapt)
        return self.open(name)

    def open(self, name: str) -> Dataset:
        """Map a dataset at its address. NoSuchDataset, NodeLost, AddressTaken, NoUserfaultfd, NotJoined."""
        return Dataset(self, name)

    def delete(self, name: str) -> None:
        """Delete a dataset and all that is in it. NoSuchDataset; DatasetBusy while it is open anywhere."""
        self.ask("delete", name=name)

    def datasets(self) -> list[dict[str, Any]]:
        """All datasets: name, size, mode, chunk, address, owners and the nodes that have it open (ids)."""
        found: list[dict[str, Any]] = self.ask("list")["datasets"]
        return found

    # Between threads of all programs, on all blades: LITE's

    def lock(self, name: str) -> lite.Lock:
        """The lock called `name`, for `with`: one thread of the rack has it at a time. lite.LiteError."""
        return self._lite().lock(f"hotpot.{name}")

    def barrier(self, name: str, count: int, timeout: float | None = None) -> None:
        """Wait until `count` threads of the rack wait at `name`, at most `timeout` seconds. What lite.Node.barrier
        raises."""
        self._lite().barrier(f"hotpot.{name}", count, timeout)

    def _lite(self) -> lite.Node:
        with self._joining:
            if self._node is None:
                self._node = lite.connect()
            return self._node

    def stat(self) -> dict[str, Any]:
        """What this node counts: pages by state, commits, retries, fetches, copies."""
        return self.ask("stat")

    def close(self) -> None:
        """Leave: transactions are aborted. Close datasets first: the service is not left before the last is closed."""
        with suppress(OSError):
            self._socket.close()
        if self._node is not None:
            self._node.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # For datasets

    def attach(self, name: str) -> tuple[dict[str, Any], memoryview, int, int]:
        """Open and map: what is known of it, its bytes, its userfaultfd, and its watch.

        This process keeps its userfaultfd open too: if the service dies, faults do not find zeros, but wait for the
        watch to answer them.
        """
        watch.library()
        mapping.reserve()
        about, files = self._exchange({"op": "open", "name": name}, [])
        [file] = files
        address, size = about["address"], about["size"]
        try:
            memory = mapping.map_file(file, address, size)
        finally:
            os.close(file)
        faults = -1
        try:
            faults = userfault.open_for(address, size)
            self._exchange({"op": "attach", "dataset": about["id"]}, [faults])
            watcher = watch.start(self._socket.fileno(), faults, address, size, name)
        except BaseException:
            memory.release()
            mapping.unmap(address, size)
            if faults >= 0:
                os.close(faults)
            self.ask("close", dataset=about["id"])
            raise
        return about, memory, faults, watcher

    def detach(self, dataset: int, faults: int) -> None:
        """The dataset is not mapped any more."""
        os.close(faults)
        self.ask("close", dataset=dataset)

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """One request to the service; what it answers as an error is raised."""
        return self._exchange({"op": op, **fields}, [])[0]

    def _exchange(self, request: dict[str, Any], files: list[int]) -> tuple[dict[str, Any], list[int]]:
        if self._pid != os.getpid():
            raise NotJoined("this process was forked from the one that connected", hint="call connect() in it too")
        packet = json.dumps(request).encode()
        if len(packet) > _MAX_PACKET:
            raise BadArgument("too many ranges at once")
        try:
            with self._lock:
                socket.send_fds(self._socket, [packet], files)
                answer, got, _flags, _from = socket.recv_fds(self._socket, _MAX_PACKET, 1)
        except OSError as failure:
            raise NotJoined(f"the service has gone: {failure.strerror}") from None
        if not answer:
            raise NotJoined("the service has closed the connection")
        reply: dict[str, Any] = json.loads(answer)
        if "error" in reply:
            for file in got:
                os.close(file)
            raise from_reply(reply)
        return reply, got


def connect(path: str | None = None) -> Session:
    """Join Hotpot as this process. NotJoined when this is no blade, or its service is down; VersionMismatch.

    path -- the service's socket; None is $RACKLESS_HOTPOT or its usual place
    """
    return Session(path or os.environ.get("RACKLESS_HOTPOT", SOCKET))
