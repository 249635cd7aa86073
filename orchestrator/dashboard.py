"""The dashboard's server: one page, its live data as server-sent events, and metrics for Prometheus.

It listens on the loopback address only, and answers nobody who does not know its token: other users of this host
can reach that address, too. The rack is looked at while somebody looks at the page, not otherwise.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from orchestrator import metrics
from orchestrator.errors import RacklessError
from orchestrator.history import Event, Watch, told
from orchestrator.observer import Observer, Snapshot
from orchestrator.panel import panel
from orchestrator.settings import RackPaths
from orchestrator.templates import template_folder

LOOPBACK = "127.0.0.1"
_EVENTS = 100
"""Events that a page begins with."""
_BEAT_SECONDS = 10.0
"""So often a stream says something at least: one whose reader has gone ends then."""
_END_SECONDS = 5.0
_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)

Message = tuple[str, Any]
"""A server-sent event: its name and its data."""


class Feed:
    """What pages are told: a look at the rack every few seconds, and events as they come.

    look -- how the rack is now
    happened -- events since the last call; the first call gives those that are recorded
    seconds -- between two looks
    """

    def __init__(self, look: Callable[[], Snapshot], happened: Callable[[], list[Event]], seconds: float) -> None:
        self._look, self._happened, self._seconds = look, happened, seconds
        self._news = threading.Condition()
        self._readers = 0
        self._number = 0
        self._shown: Message | None = None
        self._past: deque[Event] = deque(maxlen=_EVENTS)
        self._fresh: deque[tuple[int, Event]] = deque(maxlen=_EVENTS)
        self._closed = False
        self._thread: threading.Thread | None = None
        self._looking = threading.Lock()

    def start(self) -> Feed:
        """Look at the rack in a thread of its own; returns itself."""
        self._thread = threading.Thread(target=self._run, name="feed", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """End the thread and all streams."""
        with self._news:
            self._closed = True
            self._news.notify_all()
        if self._thread is not None:  # libvirt does not like a thread that is in the middle of it when all ends
            self._thread.join(_END_SECONDS)

    def metrics(self) -> str:
        """A look of its own, as Prometheus's text."""
        with self._looking:
            return metrics.exposition(self._look())

    def messages(self) -> Iterator[Message | None]:
        """For one page: the past, and then what is new. None now and then when nothing is."""
        with self._news:
            self._readers += 1
            self._news.notify_all()
            begin: list[Message] = [("past", list(self._past))] + ([self._shown] if self._shown else [])
            seen = self._number
        try:
            yield from begin
            while True:
                with self._news:
                    self._wait(seen)
                    if self._closed:
                        return
                    news: list[Message | None] = [None]
                    if self._number != seen:
                        news = [("event", event) for number, event in self._fresh if number > seen]
                        news += [self._shown]
                    seen = self._number
                yield from news
        finally:
            with self._news:
                self._readers -= 1

    def _wait(self, seen: int) -> None:
        self._news.wait_for(lambda: self._closed or self._number != seen, _BEAT_SECONDS)

    def _run(self) -> None:
        before: Snapshot | None = None
        while True:
            with self._news:
                if not self._readers:
                    before = None  # rates over the time in which nobody looked say nothing
                self._news.wait_for(lambda: self._readers or self._closed)
                if self._closed:
                    return
            started = time.monotonic()
            before = self._turn(before)
            with self._news:
                self._news.wait_for(lambda: self._closed, max(0.0, self._seconds - (time.monotonic() - started)))

    def _turn(self, before: Snapshot | None) -> Snapshot | None:
        """One look, told to all pages; it, for the next turn."""
        now: Snapshot | None = None
        try:
            with self._looking:
                now = self._look()
                events = [{**event, "text": told(event)} for event in self._happened()]
            shown: Message = ("look", panel(before or now, now))
        except RacklessError as error:
            events, shown = [], ("failure", {"error": error.message})
        except Exception as error:  # libvirt may end in the middle of `down`: the page says so, and it goes on
            events, shown = [], ("failure", {"error": f"{type(error).__name__}: {error}"})
        with self._news:
            self._number += 1
            self._shown = shown
            self._past.extend(events)
            self._fresh.extend((self._number, event) for event in events)
            self._news.notify_all()
        return now


