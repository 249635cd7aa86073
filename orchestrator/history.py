"""All that is known to have happened to a rack, from those who saw it: no process of ours has to watch all the time.

- its journal: what commands, playbooks and scenarios did (journal.py);
- the logs that libvirt keeps of QEMU: when a blade's power went, and why;
- its manager: who joined, died and left (`member.events`). It forgets when its blade dies.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from guest_agents import control
from orchestrator import agents, engine, journal
from orchestrator.errors import RacklessError
from orchestrator.hypervisor import hosts
from orchestrator.hypervisor.daemon import Daemon
from orchestrator.hypervisor.domain import TEMPLATE
from orchestrator.settings import PRIVATE_LIBVIRT, RackPaths

Event = dict[str, Any]
"""`time` (seconds since the epoch), `event` (its kind), `blade` (or None), and what there is to tell."""

POLL_SECONDS = 1.0
_ENDED = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+\+0000): shutting down, reason=(\w+)", re.MULTILINE)
_HOST_LOGS = Path("/var/log/libvirt/qemu")


def recorded(paths: RackPaths) -> list[Event]:
    """The events so far in the order of time. RacklessError when nothing is known of such a rack."""
    with closing(Watch(paths)) as watch:
        found = watch.new()
    if not found and not engine.observe(paths.settings, paths.name):
        raise RacklessError(f"rack {paths.name} is not up, and has no events", hint="bring it up with `rackless up`")
    return found


def follow(paths: RackPaths, lines: int) -> Iterator[Event]:
    """The last `lines` events, and then those that come, for ever; a rack may go down and come up meanwhile."""
    with closing(Watch(paths)) as watch:
        past = watch.new()
        yield from past[len(past) - lines :] if lines < len(past) else past
        while True:
            time.sleep(POLL_SECONDS)
            yield from watch.new()


class Watch:
    """Asks everybody again and again for what is new."""

    def __init__(self, paths: RackPaths) -> None:
        self._journal = journal.Tail(paths.events)
        self._endings = _Endings(paths)
        self._members = _Members(paths)

    def new(self) -> list[Event]:
        """What has happened since the last call (at first: all that is known), in the order of time."""
        found = [*self._journal.new(), *self._endings.new(), *self._members.new()]
        return sorted(found, key=lambda event: float(event["time"]))

    def close(self) -> None:
        """Let go of files and connections."""
        self._journal.close()
        self._members.close()


def endings(text: str) -> list[tuple[float, str]]:
    """When a QEMU ended, and why, as libvirt's log of it tells: seconds since the epoch; crashed, destroyed ..."""
    return [(datetime.fromisoformat(match[1]).timestamp(), match[2]) for match in _ENDED.finditer(text)]


def told(event: dict[str, Any]) -> str:
    """What happened, in words; the kinds are those of events.py, `ended` and `member`."""
    kind = event["event"]
    if kind == "step":
        seconds = f" ({event['seconds']:.1f} s)" if event.get("seconds") is not None else ""
        return f"{event['phase']} {event['state']}{seconds}" + (f": {event['message']}" if event["message"] else "")
    if kind == "change":
        return f"to {event['action']}: {'; '.join(event['reasons'])}"
    if kind == "faults":
        return f"broken: {', '.join(event['faults'])}" if event["faults"] else "healed"
    if kind == "ended":
        return f"QEMU ended: {event['reason']}"
    if kind == "member":
        return f"{event['state']}: {event['why']}"
    return str(event.get("message", kind))


class _Endings:
    """Blades whose QEMU ended."""

    def __init__(self, paths: RackPaths) -> None:
        self._rack = paths.name
        private = paths.settings.libvirt_uri == PRIVATE_LIBVIRT
        self._folder = Daemon.of(paths).log / "qemu" if private else _HOST_LOGS
        self._read: dict[Path, int] = {}
        """How much of each log has been read, bytes."""

    def new(self) -> list[Event]:
        found = []
        for log in self._folder.glob(f"{self._rack}.*.log"):
            blade = log.name.removeprefix(f"{self._rack}.").removesuffix(".log")
            if blade.startswith(TEMPLATE):
                continue
            found += [{"time": when, "event": "ended", "rack": self._rack, "blade": blade, "reason": reason}
                      for when, reason in endings(self._more(log))]  # fmt: skip
        return found

    def _more(self, log: Path) -> str:
        """The whole lines that came since the last time."""
        with suppress(FileNotFoundError), log.open("rb") as file:
            begin = self._read.get(log, 0)
            file.seek(begin if begin <= log.stat().st_size else 0)
            text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._read[log] = file.tell() - len(text) + len(whole)
            return whole.decode(errors="replace")
        return ""


class _Members:
    """Who joined, died and left, as the manager tells; nothing while it does not answer."""

    def __init__(self, paths: RackPaths) -> None:
        self._paths = paths
        self._client: control.ControlClient | None = None
        self._life: object = None
        self._next = 0

    def new(self) -> list[Event]:
        try:
            reply = self._ask()
        except control.ControlError:
            self.close()
            return []
        if reply["life"] != self._life and self._next:  # of another manager all is new, and its numbers are
            self._next = 0
            reply = self._ask()
        self._life, self._next = reply["life"], reply["next"]
        names = ("blade", "state", "why", "node", "incarnation")
        ahead = time.time() - reply["now"]  # a blade's clock may be seconds behind when all CPUs are busy
        return [{"time": round(told["time"] + ahead, 3), "event": "member", "rack": self._paths.name,
                 **{name: told[name] for name in names}} for told in reply["events"]]  # fmt: skip

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def _ask(self) -> control.Message:
        seconds = self._paths.settings.status_seconds
        if self._client is None or self._client.stale():
            self.close()
            self._client = agents.client(self._paths, self._manager(), seconds)
        return self._client.call("member.events", seconds, since=self._next)

    def _manager(self) -> str:
        """Where it is. LostError when none runs."""
        paths = self._paths
        try:
            with hosts.opened(paths, revive=False) as machines:
                seen = engine.as_seen(machines.owned()).values()
        except RacklessError as error:
            raise control.LostError(error.message) from error
        specs = [one.spec for one in seen if one.spec and one.spec.kind == "manager" and one.state == "running"]
        if not specs:
            raise control.LostError("no manager runs")
        return min(specs, key=lambda spec: spec.index).mgmt_address
