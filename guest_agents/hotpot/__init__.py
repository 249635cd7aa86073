"""Hotpot: one dataset in the memory of programs on many blades, at the same address, with durable atomic commits.

    from guest_agents import hotpot

    with hotpot.connect() as session, session.create("notes", 16 << 20) as notes:
        with notes.transaction(replicas=2) as t:
            t.acquire(4096, 5)[:] = b"hello"
        print(bytes(notes.memory[4096:4101]))

docs/hotpot.md explains it, and says what of the paper is not here yet.
"""

from __future__ import annotations

from guest_agents.hotpot.dataset import Dataset, Transaction
from guest_agents.hotpot.errors import (
    AddressTaken,
    BadArgument,
    Corrupt,
    DatasetBusy,
    DatasetExists,
    FewerCopies,
    HotpotError,
    InDoubt,
    Isolated,
    NodeLost,
    NoSpace,
    NoSuchDataset,
    NoSuchTransaction,
    NotClean,
    NotJoined,
    NotMapped,
    NoUserfaultfd,
    OldMedia,
    Overlap,
    PagesLost,
    Retry,
    StoresLost,
    TooFewNodes,
    TooLarge,
    VersionMismatch,
    ViewsInUse,
)
from guest_agents.hotpot.session import Session, connect

__all__ = [
    "AddressTaken",
    "BadArgument",
    "Corrupt",
    "Dataset",
    "DatasetBusy",
    "DatasetExists",
    "FewerCopies",
    "HotpotError",
    "InDoubt",
    "Isolated",
    "NoSpace",
    "NoSuchDataset",
    "NoSuchTransaction",
    "NoUserfaultfd",
    "NodeLost",
    "NotClean",
    "NotJoined",
    "NotMapped",
    "OldMedia",
    "Overlap",
    "PagesLost",
    "Retry",
    "Session",
    "StoresLost",
    "TooFewNodes",
    "TooLarge",
    "Transaction",
    "VersionMismatch",
    "ViewsInUse",
    "connect",
]
