"""The dashboard's server over real connections, and its page in a real browser."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator import dashboard
from orchestrator.cli.dashboard import _token
from orchestrator.dashboard import Feed, Handler, Server
from orchestrator.errors import RacklessError
from orchestrator.observer import Snapshot
from tests.unit import browser
from tests.unit.snapshots import EVENTS, snapshot

TOKEN = "a-token-of-twenty-chars"


@dataclass
class Served:
    """A dashboard whose looks a test chooses."""

    looks: int = 0
    failure: RacklessError | None = None
    empty: bool = False
    events: list[dict[str, Any]] = field(default_factory=lambda: list(EVENTS))
    address: str = ""
    port: int = 0

    def look(self) -> Snapshot:
        self.looks += 1
        if self.failure:
            raise self.failure
        seen = snapshot(self.looks)
        return replace(seen, wires=(), host={}, sample={}) if self.empty else seen

    def happened(self) -> list[dict[str, Any]]:
        events, self.events = self.events, []
        return events

    def get(self, path: str, **headers: str) -> tuple[int, http.client.HTTPMessage, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, answer.headers, text


@pytest.fixture
def served() -> Iterator[Served]:
    made = Served()
    feed = Feed(made.look, made.happened, 0.1)
    with Server(feed, TOKEN, 0) as server:
        made.address, made.port = server.address, server.server_port
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        feed.start()
        yield made
        feed.close()
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("path", ["/", "/events", "/metrics", "/nothing", "/../etc/passwd"])
@pytest.mark.parametrize("token", ["", "?token=", "?token=" + TOKEN[:-1], "?token=" + TOKEN + "x", "?token=%ff%00"])
def test_nobody_gets_anything_without_the_token(served: Served, path: str, token: str) -> None:
    status, _, text = served.get(path + token)
    assert (status, served.looks) == (403, 0)
    assert "demo" not in text
    assert TOKEN not in text


def test_it_listens_on_the_loopback_address_only(served: Served) -> None:
    listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if " 0A " in line]
    ours = [address for address in listening if address.endswith(f":{served.port:04X}")]
    assert ours == [f"0100007F:{served.port:04X}"]


def test_page_and_its_policy(served: Served) -> None:
    status, headers, text = served.get(f"/?token={TOKEN}")
    assert (status, headers["Content-Type"], headers["Cache-Control"]) == (200, "text/html; charset=utf-8", "no-store")
    assert "default-src 'none'; script-src 'sha256-" in headers["Content-Security-Policy"]
    assert headers["Referrer-Policy"] == "no-referrer"
    assert not re.search(r'(src|href)="|https?://(?!www\.w3\.org/)', text), "it loads nothing from anywhere"
    assert TOKEN not in text
    assert served.get(f"/other?token={TOKEN}")[0] == 404


def test_metrics_with_the_token_in_the_address_or_as_prometheus_sends_it(served: Served) -> None:
    status, headers, text = served.get(f"/metrics?token={TOKEN}")
    assert (status, headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert "rackless_blade_running{" in text
    assert served.get("/metrics", Authorization=f"Bearer {TOKEN}")[0] == 200
    assert served.get("/metrics", Authorization="Bearer no")[0] == 403
    served.failure = RacklessError("libvirt is away")
    assert served.get(f"/metrics?token={TOKEN}")[::2] == (503, "libvirt is away\n")


class Stream:
    """An open stream of server-sent events."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=20)
        self.socket.sendall(f"GET /events?token={TOKEN} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        self.file = self.socket.makefile("rb")
        while self.file.readline().strip():
            pass

    def next(self, name: str) -> Any:
        """The data of the next event of this name."""
        while True:
            line = self.file.readline().decode()
            assert line, "the stream ended"
            if line == f"event: {name}\n":
                return json.loads(self.file.readline().decode().removeprefix("data: "))

    def close(self) -> None:
        self.file.close()
        self.socket.close()


def test_the_rack_is_looked_at_only_while_somebody_looks(served: Served) -> None:
    time.sleep(0.3)
    assert served.looks == 0
    first = Stream(served.port)
    assert first.next("past") == []
    assert first.next("event")["text"] == "up done (11.9 s)"
    assert {look["rack"] for look in (first.next("look"), first.next("look"))} == {"demo"}
    second = Stream(served.port)
    assert [event["event"] for event in second.next("past")] == ["step", "faults", "ended", "member", "note"]
    assert second.next("look")["rack"] == "demo"
    for stream in (first, second):
        stream.close()
    deadline = time.monotonic() + 20
    seen = -1
    while seen != served.looks:  # a stream whose reader has gone ends when it says the next thing
        assert time.monotonic() < deadline
        seen = served.looks
        time.sleep(0.5)


def test_a_failure_is_told_and_the_next_look_goes_on(served: Served) -> None:
    served.failure = RacklessError("libvirt is away")
    stream = Stream(served.port)
    assert stream.next("failure") == {"error": "libvirt is away"}
    served.failure = None
    assert len(stream.next("look")["blades"]) == 6
    stream.close()


def test_a_port_that_is_taken_is_one_line(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing:
        def __init__(self, _paths: object) -> None: ...
        def look(self) -> None: ...
        def new(self) -> None: ...
        def __enter__(self) -> Nothing:
            return self

        def __exit__(self, *_words: object) -> None: ...
        def close(self) -> None: ...

    monkeypatch.setattr(dashboard, "Observer", Nothing)
    monkeypatch.setattr(dashboard, "Watch", Nothing)
    with pytest.raises(RacklessError, match=f"cannot listen on 127.0.0.1:{served.port}: Address already in use"):
        dashboard.serve(None, TOKEN, served.port, 1.0, lambda _address: None)  # type: ignore[arg-type]


def test_one_that_asks_nothing_is_let_go(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Handler.timeout == 30
    monkeypatch.setattr(Handler, "timeout", 0.1)
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as silent:
        assert silent.recv(1) == b""


def test_the_file_of_a_token_is_its_owners_and_stays(tmp_path: Path) -> None:
    file = tmp_path / "token"
    token = _token(file)
    assert _token(file) == token
    assert file.stat().st_mode & 0o777 == 0o600
    assert _token(None) != _token(None)
    for mode in (0o640, 0o604, 0o620):
        file.chmod(mode)
        with pytest.raises(RacklessError, match="others than its owner"):
            _token(file)
    file.chmod(0o600)
    file.write_text("short\n")
    with pytest.raises(RacklessError, match="does not have a token"):
        _token(file)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    if browser.find() is None:
        pytest.skip("no Chromium here: `scripts/setup --tests` installs it where the distribution has it")
    with browser.page(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


def shown(page: browser.Page, selector: str) -> list[str]:
    """The texts of elements."""
    found = page.evaluate(f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.textContent)")
    return [str(text) for text in found]


@pytest.mark.long
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_draws_the_rack_and_goes_on(served: Served, page: browser.Page, dark: bool) -> None:
    page.complaints.clear()
    page.open(served.address, dark=dark)
    page.eventually("document.querySelectorAll('#rack > li').length === 6")
    page.eventually("document.querySelector('#programs tbody td:nth-child(3)')?.textContent === '95.0 %'")
    assert shown(page, "#rack-name") == ["Rack demo"]
    assert shown(page, "#summary") == ["6 blades, 1 not running, 1 silent, 2 with faults"]
    assert shown(page, "#rack .name") == ["gm0", "pb0", "mb0", "mb1", "mb2", "sb0"]
    links = page.evaluate("[...document.querySelectorAll('#rack .link')].map((e) => e.classList[1])")
    assert links == ["up", "shaped", "lossy", "up", "cut", "up"]
    assert shown(page, "#faults li") == ["mb0loss 1 %, cpu 25 %", "mb2killed"]
    assert shown(page, "#rack li:nth-child(4) .notes") == ["no agent answers at 10.78.0.13:7070"]
    texts = shown(page, "#events .text")
    assert texts[:2] == ["<img src=x onerror=alert(1)>", "dead: silent for 10.2 s"], "the newest first, as text"
    served.events.append({"time": 1763866300.0, "event": "faults", "rack": "demo", "blade": "mb0", "faults": []})
    page.eventually("document.querySelector('#events .text').textContent === 'healed'")
    assert page.evaluate("document.querySelectorAll('img').length") == 0
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(20, 23, 27)" if dark else "rgb(246, 244, 239)")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"
    page.open(served.address, width=420, dark=dark)
    page.eventually("document.querySelectorAll('#rack > li').length === 6")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nor on a narrow screen"
    assert page.complaints == []


CONTRAST = """
(() => {
  const parts = (text) => text.match(/[0-9.]+/g).map(Number);
  const light = (text) => parts(text).slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (!/, 0\\)$/.test(c)) return c; } return "rgb(255, 255, 255)"; };
  return [...document.querySelectorAll("h1, h2, p, th, td, time, .kind, .notes, .words span, .rates, .text, #when")]
    .filter((e) => e.textContent.trim() && e.getClientRects().length)
    .map((e) => { const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x);
      return [e.className || e.tagName, (a + 0.05) / (b + 0.05)]; })
    .filter(([, ratio]) => ratio < 4.5);
})()
"""


@pytest.mark.long
@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_and_meters_have_names(served: Served, page: browser.Page, dark: bool) -> None:
    page.open(served.address, dark=dark)
    page.eventually("document.querySelectorAll('#programs tbody tr').length === 1")
    assert page.evaluate(CONTRAST) == [], "WCAG AA wants a contrast of 4.5"
    tree = page.call("Accessibility.getFullAXTree")["nodes"]
    named = [(n["role"]["value"], n["name"]["value"]) for n in tree if not n["ignored"] and "name" in n]
    for wanted in (("meter", "CPU"), ("meter", "memory"), ("meter", "ExCache hits"), ("meter", "lent"),
                   ("heading", "Rack demo"), ("log", "Events"), ("region", "Faults")):  # fmt: skip
        assert wanted in named
    words = " ".join(str(name) for _, name in named)
    assert "link: nothing passes" in words


@pytest.mark.long
def test_a_rack_that_goes_and_a_server_that_goes(served: Served, page: browser.Page) -> None:
    page.open(served.address)
    page.eventually("document.querySelectorAll('#rack > li').length === 6")
    served.failure = RacklessError("libvirt is away")
    page.eventually("!document.getElementById('trouble').hidden")
    assert shown(page, "#trouble")[0].startswith("The rack cannot be looked at: libvirt is away. What is shown is from")
    served.failure, served.empty = None, True
    page.eventually("document.getElementById('summary').textContent === 'It is not up.'")
    assert shown(page, "#rack li") == []
    assert page.evaluate("document.getElementById('trouble').hidden")
