"""One YCSB client on a blade, of a store on Hotpot or of Redis: runs on blades, beside ycsb.py.

    python3 -m experiments.ycsb_client load hotpot --records 100
    python3 -m experiments.ycsb_client run redis:10.0.0.3:6379 --workload A --client 0 --clients 2

`run` waits until all clients are there, then prints a JSON object: operations per second, and the microseconds of each
operation by kind. Both peers' updates replace the whole record, and return when it is durable: at Hotpot's owner and
copies; at Redis in the append-only file (fsync) of the primary and, by WAIT, in the memory of its replicas.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import time
from collections import defaultdict
from typing import Any, Protocol

from experiments.ycsb import VALUE_BYTES, Operation, key_of, operations
from guest_agents import hotpot, lite
from guest_agents.hotpot.apps.store import Store

NAME = "ycsb"
MIB = 8
ATTENDANCE_SECONDS = 300.0
WAIT_SECONDS = 60
Value = bytes


class Peer(Protocol):
    """A store."""

    def get(self, key: bytes) -> bytes | None:
        """The value of a key."""

    def put(self, key: bytes, value: bytes) -> None:
        """Set it, durably."""

    def insert(self, key: bytes, value: bytes) -> None:
        """The same for a key that may be new."""

    def change(self, key: bytes, value: bytes) -> None:
        """Read it, then set it, durably."""

    def scan(self, start: bytes, count: int) -> list[tuple[bytes, bytes]]:
        """Records from a key on."""


class OnHotpot:
    """The store on Hotpot."""

    def __init__(self, replicas: int) -> None:
        self._session = hotpot.connect()
        store = Store.open(self._session, NAME, replicas=replicas)
        self.get, self.put, self.insert, self.scan = store.get, store.put, store.put, store.scan
        self._store = store

    def change(self, key: bytes, value: bytes) -> None:
        """In one transaction, so nobody's update is lost."""
        self._store.modify(key, lambda _: value)


class OnRedis:
    """Redis, by its protocol (RESP2). Keys are also in a sorted set, as YCSB's binding has them, for scans."""

    def __init__(self, host: str, port: int, replicas: int) -> None:
        self._socket = socket.create_connection((host, port), WAIT_SECONDS)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = self._socket.makefile("rb")
        self._others = replicas - 1

    def get(self, key: bytes) -> bytes | None:
        """GET."""
        [value] = self._ask([b"GET", key])
        return value if isinstance(value, bytes) else None

    def put(self, key: bytes, value: bytes) -> None:
        """SET and WAIT, sent together."""
        self._durably([b"SET", key, value])

    def insert(self, key: bytes, value: bytes) -> None:
        """SET and ZADD in a transaction, and WAIT."""
        self._durably([b"MULTI"], [b"SET", key, value], [b"ZADD", b"index", b"0", key], [b"EXEC"])

    def change(self, key: bytes, value: bytes) -> None:
        """GET, then SET: as in YCSB, another's update between them is lost."""
        self.get(key)
        self.put(key, value)

    def scan(self, start: bytes, count: int) -> list[tuple[bytes, bytes]]:
        """The keys, then their values."""
        [keys] = self._ask([b"ZRANGE", b"index", b"[" + start, b"+", b"BYLEX", b"LIMIT", b"0", b"%d" % count])
        [values] = self._ask([b"MGET", *keys])
        return list(zip(keys, values, strict=True))

    def _durably(self, *commands: list[bytes]) -> None:
        *_, done = self._ask(*commands, [b"WAIT", b"%d" % self._others, b"%d" % (WAIT_SECONDS * 1000)])
        if done < self._others:
            raise RuntimeError(f"{done} of {self._others} replicas have it after {WAIT_SECONDS} s")

    def _ask(self, *commands: list[bytes]) -> list[Any]:
        self._socket.sendall(b"".join(
            b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)
            for words in commands
        ))  # fmt: skip
        return [self._answer() for _ in commands]

    def _answer(self) -> Any:
        line = self._file.readline()
        kind, rest = line[:1], line[1:-2]
        if kind == b"+":
            return rest
        if kind == b":":
            return int(rest)
        if kind == b"$":
            return None if rest == b"-1" else self._file.read(int(rest) + 2)[:-2]
        if kind == b"*":
            return [self._answer() for _ in range(int(rest))]
        raise RuntimeError(f"Redis says {line!r}")


def peer(where: str, replicas: int) -> Peer:
    """`hotpot`, or `redis:HOST:PORT`."""
    if where == "hotpot":
        return OnHotpot(replicas)
    _, host, port = where.split(":")
    return OnRedis(host, int(port), replicas)


def load(where: str, records: int, replicas: int) -> None:
    """Make the records anew."""
    if where == "hotpot":
        with hotpot.connect() as session:
            if any(dataset["name"] == NAME for dataset in session.datasets()):
                session.delete(NAME)
            Store.create(session, NAME, MIB << 20, buckets=records // 2, replicas=replicas).close()
    to, rand = peer(where, replicas), random.Random("load")
    for number in range(records):
        to.insert(key_of(number), rand.randbytes(VALUE_BYTES))


def perform(to: Peer, operation: Operation, value: bytes) -> None:
    """One operation. RuntimeError when a record is missing."""
    what, key, length = operation
    if what == "read":
        found = to.get(key)
        if found is None or len(found) != VALUE_BYTES:
            raise RuntimeError(f"record {key!r} is missing")
    elif what == "scan":
        if not to.scan(key, length):
            raise RuntimeError(f"nothing from {key!r} on")
    else:
        {"update": to.put, "insert": to.insert, "modify": to.change}[what](key, value)


def measure(to: Peer, todo: list[Operation], rand: random.Random) -> dict[str, Any]:
    """Do them one after the other: operations per second, and each one's microseconds by kind."""
    times = defaultdict(list)
    begin = time.perf_counter()
    for operation in todo:
        before = time.perf_counter()
        perform(to, operation, rand.randbytes(VALUE_BYTES))
        times[f"{operation.what}_us"].append(round((time.perf_counter() - before) * 1e6, 1))
    return {"ops_per_s": len(todo) / (time.perf_counter() - begin), **times}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("do", choices=["load", "run"])
    parser.add_argument("what", help="`hotpot` or `redis:HOST:PORT`")
    parser.add_argument("--workload", default="A")
    parser.add_argument("--records", type=int, default=100)
    parser.add_argument("--count", type=int, default=100, help="operations of this client")
    parser.add_argument("--client", type=int, default=0)
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--replicas", type=int, default=2)
    asked = parser.parse_args()
    if asked.do == "load":
        load(asked.what, asked.records, asked.replicas)
    else:
        to = peer(asked.what, asked.replicas)
        todo = [*operations(asked.workload, asked.records, asked.count, asked.client, asked.clients)]
        with lite.connect() as node:
            node.barrier("ycsb", asked.clients, ATTENDANCE_SECONDS)
            result = measure(to, todo, random.Random(asked.client))
            node.barrier("ycsb done", asked.clients, ATTENDANCE_SECONDS)
        print(json.dumps(result))


if __name__ == "__main__":
    main()
