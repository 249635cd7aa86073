"""Programs on this blade: the socket they speak to the service by, and the thread that answers each one's page faults.

A packet is a JSON object; `open` brings the memory file of the dataset, `attach` brings the program's userfaultfd. When
a connection closes, the transactions of the program are aborted and its datasets closed.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guest_agents.hotpot import userfault
from guest_agents.hotpot.cache import Cache
from guest_agents.hotpot.coordinator import new_xid
from guest_agents.hotpot.errors import BadArgument, HotpotError, NoSuchTransaction, NotMapped, VersionMismatch
from guest_agents.hotpot.messages import Message, guard
from guest_agents.hotpot.records import SETTINGS
from guest_agents.hotpot.service import Service, Transaction

MAX_PACKET = 192 << 10
log = logging.getLogger("rackless.hotpot")


class Faults:
    """Answers the page faults of one program in one dataset."""

    def __init__(self, cache: Cache, file: int, pid: int) -> None:
        self._cache, self._file, self._pid = cache, file, pid
        self._stop, self._stopper = os.pipe()
        cache.attach(file)
        self._thread = threading.Thread(target=self._run, name=f"hotpot faults {pid}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """The program has unmapped the dataset, or has ended."""
        self._cache.detach(self._file)
        os.close(self._stopper)
        self._thread.join()
        os.close(self._stop)
        os.close(self._file)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._file, select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        while True:
            ready = dict(poll.poll())
            if self._stop in ready:
                return
            while (fault := userfault.read(self._file)) is not None:
                try:
                    self._cache.answer(self._file, fault)
                except Exception as failure:
                    # As when a file under a mapping cannot be read: there is nobody to tell in another way.
                    log.error("program %d gets SIGBUS: %s", self._pid, failure)
                    with suppress(ProcessLookupError):
                        os.kill(self._pid, signal.SIGBUS)


@dataclass
class _Dataset:
    cache: Cache
    faults: Faults | None = None


@dataclass
class _Program:
    pid: int
    datasets: dict[int, _Dataset] = field(default_factory=dict)
    transactions: dict[int, Transaction] = field(default_factory=dict)


class Programs:
    """The socket at `path`.

    service -- gives the service, when the first program asks for it; what it raises is that program's answer
    """

    def __init__(self, service: Callable[[], Service], path: Path) -> None:
        path.unlink(missing_ok=True)
        self._begin = service
        self._begun: Service | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.bind(str(path))
        path.chmod(0o666)  # for all programs of the blade, as LITE
        self._socket.listen(64)

    def start(self) -> Programs:
        """Serve in threads; returns itself."""
        threading.Thread(target=self._accept, name="hotpot programs", daemon=True).start()
        return self

    def close(self) -> None:
        """Take no more programs."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                program, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(program,), name="hotpot program", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        pid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        program = _Program(pid)
        with connection:  # closed when nobody answers the program's faults any more: then its own thread does
            try:
                while True:
                    packet, files, _flags, _from = socket.recv_fds(connection, MAX_PACKET, 1)
                    if not packet:
                        return
                    offered: list[int] = []
                    reply = guard(lambda packet=packet, files=files, offered=offered:  # type: ignore[misc]
                                  self._answer(program, packet, files, offered))  # fmt: skip
                    for file in files:  # nobody wanted them
                        os.close(file)
                    socket.send_fds(connection, [json.dumps(reply).encode()], offered)
            except OSError as failure:
                log.info("program %d: %s", pid, failure)
            finally:
                self._gone(program)

    def _answer(self, program: _Program, packet: bytes, files: list[int], offered: list[int]) -> Message:
        try:
            request = json.loads(packet)
        except (ValueError, RecursionError):
            request = None
        if not isinstance(request, dict):
            raise BadArgument("a request that is no JSON object")
        op = request.get("op")
        action = getattr(self, f"_do_{op}", None) if isinstance(op, str) else None
        if action is None:
            raise BadArgument(f"unknown operation {op!r}")
        reply: Message | None = action(program, request, files, offered)
        return reply or {}

    def _gone(self, program: _Program) -> None:
        for transaction in program.transactions.values():
            with suppress(HotpotError):
                self._service.abort(transaction)
        for number in list(program.datasets):
            with suppress(HotpotError):
                self._close(program, number)

    def _close(self, program: _Program, number: int) -> None:
        dataset = program.datasets.pop(number)
        if dataset.faults is not None:
            dataset.faults.close()
        self._service.close_dataset(number)

    @property
    def _service(self) -> Service:
        if self._begun is None:
            raise BadArgument("a program says hello first")
        return self._begun

    # What programs ask for

    def _do_hello(self, program: _Program, request: Message, *_: Any) -> Message:
        if request["settings"] != SETTINGS:
            raise VersionMismatch(f"the program has {request['settings']}, the service {SETTINGS}")
        if program.pid == os.getpid():
            raise BadArgument("the process of the service itself cannot be a program of it")
        self._begun = self._begin()
        return {"name": self._service.node.name, "node_id": self._service.node.node_id}

    def _do_create(self, _program: _Program, request: Message, *_: Any) -> Message:
        wanted = {name: request[name] for name in ("name", "size", "mode", "chunk", "owners")}
        return self._service.dispatcher("create", **wanted, adapt=request.get("adapt", False))

    def _do_delete(self, _program: _Program, request: Message, *_: Any) -> None:
        self._service.dispatcher("delete", name=request["name"])

    def _do_list(self, *_: Any) -> Message:
        return self._service.dispatcher("list")

    def _do_stat(self, *_: Any) -> Message:
        return self._service.stat()

    def _do_open(self, program: _Program, request: Message, _files: list[int], offered: list[int]) -> Message:
        if any(dataset.cache.record.name == request["name"] for dataset in program.datasets.values()):
            raise BadArgument(f"this program has {request['name']!r} open already")
        cache = self._service.open(request["name"])
        program.datasets[cache.record.id] = _Dataset(cache)
        offered.append(cache.file)
        record = cache.record
        return {"id": record.id, "size": record.size, "address": record.address, "mode": record.mode}

    def _do_attach(self, program: _Program, request: Message, files: list[int], _offered: list[int]) -> None:
        dataset = self._dataset(program, request)
        if len(files) != 1 or dataset.faults is not None:
            raise BadArgument("attach brings one userfaultfd, once")
        dataset.faults = Faults(dataset.cache, files.pop(), program.pid)

    def _do_close(self, program: _Program, request: Message, *_: Any) -> None:
        number = request["dataset"]
        self._dataset(program, request)
        for xid, transaction in list(program.transactions.items()):
            if transaction.dataset == number:
                self._service.abort(program.transactions.pop(xid))
        self._close(program, number)

    def _do_begin(self, program: _Program, request: Message, *_: Any) -> Message:
        self._dataset(program, request)
        transaction = Transaction(new_xid(), request["dataset"])
        program.transactions[transaction.xid] = transaction
        return {"xid": transaction.xid}

    def _do_acquire(self, program: _Program, request: Message, *_: Any) -> None:
        self._service.acquire(self._transaction(program, request), request["areas"])

    def _do_commit(self, program: _Program, request: Message, *_: Any) -> None:
        transaction, replicas = self._transaction(program, request), _replicas(request)
        if not transaction.areas:
            raise BadArgument("the transaction has acquired nothing", hint="only what was acquired is committed")
        del program.transactions[transaction.xid]
        self._service.commit(transaction, replicas)

    def _do_abort(self, program: _Program, request: Message, *_: Any) -> None:
        transaction = self._transaction(program, request)
        del program.transactions[transaction.xid]
        self._service.abort(transaction)

    def _do_commit_areas(self, program: _Program, request: Message, *_: Any) -> None:
        self._dataset(program, request)
        self._service.commit_areas(request["dataset"], request["areas"], _replicas(request))

    def _do_discard(self, program: _Program, request: Message, *_: Any) -> None:
        self._dataset(program, request)
        self._service.discard(request["dataset"], request["areas"])

    def _do_migrate(self, program: _Program, request: Message, *_: Any) -> None:
        self._dataset(program, request)
        self._service.migrate(request["dataset"], request["at"], request["node"])

    def _dataset(self, program: _Program, request: Message) -> _Dataset:
        dataset = program.datasets.get(request["dataset"])
        if dataset is None:
            raise NotMapped("this program does not have the dataset open")
        return dataset

    def _transaction(self, program: _Program, request: Message) -> Transaction:
        transaction = program.transactions.get(request["xid"])
        if transaction is None:
            raise NoSuchTransaction
        return transaction


def _replicas(request: Message) -> int:
    replicas = request["replicas"]
    if isinstance(replicas, bool) or not isinstance(replicas, int) or replicas < 1:
        raise BadArgument(f"{replicas!r} replicas; 1 is the home alone")
    return replicas
