"""Watching and debugging real blades: events, drawing, metrics, dashboard, captures, gdb, archives, speed of status."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import tarfile
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from orchestrator import agents
from orchestrator.settings import RackPaths, Settings
from tests.rack.conftest import Rack
from tests.unit import browser
from tests.unit.test_debug import packets
from tests.unit.test_metrics import parsed

pytestmark = [pytest.mark.rack, pytest.mark.timeout(300)]

BLADES = ["gm0", "pb0", "mb0", "mb1", "sb0"]


def paths_of(rack: Rack) -> RackPaths:
    return RackPaths(Settings.from_environment(rack.bench.env()), rack.name)


def ping(rack: Rack, times: int) -> None:
    """Have pb0 write and read mb0's memory over RDMA."""
    blades = rack.bench.status(rack.name)
    for _ in range(times):
        agents.call(paths_of(rack), "pb0", blades["pb0"]["mgmt_address"], "verbs.ping", 60.0,
                    peer=blades["mb0"]["fabric_address"])  # fmt: skip


def fault(rack: Rack, *words: str) -> None:
    rack.bench.rackless("fault", *words, "--rack", rack.name)


def events(rack: Rack) -> list[dict[str, Any]]:
    told = rack("events", "--json", "-n", "10000").stdout
    return [json.loads(line) for line in told.splitlines()]


