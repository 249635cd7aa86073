"""LITE-MR: count words with the processors and the memory of many blades.

    python3 -m guest_agents.lite.apps.mapreduce work --port 1                      # on each processor blade
    python3 -m guest_agents.lite.apps.mapreduce count english.txt --workers pb0,pb1 --text-on mb0,mb1 --port 1

The text goes into one LMR, spread over memory blades. Workers are asked by RPC to map chunks of it: each reads its
chunk (LT_read), counts, and leaves the counts, ordered by reducer, in an LMR of its own. Then they are asked to reduce:
each reads its part of every map's output straight from the memory where it lies. Only names and offsets go through
the master. The counts are written to standard output, a line "WORD COUNT" each, most frequent first.
"""

from __future__ import annotations

import argparse
import json
import queue
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from guest_agents import lite

Task = dict[str, Any]
CHUNK = 256 << 10
SECONDS = 600.0  # a task may take long on an emulated blade


class Worker:
    """Serves map and reduce tasks; keeps its outputs until the job is over."""

    def __init__(self, node: lite.Node) -> None:
        self.node = node
        self.outputs: dict[str, list[lite.Lmr]] = {}
        self.jobs_done = 0

    def serve(self, port: lite.Port, jobs: int | None) -> None:
        """Do what is asked; leave after so many jobs (None: never)."""
        request = port.receive()
        while True:
            answer = self.answer(json.loads(request.data))
            if self.jobs_done == jobs:
                request.reply(answer)
                return
            request = request.reply_and_receive(answer)

    def answer(self, task: Task) -> bytes:
        """A task is {"do": "map" | "reduce" | "forget", "job": ..., ...}; its answer is JSON too."""
        does: dict[str, Callable[[Task], Any]] = {"map": self.map, "reduce": self.reduce, "forget": self.forget}
        return json.dumps(does[task["do"]](task)).encode()

    def map(self, task: Task) -> Task:
        """Count the words of a chunk; {"name", "parts": [[offset, length], ...]}, one part for each reducer."""
        with self.node.map(task["text"], lite.Permission.READ) as text:
            counts = Counter(text.read(task["length"], at=task["start"]).split())
        parts: list[Counter[bytes]] = [Counter() for _ in range(task["reducers"])]
        for word, count in counts.items():
            parts[zlib.crc32(word) % len(parts)][word] = count
        return self._leave(task["job"], f"{task['job']}.map{task['start']}", [_pack(part) for part in parts])

    def reduce(self, task: Task) -> Task:
        """Add up one part of every map's output; the answer is as that of `map`, with one part."""
        total: Counter[bytes] = Counter()
        for name, offset, length in task["inputs"]:
            with self.node.map(name, lite.Permission.READ) as output:
                total.update(_unpack(output.read(length, at=offset)))
        return self._leave(task["job"], f"{task['job']}.reduce{task['part']}", [_pack(total)])

    def forget(self, task: Task) -> None:
        """The job is over: free its memory here."""
        for output in self.outputs.pop(task["job"], []):
            output.unmap()
        self.jobs_done += 1

    def _leave(self, job: str, name: str, parts: Sequence[bytes]) -> Task:
        data = b"".join(parts)
        output = self.node.malloc(max(1, len(data)), name=name)
        output.write(data)
        self.outputs.setdefault(job, []).append(output)
        places, start = [], 0
        for part in parts:
            places.append([start, len(part)])
            start += len(part)
        return {"name": name, "parts": places}


def count(node: lite.Node, data: bytes, workers: Sequence[str], port: int, text_on: Sequence[str]) -> Counter[bytes]:
    """How often each word (anything between white space) is in `data`."""
    job = f"job-{node.name}-{time.monotonic_ns()}"
    with node.malloc(max(1, len(data)), text_on or None, spread=len(text_on) > 1, name=f"{job}.text") as text:
        text.write(data)
        try:
            chunks = [
                {"do": "map", "job": job, "text": text.name, "start": start, "length": end - start,
                 "reducers": len(workers)}
                for start, end in _cuts(data)
            ]  # fmt: skip
            maps = _run(node, workers, port, chunks)
            reduces = [
                {"do": "reduce", "job": job, "part": part,
                 "inputs": [[output["name"], *output["parts"][part]] for output in maps]}
                for part in range(len(workers))
            ]  # fmt: skip
            total: Counter[bytes] = Counter()
            for output in _run(node, workers, port, reduces):
                with node.map(output["name"], lite.Permission.READ) as result:
                    total.update(_unpack(result.read(output["parts"][0][1])))
        finally:
            node.multicast(workers, port, json.dumps({"do": "forget", "job": job}).encode())
    return total


def _run(node: lite.Node, workers: Sequence[str], port: int, tasks: Sequence[Task]) -> list[Any]:
    """Give each worker the next task as soon as it is done with one; the answers in the order of the tasks."""
    left: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(tasks)):
        left.put(number)
    answers: list[Any] = [None] * len(tasks)
    failures: list[lite.LiteError] = []

    def drive(worker: str) -> None:
        while not failures:
            try:
                number = left.get_nowait()
            except queue.Empty:
                return
            try:
                request = json.dumps(tasks[number]).encode()
                answers[number] = json.loads(node.call(worker, port, request, timeout=SECONDS))
            except lite.LiteError as failure:
                failures.append(failure)

    threads = [threading.Thread(target=drive, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return answers


def _cuts(data: bytes) -> Iterable[tuple[int, int]]:
    """Chunks of about CHUNK bytes that end where a line does."""
    start = 0
    while start < len(data):
        end = data.find(b"\n", min(start + CHUNK, len(data))) + 1 or len(data)
        yield start, end
        start = end


def _pack(counts: Counter[bytes]) -> bytes:
    return b"".join(b"%s %d\n" % item for item in counts.items())


def _unpack(data: bytes) -> dict[bytes, int]:
    fields = data.split()
    return dict(zip(fields[::2], map(int, fields[1::2]), strict=True))


def main(words: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="mapreduce", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("do", choices=["work", "count"])
    parser.add_argument("file", nargs="?", type=Path, help="count: the text")
    parser.add_argument("--port", type=int, default=1, help="port of the workers (1)")
    parser.add_argument("--jobs", type=int, help="work: leave after so many (never)")
    parser.add_argument("--workers", default="", help="count: names of the blades where workers run, with commas")
    parser.add_argument("--text-on", default="", help="count: the blades that hold the text meanwhile (this one)")
    asked = parser.parse_args(words)
    with lite.connect() as node:
        if asked.do == "work":
            with node.register(asked.port, max_message=1 << 20) as port:
                print("serving", flush=True)
                Worker(node).serve(port, asked.jobs)
        else:
            split = [name for name in asked.text_on.split(",") if name]
            total = count(node, asked.file.read_bytes(), asked.workers.split(","), asked.port, split)
            ordered = sorted(total.items(), key=lambda item: (-item[1], item[0]))
            sys.stdout.buffer.write(b"".join(b"%s %d\n" % item for item in ordered))


if __name__ == "__main__":
    main()
