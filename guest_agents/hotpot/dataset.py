"""A dataset as a program has it: memory at a fixed address, and transactions on it."""

from __future__ import annotations

import random
import time
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from guest_agents.hotpot import mapping, watch
from guest_agents.hotpot.errors import NotMapped, Retry, ViewsInUse
from guest_agents.hotpot.records import Area

if TYPE_CHECKING:
    from guest_agents.hotpot.session import Session

T = TypeVar("T")
_BACKOFF_SECONDS = 0.002
_BACKOFF_MOST = 0.2


class Transaction:
    """Ranges of a dataset that are committed together, or not at all; from `Dataset.transaction`.

    As a context manager it commits at the end of the block, and aborts when that is left by an exception. An abort, and
    a commit that is refused, take back what was stored in the pages it had acquired.
    """

    def __init__(self, dataset: Dataset, replicas: int) -> None:
        """Begun by the dataset."""
        self.dataset = dataset
        self.replicas = replicas
        """Copies on persistent memory of different nodes that each page has after the commit, at least."""
        self._xid: int = dataset._ask("begin")["xid"]
        self._ended = False

    def acquire(self, at: int, length: int) -> memoryview:
        """Add a range to the transaction (acquire, MRSW; begin-xact): its bytes, up to date, to be read and changed.

        Retry: somebody on this node (MRSW: in the rack) has acquired or is committing one of its pages.
        NotClean, NotMapped, Overlap (with what it has acquired before).
        """
        return self.acquire_all((at, length))[0]

    def acquire_all(self, *areas: Area) -> list[memoryview]:
        """The same for several ranges (offset, length): all of them, or none."""
        self.dataset.session.ask("acquire", xid=self._xid, areas=areas)
        return [self.dataset.memory[at : at + length] for at, length in areas]

    def commit(self, replicas: int | None = None) -> None:
        """Make the acquired ranges durable and visible, at once. Retry: others were first, nothing took place.

        TooFewNodes, TooLarge, NodeLost: nothing took place. InDoubt, FewerCopies: it did, with what they say.
        """
        wanted = self.replicas if replicas is None else replicas
        self._ended = True
        self.dataset.session.ask("commit", xid=self._xid, replicas=wanted)

    def abort(self) -> None:
        """End the transaction; the pages it had acquired are what was last committed."""
        self._ended = True
        self.dataset.session.ask("abort", xid=self._xid)

    def __enter__(self) -> Transaction:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ended:
            return
        if kind is None:
            self.commit()
        else:
            self.abort()


class Dataset:
    """A dataset that this process has open; from `Session.open` or `Session.create`. A context manager.

    Load and store by `memory`; what is stored stays on this node until it is committed. All programs of a node see
    each other's stores; those of other nodes see what is committed.
    """

    def __init__(self, session: Session, name: str) -> None:
        """Opened by the session."""
        self.session = session
        self.name = name
        about, memory, self._faults, self._watch = session.attach(name)
        self._number: int = about["id"]
        self.size: int = about["size"]
        """Bytes."""
        self.address: int = about["address"]
        self.mode: str = about["mode"]
        self.memory = memory
        """All of its bytes; numpy.frombuffer(dataset.memory, ...) makes an array of them. They are at `address` in
        every program of every node, so pointers into it can be stored in it."""

    def transaction(self, replicas: int = 1) -> Transaction:
        """Begin a transaction. `replicas`: copies of what it commits, the home included."""
        return Transaction(self, replicas)

    def run(self, body: Callable[[Transaction], T], replicas: int = 1, timeout: float = 60.0) -> T:
        """Run `body` in a transaction and commit it, again when others were first. Retry after `timeout` seconds."""
        deadline, pause = time.monotonic() + timeout, _BACKOFF_SECONDS
        while True:
            try:
                with self.transaction(replicas) as transaction:
                    return body(transaction)
            except Retry:
                if time.monotonic() > deadline:
                    raise
                time.sleep(random.uniform(0, pause))
                pause = min(2 * pause, _BACKOFF_MOST)

    def commit(self, *areas: Area, replicas: int = 1) -> None:
        """Commit what was stored in ranges (offset, length) without a transaction (atomic commit, xact_id -1).

        All or nothing, over whatever others have committed there meanwhile; stores outside the ranges stay uncommitted.
        Retry: nothing took place, the stores are still there. StoresLost: nothing took place, and they had to be taken
        back. The rest as of Transaction.commit.
        """
        self._ask("commit_areas", areas=areas, replicas=replicas)

    def discard(self, *areas: Area) -> None:
        """Take back what was stored in the pages of ranges without a transaction. NotClean: a transaction has one."""
        self._ask("discard", areas=areas)

    def migrate(self, at: int, node: int) -> None:
        """Begin to move all chunks that the owner of the byte at `at` has of the dataset to a node (id).

        Returns at once; reads and commits go on, and for a moment commits are told to retry. It may not come to be: the
        node dies, or has no room. BadArgument, NotMapped, NodeLost; Retry: they are moving already.
        """
        self.session.ask("migrate", dataset=self._number, at=at, node=node)

    def close(self) -> None:
        """Unmap it; what was not committed is gone when no program of this node has it open. ViewsInUse."""
        if self._faults < 0:
            return
        array = weakref.ref(self.memory.obj)
        self.memory.release()
        if (in_use := array()) is not None:
            self.memory = memoryview(in_use).cast("B")
            raise ViewsInUse(f"there are still views of {self.name!r}")
        faults, self._faults = self._faults, -1
        watch.stop(self._watch)
        mapping.unmap(self.address, self.size)
        self.session.detach(self._number, faults)

    def __enter__(self) -> Dataset:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except ViewsInUse:
            if kind is None:  # else what was raised is more important, and its traceback may be what holds the views
                raise

    def __len__(self) -> int:
        return self.size

    def _ask(self, op: str, areas: Sequence[Area] | None = None, **fields: object) -> dict[str, int]:
        if self._faults < 0:
            raise NotMapped(f"{self.name!r} is closed")
        more = {} if areas is None else {"areas": areas}
        return self.session.ask(op, dataset=self._number, **more, **fields)
