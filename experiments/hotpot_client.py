"""What single operations of Hotpot cost, measured by a program on a blade; and PageRank on it and on plain sockets.

    python3 -m experiments.hotpot_client commits mrmw --owners 2,3,4 --count 20
    python3 -m experiments.hotpot_client fetch --owners 3 --count 50
    python3 -m experiments.hotpot_client rate mrmw --owners 2,3,4 --client 0 --clients 2 --count 50
    python3 -m experiments.hotpot_client pagerank --client 0 --clients 2 [--peers 10.0.0.2,10.0.0.3]

Each prints a JSON object: microseconds of every operation by what was done, or a rate. With --peers, PageRank's parts
send each other what vertices give over TCP (the array code is the same); without, it lies in a dataset.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy

from guest_agents import hotpot, lite
from guest_agents.hotpot.apps.pagerank import DAMPING, Graph, kronecker

PAGE = 4096
CHUNK = 64 << 10
SIZES = (512, 1024, 4096, 16384, 65536)
RANGES = (1, 2, 4, 8)
COPIES = (1, 2, 3, 4)
WARM = 3
"""Rounds before what counts: pages are fetched, and copies made, for the first time."""
SCALE = 10
ROUNDS = 5
PORT = 7790
SECONDS = 300.0
Areas = list[tuple[int, int]]
Times = dict[str, list[float]]


def points(owners: int) -> dict[str, tuple[Areas, int]]:
    """What is committed: ranges in chunk-wide rows of a dataset (each point has its own row), and copies."""
    wanted: dict[str, tuple[Areas, int]] = {}
    wanted |= {f"size_{size}": ([(0, size)], 1) for size in SIZES}
    wanted |= {f"ranges_{n}": ([(PAGE * i, 512) for i in range(n)], 1) for n in RANGES}
    wanted |= {f"owners_{n}": ([(CHUNK * i, 1024) for i in range(n)], 1) for n in range(1, owners + 1)}
    wanted |= {f"copies_{n}": ([(0, 1024)], n) for n in COPIES}
    row = owners * CHUNK
    return {name: ([(number * row + at, length) for at, length in areas], copies)
            for number, (name, (areas, copies)) in enumerate(wanted.items())}  # fmt: skip


def commits(mode: str, owners: list[int], count: int) -> Times:
    """Microseconds of commits by size, ranges, owners and copies, in turn; on other nodes' pages."""
    times: Times = defaultdict(list)
    every = points(len(owners))
    name = f"commits {mode}"
    with hotpot.connect() as session:
        size = len(every) * len(owners) * CHUNK
        with session.create(name, size, mode=mode, chunk=CHUNK, owners=owners) as dataset:
            for turn in range(count + WARM):
                for point, (areas, copies) in every.items():
                    transaction = dataset.transaction(copies)
                    for view in transaction.acquire_all(*areas):
                        view[:] = random.randbytes(len(view))
                        view.release()
                    before = time.perf_counter()
                    transaction.commit()
                    if turn >= WARM:
                        times[point].append(_since(before))
        session.delete(name)
    return times


def fetch(owner: int, name: str, count: int) -> Times:
    """Microseconds of the first load from a page, and of LITE's read of as much, of the same node in turn."""
    times: Times = {"fetch": [], "lite_read": []}
    with hotpot.connect() as session, lite.connect() as node:
        size = (count + WARM) * PAGE
        with session.create("fetch", size, owners=[owner]) as dataset, node.malloc(size, on=name) as memory:
            for page in range(count + WARM):
                before = time.perf_counter()
                dataset.memory[page * PAGE]
                between = time.perf_counter()
                memory.read(PAGE, page * PAGE)
                after = time.perf_counter()
                if page >= WARM:
                    times["fetch"].append(round((between - before) * 1e6, 1))
                    times["lite_read"].append(round((after - between) * 1e6, 1))
        session.delete("fetch")
    return times


def rate(mode: str, owners: list[int], count: int, client: int, clients: int) -> dict[str, float]:
    """Commits per second of this client: 1 KiB of a page of its own, of all owners in turn."""
    name = f"rate {mode} {clients}"
    with hotpot.connect() as session, lite.connect() as node:
        if client == 0:
            size = CHUNK * len(owners) * clients
            session.create(name, size, mode=mode, chunk=CHUNK, owners=owners).close()
        node.barrier(f"{name} made", clients, SECONDS)
        with session.open(name) as dataset:
            pages = [CHUNK * (client * len(owners) + owner) for owner in range(len(owners))]

            def commit(number: int) -> None:
                with dataset.transaction() as transaction:
                    transaction.acquire(pages[number % len(pages)], 1024)[:] = random.randbytes(1024)

            for number in range(len(pages)):
                commit(number)
            node.barrier(f"{name} begins", clients, SECONDS)
            before = time.perf_counter()
            for number in range(count):
                commit(number)
            seconds = time.perf_counter() - before
        node.barrier(f"{name} ends", clients, SECONDS)
        if client == 0:
            session.delete(name)
    return {"per_s": count / seconds}


