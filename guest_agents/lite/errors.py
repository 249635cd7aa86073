"""What can go wrong in LITE: one exception for each cause, each with a fixed negative code.

The codes are part of the interface: the native core, the wire, and the C library (native/liblite/lite.h) use the same.
"""

# ruff: noqa: N818 (`except lite.NodeDead` says it all; PermissionError and TimeoutError are Python's)

from __future__ import annotations

from typing import Any, ClassVar


class LiteError(Exception):
    """An operation of LITE failed.

    Attributes: `code`, the fixed negative number; `name`, the same in words; `message`, what happened in this case;
    `hint`, what to do about it.
    """

    code: ClassVar[int] = -100
    name: ClassVar[str] = "FAILED"
    meaning: ClassVar[str] = "LITE failed in a way that has no code of its own"
    default_hint: ClassVar[str] = ""

    def __init__(self, message: str | None = None, *, hint: str | None = None) -> None:
        self.message = message or self.meaning
        self.hint = self.default_hint if hint is None else hint
        super().__init__(self.message)

    def __str__(self) -> str:
        text = f"{self.name}: {self.message}"
        return f"{text} ({self.hint})" if self.hint else text

    def reply(self) -> dict[str, Any]:
        """As the control socket says it; `from_reply` makes the error again on the other side."""
        return {"ok": False, "code": self.code, "error": self.message, "hint": self.hint}


class PermissionDenied(LiteError):
    """The handle does not carry the right that the operation needs, or more was asked for than is granted."""

    code, name = -1, "PERMISSION"
    meaning = "the handle does not carry the right that this needs"
    default_hint = "map the LMR with that permission, or ask one of its masters for a grant"


class OutOfRange(LiteError):
    """The range goes beyond the end of the LMR or the buffer."""

    code, name = -2, "OUT_OF_RANGE"
    meaning = "the range goes beyond the end"


class BadHandle(LiteError):
    """This process holds no such handle: handles are valid only in the process that mapped them."""

    code, name = -3, "BAD_HANDLE"
    meaning = "this process holds no such handle"
    default_hint = "handles are valid only in the process that got them; map the LMR by its name"


class Freed(LiteError):
    """The LMR was freed by one of its masters."""

    code, name = -4, "FREED"
    meaning = "the LMR was freed by one of its masters"


class Revoked(LiteError):
    """The rights of this handle were taken back."""

    code, name = -5, "REVOKED"
    meaning = "the rights of this handle were taken back by a master"


class NameTaken(LiteError):
    """There is already something of this name."""

    code, name = -6, "NAME_TAKEN"
    meaning = "there is already something of this name"


class NoSuchName(LiteError):
    """Nothing has this name."""

    code, name = -7, "NO_SUCH_NAME"
    meaning = "nothing has this name"


class NodeDead(LiteError):
    """A node that the operation needs is dead, or was restarted since."""

    code, name = -8, "NODE_DEAD"
    meaning = "a node that this needs is dead, or was restarted since"


class NodeUnreachable(LiteError):
    """A node does not answer on the fabric, though it is not (yet) known to be dead."""

    code, name = -9, "NODE_UNREACHABLE"
    meaning = "a node does not answer on the fabric"
    default_hint = "it may be dead soon, or the link may be down; whether the operation took effect is not known"


class TimedOut(LiteError):
    """The time given has passed."""

    code, name = -10, "TIMED_OUT"
    meaning = "the time given has passed"


class MessageTooLarge(LiteError):
    """A message or a reply is larger than the port, or the caller, allows."""

    code, name = -11, "MESSAGE_TOO_LARGE"
    meaning = "the message is larger than the receiver allows"


class RingFull(LiteError):
    """The ring of this port stayed full: the server does not keep up."""

    code, name = -12, "RING_FULL"
    meaning = "the ring of this port stayed full: the server does not keep up"


class PortClosed(LiteError):
    """Nobody has registered this port on that node."""

    code, name = -13, "PORT_CLOSED"
    meaning = "nobody has registered this port on that node"


class PortTaken(LiteError):
    """Another process of this blade has registered this port."""

    code, name = -14, "PORT_TAKEN"
    meaning = "another process of this blade has registered this port"


class NoMemory(LiteError):
    """A node has no memory left for this, or a limit of LITE is reached."""

    code, name = -15, "NO_MEMORY"
    meaning = "a node has no memory left for this"


class NotJoined(LiteError):
    """There is no LITE here: no agent, an agent without LITE, or this process (or thread) has no connection."""

    code, name = -16, "NOT_JOINED"
    meaning = "this process has no connection to LITE"


class BadMessage(LiteError):
    """A message is malformed, truncated, or not understood."""

    code, name = -17, "BAD_MESSAGE"
    meaning = "the message is malformed or truncated"


class Cancelled(LiteError):
    """The operation was cancelled, by its owner or because what it used was closed."""

    code, name = -18, "CANCELLED"
    meaning = "the operation was cancelled, or what it used was closed"


class BarrierBroken(LiteError):
    """Someone whom the barrier waits for died or gave up: it will not be complete."""

    code, name = -19, "BARRIER_BROKEN"
    meaning = "someone whom the barrier waits for died or gave up"


class BadArgument(LiteError):
    """An argument makes no sense: a size of 0, an offset not divisible by 8 for an atomic, a port over 63."""

    code, name = -20, "BAD_ARGUMENT"
    meaning = "an argument makes no sense"


class NoSuchNode(LiteError):
    """The rack has no node of this name or id."""

    code, name = -21, "NO_SUCH_NODE"
    meaning = "the rack has no node of this name"


class NotHeld(LiteError):
    """Unlock of a lock that this process does not hold."""

    code, name = -22, "NOT_HELD"
    meaning = "this process does not hold the lock"


class ManagerLost(LiteError):
    """The manager does not answer: names, allocation and membership wait for it; reads, writes and RPC go on."""

    code, name = -23, "MANAGER_LOST"
    meaning = "the manager does not answer"
    default_hint = "reads, writes and RPC on what is mapped go on; try again when the manager is back"


ERRORS: dict[int, type[LiteError]] = {error.code: error for error in LiteError.__subclasses__()}
"""The exception for each code."""


def error_for(code: int, message: str | None = None, *, hint: str | None = None) -> LiteError:
    """The exception for a code, also for one that is not known."""
    kind = ERRORS.get(code)
    if kind is None:
        return LiteError(message or f"code {code}", hint=hint)
    return kind(message, hint=hint)


def from_reply(reply: dict[str, Any]) -> LiteError:
    """The exception that a control message with `"ok": false` carries."""
    code = reply.get("code")
    message, hint = reply.get("error"), reply.get("hint")
    return error_for(
        code if isinstance(code, int) else LiteError.code,
        message if isinstance(message, str) else None,
        hint=hint if isinstance(hint, str) else None,
    )
