"""Files of a storage blade that is to be removed: the end of their move, which is one change of the ledger.

By then another storage blade has copied most of it (storage/arrival.py). Until the change is made the files are where
they were; from then on they are there. Both blades ask `managers.moved` which it is, should they not be told: a manager
that was restarted knows by the ledger alone.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping

from guest_agents.control import ControlError, Handler, Message
from guest_agents.lite.errors import LiteError
from guest_agents.membership import Life
from guest_agents.splitkernel.managers.vnode import Ledger, Move

LAST_SECONDS = 25.0
"""For the last look at all files, while programs wait: they do so for 60 s at most (process/patience.py)."""
_CALL_SECONDS = 40.0


class FileMoves:
    """Moves of files between storage blades.

    lives -- (kind): the blades that live, by name
    call -- (life, op, seconds, fields): a request to a blade, as Links.call
    change -- changes the ledger, and returns when every blade that lives knows it
    """

    def __init__(
        self,
        lives: Callable[[str], Mapping[str, Life]],
        call: Callable[..., Message],
        change: Callable[[Callable[[Ledger], Ledger]], Ledger],
        ledger: Callable[[], Ledger],
    ) -> None:
        self._lives = lives
        self._call = call
        self._change = change
        self._ledger = ledger
        self._pending: set[str] = set()
        self._over: set[str] = set()
        """Tokens of moves that did not come to be, and never will."""
        self.leaving: set[str] = set()
        """Storage blades that get no new vNodes."""

    def handlers(self) -> dict[str, Handler]:
        """What the host asks."""
        return {"storage.leave": self.leave, "storage.move": self.move}

    def leave(self, request: Message) -> Message:
        """storage.leave: the blade `storage` is about to be removed, and gets no new vNodes; with `cancel` it does."""
        (self.leaving.discard if request.get("cancel") else self.leaving.add)(str(request["storage"]))
        return {}

    def move(self, request: Message) -> Message:
        """storage.move: the files of the blade `storage`, most of which `to` has copied, are there from now on.

        ControlError when it does not work: then they are where they were.
        """
        lives = self._lives("storage")
        move = Move(str(request["storage"]), str(request["to"]), secrets.token_hex(8))
        for blade in (move.source, move.target):
            if blade not in lives:
                raise ControlError(f"{blade} is no storage blade that lives", "see `rackless status`")
        self._pending.add(move.token)
        try:
            self._call(lives[move.source], "storage.hold", _CALL_SECONDS, token=move.token)
            self._call(lives[move.target], "storage.publish", _CALL_SECONDS, source=move.source, token=move.token,
                       seconds=LAST_SECONDS)  # fmt: skip
            self._change(lambda old: old.moved(move, self._lives("storage")))
        except LiteError as failure:
            said = f"the files of {move.source} are where they were: {failure.message}"
            raise ControlError(said, failure.hint) from failure
        finally:
            self._pending.discard(move.token)  # after the change: who asks in between waits
        return {}

    def moved(self, request: Message) -> Message:
        """managers.moved: what has become of the move `token`: whether it is `pending`, else whether files `moved`,
        and whether the blade that asks is still `leaving`."""
        token = request["token"]
        if token in self._pending:
            return {"pending": True}
        if token not in self._over and not self._has(token):
            self._change(lambda old: old)  # what an earlier manager told somebody who is away now is too old then
            self._over.add(token)
        own = Life(*request["life"])
        names = {name for name, life in self._lives("storage").items() if life == own}
        return {"pending": False, "moved": self._has(token), "leaving": bool(names & self.leaving)}

    def _has(self, token: str) -> bool:
        return any(move.token == token for move in self._ledger().moves)
