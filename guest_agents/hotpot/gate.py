"""Hotpot in the agent of a blade: the service starts when it is first needed, there or on another blade.

Most racks never use it, and it costs connections of LITE to all blades. The first program that connects on a blade
starts the service there and on the manager; the first dataset that is made starts it on all. Where an earlier life of
the agent has left something, it starts by itself: others may wait for what is there.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from guest_agents import lite
from guest_agents.control import ControlError, Handler, Message
from guest_agents.hotpot import media, steps
from guest_agents.hotpot.audit import audit
from guest_agents.hotpot.errors import Corrupt, HotpotError, NotJoined, OldMedia
from guest_agents.hotpot.programs import Programs
from guest_agents.hotpot.service import BOOK, Service
from guest_agents.lite.tier import Tier
from guest_agents.membership import Life

FOLDER = Path("/var/lib/rackless/hotpot")
SOCKET = Path("/run/rackless/hotpot.sock")
_START_SECONDS = 120.0
_WAKE_SECONDS = 5.0
_AGAIN_SECONDS = 1.0

log = logging.getLogger("rackless.hotpot")


class Gate:
    """Hotpot on one blade, before and after it has started.

    folder -- where the service puts its media
    socket -- where programs find it
    """

    def __init__(self, tier: Tier, folder: Path = FOLDER, socket: Path = SOCKET) -> None:
        self._tier = tier
        self._folder = folder
        self._service: Service | None = None
        self._starting = threading.Lock()
        self._closed = threading.Event()
        self._programs = Programs(self.service, socket)

    def handlers(self) -> dict[str, Handler]:
        """For the agent's control server."""
        return {"hotpot.start": self._start, "hotpot.stat": self._stat, "hotpot.depart": self._depart,
                "hotpot.audit": self._audit, "hotpot.trap": self._trap}  # fmt: skip

    def start(self) -> None:
        """Let programs connect; take over what an earlier life has left."""
        self._programs.start()
        threading.Thread(target=self._come_back, name="hotpot recovery", daemon=True).start()

    def _come_back(self) -> None:
        while not self._closed.wait(_AGAIN_SECONDS):
            try:
                if media.holds(self._folder, BOOK):
                    self.service()
            except (OldMedia, Corrupt) as failure:  # as it will be next time
                log.error("Hotpot does not start, and what it had here is not in reach: %s", failure)
                return
            except (HotpotError, lite.LiteError) as failure:
                log.info("Hotpot does not start yet: %s", failure)
            except Exception:
                log.exception("Hotpot does not start, and what it had here is not in reach")
                return
            else:
                return

    def close(self) -> None:
        """End it."""
        self._closed.set()
        self._programs.close()
        if self._service is not None:
            self._service.close()
            self._service.node.close()

    def service(self) -> Service:
        """The service of this blade, started if need be, after the manager's. NotJoined, OldMedia, NodeLost."""
        with self._starting:
            if self._service is None:
                try:
                    self._service = self._made()
                except lite.LiteError as failure:
                    raise NotJoined(f"Hotpot cannot start: {failure}") from None
            return self._service

    def _made(self) -> Service:
        own, manager = self._tier.life(), self._tier.find_manager()
        if own != manager:
            self._tier.links.call(manager, "hotpot.start", _START_SECONDS)
        node = lite.connect(str(self._tier.settings.socket))
        try:
            service = Service(node, self._folder, manager.node, self._gather, wake=self._wake)
            return service.start()
        except BaseException:
            node.close()
            raise

    def _wake(self) -> None:
        """Have Hotpot on the manager, which may have begun a new life, without its media. It need not be ready yet."""
        try:
            own, manager = self._tier.life(), self._tier.find_manager()
            if own != manager:  # whose own service may call this while it starts
                self._tier.links.call(manager, "hotpot.start", _WAKE_SECONDS)
        except lite.LiteError as failure:
            log.info("Hotpot does not start on the manager yet: %s", failure)

    def _gather(self, started: set[int]) -> None:
        """On the manager, before a dataset is made: all blades shall be able to own parts of it."""
        lives = [Life(m["node_id"], m["incarnation"]) for m in self._tier.membership.living]
        missing = [life for life in lives if life.node not in started]

        def ask(life: Life) -> None:
            try:
                self._tier.links.call(life, "hotpot.start", _START_SECONDS)
            except lite.LiteError as failure:
                log.warning("Hotpot does not start on node %d: %s", life.node, failure)

        if missing:
            with ThreadPoolExecutor(len(missing)) as pool:
                list(pool.map(ask, missing))

    def _start(self, _request: Message) -> Message:
        try:
            self.service()
        except HotpotError as failure:
            log.warning("Hotpot cannot start: %s", failure)
            raise ControlError(str(failure)) from None
        return {}

    def _stat(self, _request: Message) -> Message:
        """For `rackless hotpot stat`; a blade where Hotpot has not started has nothing to tell."""
        return {} if self._service is None else self._service.stat()

    def _depart(self, request: Message) -> Message:
        """hotpot.depart: move what this blade owns to `nodes`, which may be none; see Migration.depart."""
        service = self._service
        return {"datasets": {}, "moved": 0} if service is None else service.migration.depart(request["nodes"])

    def _audit(self, request: Message) -> Message:
        """For tests of crashes: what is here of a dataset."""
        return {} if self._service is None else audit(self._service, request["dataset"])

    def _trap(self, request: Message) -> Message:
        """For tests of crashes: stand still at a step, or at none."""
        steps.arm(steps.Trap(request["step"], request.get("count", 1)) if request["step"] else None)
        return {}