class Sockets:
    """One TCP connection between every two parts."""

    def __init__(self, me: int, peers: list[str]) -> None:
        self._others: list[socket.socket] = []
        with socket.create_server(("", PORT + me), backlog=len(peers)) as server:
            for part in range(me):
                self._others.append(_connected(peers[part], PORT + part))
            for _ in range(me + 1, len(peers)):
                self._others.append(server.accept()[0])
        for other in self._others:
            other.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def swap(self, mine: bytes, sizes: dict[int, int], me: int) -> list[bytes]:
        """What every part has, in order; `sizes` in bytes."""
        for other in self._others:
            other.sendall(me.to_bytes(4, "little") + mine)
        found = {me: mine}
        for other in self._others:
            part = int.from_bytes(_exactly(other, 4), "little")
            found[part] = _exactly(other, sizes[part])
        return [found[part] for part in sorted(found)]


def pagerank_on_sockets(part: int, peers: list[str]) -> dict[str, float]:
    """Microseconds of a round; the same arrays as Graph.rank's, sent to all other parts."""
    parts, vertices = len(peers), 1 << SCALE
    edges = kronecker(SCALE, 1)
    edges = edges[numpy.argsort(edges[:, 1], kind="stable")]
    cuts = [0, *(int(edges[len(edges) * p // parts, 1]) for p in range(1, parts)), vertices]
    low, high = cuts[part : part + 2]
    first, last = (int(cut) for cut in numpy.searchsorted(edges[:, 1], [low, high]))
    degrees = numpy.bincount(edges[:, 0], minlength=vertices)[low:high]
    sources, targets, ends = edges[first:last, 0], edges[first:last, 1] - numpy.uint32(low), degrees == 0
    others = Sockets(part, peers)
    sizes = {p: 8 * (cuts[p + 1] - cuts[p] + 1) for p in range(parts)}

    def run() -> Any:
        ranks: Any = numpy.full(high - low, 1 / vertices)
        given = numpy.zeros(0)
        lost = 0.0
        for turn in range(ROUNDS + 1):
            if turn:
                sums = numpy.bincount(targets, weights=given[sources], minlength=high - low)
                ranks = (1 - DAMPING) / vertices + DAMPING * (sums + lost)
            mine = numpy.append(ranks / numpy.maximum(degrees, 1), ranks[ends].sum()).tobytes()
            all_of_them = [numpy.frombuffer(raw) for raw in others.swap(mine, sizes, part)]
            given = numpy.concatenate([raw[:-1] for raw in all_of_them])
            lost = sum(float(raw[-1]) for raw in all_of_them) / vertices
        return ranks

    return _timed_twice(run)


def pagerank_on_hotpot(part: int, parts: int) -> dict[str, float]:
    """Microseconds of a round."""
    with hotpot.connect() as session, lite.connect() as node:
        if part == 0:
            Graph.make(session, "ranked", kronecker(SCALE, 1), 1 << SCALE, parts)
        node.barrier("ranked made", parts, SECONDS)
        with ExitStack() as opened:
            graph = Graph(*(opened.enter_context(session.open(name)) for name in ("ranked", "ranked.values")))
            low, high = graph.first_vertex[part : part + 2]

            def run() -> Any:
                graph.rank(node, part, ROUNDS)
                return graph.ranks()[low:high]

            result = _timed_twice(run)
        node.barrier("ranked closed", parts, SECONDS)
        if part == 0:
            for name in ("ranked", "ranked.values"):
                session.delete(name)
    return result


def _timed_twice(run: Callable[[], Any]) -> dict[str, float]:
    """The first time everything is fetched or connected; the second one counts. And the greatest rank of the part."""
    run()
    before = time.perf_counter()
    ranks = run()
    return {"round_us": _since(before) / (ROUNDS + 1), "most": float(ranks.max())}


def _since(before: float) -> float:
    return round((time.perf_counter() - before) * 1e6, 1)


def _connected(host: str, port: int) -> socket.socket:
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            return socket.create_connection((host, port), SECONDS)
        except ConnectionRefusedError:  # that part begins a moment later
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _exactly(source: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        more = source.recv(length - len(data))
        if not more:
            raise ConnectionError("another part has gone")
        data += more
    return bytes(data)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("do", choices=["commits", "fetch", "rate", "pagerank"])
    parser.add_argument("mode", nargs="?", default="mrmw", help="of the dataset")
    parser.add_argument("--owners", default="1", help="node ids")
    parser.add_argument("--name", default="", help="fetch: the owner's name")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--client", type=int, default=0)
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--peers", default="", help="pagerank on sockets: addresses of all parts")
    asked = parser.parse_args()
    owners = [int(owner) for owner in asked.owners.split(",")]
    result: Any
    if asked.do == "commits":
        result = commits(asked.mode, owners, asked.count)
    elif asked.do == "fetch":
        result = fetch(owners[0], asked.name, asked.count)
    elif asked.do == "rate":
        result = rate(asked.mode, owners, asked.count, asked.client, asked.clients)
    elif asked.peers:
        result = pagerank_on_sockets(asked.client, asked.peers.split(","))
    else:
        result = pagerank_on_hotpot(asked.client, asked.clients)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
