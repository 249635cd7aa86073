"""The YCSB client that runs on blades: all workloads, on the store on Hotpot and on a real Redis with a replica."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from experiments.ycsb import VALUE_BYTES, WORKLOADS, key_of
from experiments.ycsb_client import OnRedis
from tests.unit import lite_pair
from tests.unit.hotpot_rack import PROJECT, Blade, output, rack

pytestmark = [pytest.mark.long, pytest.mark.skipif(lite_pair.missing() is not None, reason=str(lite_pair.missing()))]
Rack = dict[str, Blade]
RECORDS = 30


@pytest.fixture(scope="module")
def blades(tmp_path_factory: pytest.TempPathFactory, lite_core: Path) -> Iterator[Rack]:
    with rack(tmp_path_factory.mktemp("ycsb"), lite_core, "gm0", "mb0", "mb1") as made:
        yield made


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a primary with one replica, both fsync their append-only files."""
    server = shutil.which("redis-server")
    if server is None:
        pytest.skip("redis-server is not installed here; `rackless bench hotpot` has it on blades")
    with ExitStack() as running:
        primary = 0
        for role in ("primary", "replica"):
            with socket.create_server(("127.0.0.1", 0)) as free:
                port: int = free.getsockname()[1]
            folder = tmp_path_factory.mktemp(role)
            more = ["--replicaof", "127.0.0.1", str(primary)] if primary else []
            process = running.enter_context(subprocess.Popen(
                [server, "--port", str(port), "--dir", str(folder), "--appendonly", "yes", "--appendfsync", "always",
                 "--save", "", "--repl-diskless-sync-delay", "0", *more], stdout=subprocess.DEVNULL))  # fmt: skip
            running.callback(process.kill)
            primary = primary or port
            deadline = time.monotonic() + 30
            while subprocess.run(["bash", "-c", f"exec 3<>/dev/tcp/127.0.0.1/{port}"], stderr=subprocess.DEVNULL,
                                 check=False).returncode:  # fmt: skip
                assert time.monotonic() < deadline
                time.sleep(0.1)
        yield primary


def client(blade: Blade, *words: object) -> subprocess.Popen[str]:
    sockets = {"RACKLESS_HOTPOT": str(blade.socket), "RACKLESS_LITE": str(blade.socket.with_suffix(".sock"))}
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.ycsb_client", *map(str, words)], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, cwd=PROJECT, env={**os.environ, **sockets},
    )  # fmt: skip


def run_all(blades: Rack, where: str) -> None:
    output(client(blades["mb0"], "load", where, "--records", RECORDS))
    for workload, mix in WORKLOADS.items():
        clients = [client(blades[name], "run", where, "--workload", workload, "--records", RECORDS, "--count", 25,
                          "--clients", 2, "--client", i) for i, name in enumerate(("mb0", "mb1"))]  # fmt: skip
        for process in clients:
            result: dict[str, Any] = json.loads(output(process))
            assert result.pop("ops_per_s") > 0
            assert set(result) <= {f"{what}_us" for what in mix.shares}
            assert sum(map(len, result.values())) == 25


def test_all_workloads_on_hotpot(blades: Rack) -> None:
    run_all(blades, "hotpot")
    run_all(blades, "hotpot")  # what is there is replaced


def test_all_workloads_on_redis(blades: Rack, redis: int) -> None:
    run_all(blades, f"redis:127.0.0.1:{redis}")
    one = OnRedis("127.0.0.1", redis, 2)
    assert len(one.get(key_of(0)) or b"") == VALUE_BYTES
    found = one.scan(b"", 1000)
    assert len(found) >= RECORDS
    assert found == sorted(found)