def test_what_is_broken_is_drawn_and_what_happened_is_told(rack: Rack) -> None:
    follow = subprocess.Popen(rack.bench.command("events", "--follow", "--json", "-n", "1", "--rack", rack.name),
                              env=rack.bench.env(), stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert follow.stdout is not None
    assert json.loads(follow.stdout.readline())["time"] > 0  # from now on it watches
    before = events(rack)
    assert {e["blade"] for e in before if e["event"] == "member" and e["state"] == "joined"} == set(BLADES)
    assert [e["state"] for e in before if e["event"] == "step" and e["phase"] == "up"][:2] == ["start", "done"]
    try:
        fault(rack, "link", "mb0", "--loss", "1 %")
        fault(rack, "link", "sb0", "--down")
        found = dict.fromkeys(BLADES, "up") | {"mb0": "lossy", "mb1": "shaped", "sb0": "cut"}
        drawing = ElementTree.fromstring(rack("graph").stdout)
        title = str(drawing.findtext("{http://www.w3.org/2000/svg}title"))
        assert all(f"{blade} (" in title for blade in BLADES)
        assert [part.rpartition("link ")[2] for part in title.split("; ")] == [found[blade] for blade in BLADES]
        assert 'fabric0 -.-x|"fault: down"| sb0' in rack("graph", "--mermaid").stdout
    finally:
        rack("heal", "--all")
    fault(rack, "reset", "mb1")
    news = Counter(map(short, events(rack))) - Counter(map(short, before))
    for wanted in ("faults mb0 ['loss 1 %']", "faults mb0 []", "faults sb0 ['down']", "ended mb1 destroyed",
                   "change mb1 recreate", "member mb1 joined"):  # fmt: skip
        assert wanted in news, news
    seen: list[dict[str, Any]] = []
    while not any(event["event"] == "member" and event["state"] == "joined" for event in seen):
        seen.append(json.loads(follow.stdout.readline()))
    assert [e["faults"] for e in seen if e["event"] == "faults" and e["blade"] == "mb0"] == [["loss 1 %"], []]
    follow.send_signal(signal.SIGINT)
    assert follow.wait(30) == 0
    follow.stdout.close()


def short(event: dict[str, Any]) -> str:
    """What happened, in few words."""
    known = [event[key] for key in ("faults", "reason", "state", "action") if key in event]
    return " ".join(map(str, [event["event"], event.get("blade"), *known]))


@contextmanager
def dashboard(rack: Rack, *words: str) -> Iterator[str]:
    """Its address while it runs."""
    command = rack.bench.command("dashboard", "--json", "--rack", rack.name, *words)
    process = subprocess.Popen(command, env=rack.bench.env(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield str(json.loads(process.stdout.readline())["address"])
    finally:
        process.send_signal(signal.SIGINT)
        code = process.wait(30)
        process.stdout.close()
    assert code == 0


def test_metrics_and_the_page_of_real_blades(rack: Rack, tmp_path: Path) -> None:
    values = parsed(rack("metrics").stdout)
    assert list(values["rackless_blade_answers"].values()) == [1] * 5
    assert all(value > 0 for value in values["rackless_qemu_cpu_seconds_total"].values())
    assert all(value > 64 << 20 for value in values["rackless_qemu_resident_bytes"].values())
    assert len(values["rackless_qemu_resident_bytes"]) == len(values["rackless_lite_lmrs"]) == 5
    sent = {labels: value for labels, value in values["rackless_tap_out_bytes_total"].items() if "fabric" in labels}
    assert len(sent) == 5
    ping(rack, 5)
    later = parsed(rack("metrics").stdout)["rackless_tap_out_bytes_total"]
    label = f'rack="{rack.name}",blade="pb0",kind="processor",network="fabric"'
    assert later[label] > sent[label] + 5 * 4096
    with dashboard(rack, "--seconds", "0.5") as address:
        with urllib.request.urlopen(address.replace("/?", "/metrics?"), timeout=30) as answer:
            assert set(parsed(answer.read().decode())) >= set(values)
        if browser.find() is None:
            pytest.skip("no Chromium here")
        with browser.page(tmp_path) as page:
            page.open(address)
            page.eventually("document.querySelectorAll('#rack > li').length === 5")
            page.eventually("[...document.querySelectorAll('#rack .meter:nth-child(2) .value')]"
                            ".every((e) => e.textContent.endsWith(' %'))")  # fmt: skip
            summary = "document.getElementById('summary').textContent"
            assert page.evaluate(summary) == "5 blades, all answer"
            fault(rack, "pause", "mb0")
            page.eventually(f"{summary} === '5 blades, 1 not running, 1 with faults'")
            rack("heal", "mb0")
            page.eventually(f"{summary} === '5 blades, all answer'")
            assert page.evaluate("document.querySelector('#events .text').textContent") != ""
            assert page.complaints == []


def test_packets_kernel_and_archive(rack: Rack, tmp_path: Path) -> None:
    blades = rack.bench.status(rack.name)
    file = tmp_path / "fabric.pcap"
    words = rack.bench.command("capture", "--rack", rack.name, "--json", "-o", str(file))
    running = subprocess.Popen(words, env=rack.bench.env(), stderr=subprocess.DEVNULL)
    while not (file.exists() and file.stat().st_size):
        assert running.poll() is None
    ping(rack, 3)
    running.send_signal(signal.SIGINT)
    assert running.wait(30) == 0
    pair = [bytes(map(int, blades[name]["fabric_address"].split("."))) for name in ("pb0", "mb0")]
    roce = [data for _, data in packets(file.read_bytes()) if data[12:14] == b"\x08\0" and data[23] == 17
            and data[36:38] == (4791).to_bytes(2, "big")]  # fmt: skip
    assert {(data[26:30], data[30:34]) for data in roce} >= {tuple(pair), tuple(reversed(pair))}
    if shutil.which("tshark"):
        command = ["tshark", "-r", str(file), "-Y", "infiniband", "-T", "fields", "-e", "infiniband.bth.opcode"]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        assert len(shown) == len(roce)
        print(f"tshark: {len(shown)} RoCEv2 packets, opcodes {sorted(set(shown))}")

    if shutil.which("gdb"):
        told = rack("gdb", "pb0", "--", "-batch", "-nx", "-ex", "info registers rip").stdout
        assert any(line.startswith("rip ") for line in told.splitlines()), told
        assert rack.bench.status(rack.name)["pb0"]["faults"] == []
        ping(rack, 1)

    rack.on("pb0", "echo seen by nobody > /dev/console")
    archive = tmp_path / "all.tar.gz"
    names = json.loads(rack("support-bundle", "-o", str(archive), "--json").stdout)["contents"]
    assert {"status.json", "doctor.json", "events.jsonl", "collected/pb0/agents.log"} <= set(names)
    assert {f"consoles/{blade}.log" for blade in BLADES} <= set(names)
    assert not [name for name in names if name.endswith(".error")], "everything could be had"
    secret = paths_of(rack).secret.read_text().strip()
    with tarfile.open(archive) as opened:
        for member in opened.getmembers():
            text = opened.extractfile(member).read() if member.isfile() else b""  # type: ignore[union-attr]
            assert b"PRIVATE KEY" not in text
            assert secret.encode() not in text
            assert bytes.fromhex(secret) not in text
            if member.name.endswith("consoles/pb0.log"):
                assert b"seen by nobody" in text
