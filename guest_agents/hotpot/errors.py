"""What can go wrong in Hotpot: one exception for each cause; its name goes over the wire."""

# ruff: noqa: N818 (`except hotpot.Retry` says it all)

from __future__ import annotations

from typing import Any, ClassVar


class HotpotError(Exception):
    """An operation of Hotpot failed. `message` says what happened in this case, `hint` what to do about it."""

    meaning: ClassVar[str] = "Hotpot failed"
    default_hint: ClassVar[str] = ""

    def __init__(self, message: str | None = None, *, hint: str | None = None) -> None:
        self.message = message or self.meaning
        self.hint = self.default_hint if hint is None else hint
        super().__init__(f"{self.message} ({self.hint})" if self.hint else self.message)

    def reply(self) -> dict[str, Any]:
        """As messages carry it; `from_reply` makes the error again on the other side."""
        return {"error": type(self).__name__, "message": self.message, "hint": self.hint}


class Retry(HotpotError):
    """Somebody else was first: nothing of this transaction was committed, its stores were taken back (DSNVM_RETRY)."""

    meaning = "another transaction was first"
    default_hint = "begin again, with what is there now"


class BadArgument(HotpotError):
    """An argument makes no sense."""

    meaning = "an argument makes no sense"


class NoSuchDataset(HotpotError):
    """No dataset has this name, or it was deleted."""

    meaning = "there is no such dataset"


class DatasetExists(HotpotError):
    """There is already a dataset of this name."""

    meaning = "there is already a dataset of this name"


class DatasetBusy(HotpotError):
    """The dataset is open somewhere."""

    meaning = "the dataset is open"
    default_hint = "close it everywhere first"


class NoSpace(HotpotError):
    """A node has no persistent (or registered) memory left for this."""

    meaning = "a node has no memory left for this"


class NotMapped(HotpotError):
    """A range lies outside of the dataset, or the dataset is not open in this program."""

    meaning = "the range is not mapped"


class Overlap(HotpotError):
    """Ranges of one commit overlap."""

    meaning = "ranges of one commit overlap"


class NotClean(HotpotError):
    """A page that a transaction wants has stores which nobody committed."""

    meaning = "a page has stores that were not committed"
    default_hint = "commit or discard them before a transaction acquires the page"


class NoSuchTransaction(HotpotError):
    """The transaction has ended, or never began in this program."""

    meaning = "the transaction has ended, or never began in this program"


class TooLarge(HotpotError):
    """A commit does not fit in a message or in the log."""

    meaning = "the commit is too large"
    default_hint = "commit less at once"


class TooFewNodes(HotpotError):
    """Fewer nodes are alive than copies are asked for; nothing was committed."""

    meaning = "fewer nodes are alive than copies are asked for"


class FewerCopies(HotpotError):
    """The commit took place, but nodes died meanwhile: it has fewer copies than asked for."""

    meaning = "the commit took place, with fewer copies than asked for"


class InDoubt(HotpotError):
    """A node was lost while a commit was under way: it was decided, but not everybody has confirmed it."""

    meaning = "a node was lost during the commit: part of it may not be there yet"
    default_hint = "it will be there as a whole or not at all; read the ranges again"


class NodeLost(HotpotError):
    """A node that this needs does not answer."""

    meaning = "a node does not answer"


class VersionMismatch(HotpotError):
    """Two parts of Hotpot were built to different protocols or sizes."""

    meaning = "two parts of Hotpot do not fit together"
    default_hint = "are all blades from the same image?"


class Corrupt(HotpotError):
    """What lies on media does not have its checksum; it was not used."""

    meaning = "data on media do not have their checksum"


class OldMedia(HotpotError):
    """The node's media are not what a service of this version leaves there."""

    meaning = "there are files that are not of this service"
    default_hint = "they were left as they are; give the service an empty folder"


class Isolated(HotpotError):
    """This node, or the owner of a page, has lost touch with the dispatcher: the others may go on without it."""

    meaning = "the node has lost touch with the dispatcher, and commits nothing until it is back"
    default_hint = "nothing was committed; try again when the network is whole"


class NotOwner(HotpotError):
    """Another node has become the home of these pages."""

    meaning = "another node has become the home of these pages"


class PagesLost(HotpotError):
    """A node was lost with its media, and there was no other copy of these pages."""

    meaning = "there is no copy left of a page"
    default_hint = "it was committed with one copy only (replicas=1), or more nodes were lost than it had copies"


class StoresLost(HotpotError):
    """Stores that were not committed have been taken back with their pages, as the home of these was lost or away."""

    meaning = "stores that were not committed were taken back"
    default_hint = "nothing was committed; read the ranges again, and store again"


class NotJoined(HotpotError):
    """There is no Hotpot here: no service, or it has gone."""

    meaning = "no Hotpot service answers"
    default_hint = "is this a blade of a rack, and its agent running?"


class AddressTaken(HotpotError):
    """Something of this program lies where datasets go."""

    meaning = "something of this program lies where datasets go"


class NoUserfaultfd(HotpotError):
    """The kernel does not let this program have its page faults answered."""

    meaning = "userfaultfd is not available"
    default_hint = "it needs root or vm.unprivileged_userfaultfd=1, and Linux 6.4"


class ViewsInUse(HotpotError):
    """There are still views (memoryview, numpy) of a dataset that is to be closed."""

    meaning = "there are still views of the dataset"
    default_hint = "delete or release them first"


ERRORS: dict[str, type[HotpotError]] = {kind.__name__: kind for kind in HotpotError.__subclasses__()}


def from_reply(reply: dict[str, Any]) -> HotpotError:
    """The exception that a reply carries, also one of a kind that is not known here."""
    kind = ERRORS.get(str(reply.get("error")), HotpotError)
    return kind(str(reply.get("message")), hint=str(reply.get("hint", "")))