def page() -> tuple[bytes, str]:
    """The page, and the policy that lets it run its own script, talk to this server, and nothing else."""
    text = (template_folder() / "dashboard.html").read_text(encoding="utf-8")
    found = _SCRIPT.search(text)
    assert found is not None
    digest = base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
    policy = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; connect-src 'self'"
    return text.encode(), f"{policy}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


class Server(ThreadingHTTPServer):
    """Serves a feed on the loopback address."""

    daemon_threads = True

    def __init__(self, feed: Feed, token: str, port: int) -> None:
        self.feed, self.token = feed, token
        self.page, self.policy = page()
        super().__init__((LOOPBACK, port), Handler)

    @property
    def address(self) -> str:
        """Where a browser finds the page, with the token."""
        return f"http://{LOOPBACK}:{self.server_port}/?token={self.token}"


class Handler(BaseHTTPRequestHandler):
    """One request. Without the right token all of them get the same answer."""

    server: Server
    server_version = "rackless"
    sys_version = ""
    timeout = 30
    """Seconds until one that asks nothing, or does not take its answer, is let go: each has a thread."""

    def do_GET(self) -> None:
        where = urlsplit(self.path)
        if not self._may(where.query):
            self._answer(HTTPStatus.FORBIDDEN, b"the address that `rackless dashboard` printed has a token\n")
        elif where.path == "/":
            self._answer(HTTPStatus.OK, self.server.page, "text/html; charset=utf-8")
        elif where.path == "/events":
            self._stream()
        elif where.path == "/metrics":
            try:
                self._answer(HTTPStatus.OK, self.server.feed.metrics().encode(), metrics.CONTENT_TYPE)
            except RacklessError as error:
                self._answer(HTTPStatus.SERVICE_UNAVAILABLE, f"{error.message}\n".encode())
        else:
            self._answer(HTTPStatus.NOT_FOUND, b"there are /, /events and /metrics\n")

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (so called there)
        """Nothing: requests have the token in them."""

    def _may(self, query: str) -> bool:
        """Whether the request has the token, in its address or as Prometheus sends it; takes the same time always."""
        told = parse_qs(query).get("token", [""])[0]
        kind, _, bearer = self.headers.get("Authorization", "").partition(" ")
        given = bearer.strip() if kind.lower() == "bearer" else told
        return hmac.compare_digest(given.encode(errors="replace"), self.server.token.encode())

    def _answer(self, status: HTTPStatus, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        self._begin(status, kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _begin(self, status: HTTPStatus, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Security-Policy", self.server.policy)

    def _stream(self) -> None:
        self._begin(HTTPStatus.OK, "text/event-stream; charset=utf-8")
        self.end_headers()
        try:
            with closing(self.server.feed.messages()) as messages:  # type: ignore[type-var]
                for message in messages:
                    self.wfile.write(_sent(message))
                    self.wfile.flush()
        except OSError:  # the page was closed
            return


def _sent(message: Message | None) -> bytes:
    if message is None:
        return b": nothing new\n\n"
    name, data = message
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def serve(paths: RackPaths, token: str, port: int, seconds: float, ready: Callable[[str], None]) -> None:
    """Serve a rack's dashboard until KeyboardInterrupt; `ready` gets the page's address.

    port -- 0 takes a free one
    RacklessError when the port cannot be had.
    """
    with ExitStack() as stack:
        observer = stack.enter_context(Observer(paths))
        watch = stack.enter_context(closing(Watch(paths)))
        feed = Feed(observer.look, watch.new, seconds)
        stack.callback(feed.close)
        try:
            server = stack.enter_context(Server(feed, token, port))
        except OSError as error:
            raise RacklessError(f"cannot listen on {LOOPBACK}:{port}: {error.strerror}",
                                hint="another --port, or none for a free one") from error  # fmt: skip
        feed.start()
        ready(server.address)
        server.serve_forever()
