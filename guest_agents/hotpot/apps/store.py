"""A key-value store in a dataset: a hash index, and a sorted one besides; used by many programs on many blades at once.

    from guest_agents import hotpot
    from guest_agents.hotpot.apps.store import Store

    with hotpot.connect() as session, Store.create(session, "people", 64 << 20, replicas=2) as people:
        people.put(b"ada", b"mathematics")
        print(people.get(b"ada"), people.scan(b"a", 10))

Every update is one transaction, and durable in `replicas` places when it returns. A key's bucket is a page with its
records, and as many more as they need; so most updates concern one page, and one owner. The sorted index (tree.py) is
by key, or by whatever `order` makes of a record, as a secondary index.

As a program it does a line after the other of its standard input: `put KEY VALUE`, `get KEY`, `delete KEY`, `scan KEY
COUNT`:

    python3 -m guest_agents.hotpot.apps.store people
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from hashlib import blake2b
from types import TracebackType

from guest_agents import hotpot
from guest_agents.hotpot.apps.pages import FRESH, PAGE, ROOM, Allocator, Page, Row, Work, peek, span
from guest_agents.hotpot.apps.tree import MOST, Tree

Order = Callable[[bytes, bytes], bytes]
_BUCKET, _ABOUT = 2, 3  # kinds of pages
_NAME = b"rackless store 1"
_SPARES, _ROOT, _BUCKETS = PAGE, 2 * PAGE, 3 * PAGE  # where things are
_CHUNK = 64 << 10  # so that also small stores have several owners


def unordered(_key: bytes, _value: bytes) -> bytes:
    """Nothing comes before the key in the sorted index."""
    return b""


class Store:
    """A store that is open; from `create` or `open`. A context manager. Keys have up to 255 bytes; a record, a page."""

    def __init__(self, dataset: hotpot.Dataset, replicas: int, order: Order) -> None:
        """Opened by `open`."""
        self.dataset = dataset
        self.replicas = replicas
        self._order = order
        self._peek = partial(peek, dataset)
        self._spares = Allocator(dataset, dataset.address + _SPARES)
        self._tree = Tree(dataset.address + _ROOT, self._peek, self._spares.take)
        about = self._peek(dataset.address)
        if about.kind != _ABOUT or about.rows[0][0] != _NAME:
            raise hotpot.BadArgument(f"dataset {dataset.name} is no store")
        self._buckets = int.from_bytes(about.rows[0][1], "little")

    @classmethod
    def create(
        cls,
        session: hotpot.Session,
        name: str,
        size: int,
        *,
        replicas: int = 1,
        buckets: int | None = None,
        mode: str = "mrmw",
        order: Order = unordered,
    ) -> Store:
        """Make an empty store of `size` bytes, and open it.

        buckets -- pages that records are hashed to; None: half of all. The others are for the sorted index, and for
            buckets that need more than a page
        replicas, order -- as of `open`
        What Session.create raises; BadArgument when it is too small.
        """
        number = size // PAGE // 2 if buckets is None else buckets
        if number < 1 or _BUCKETS + number * PAGE > size:
            raise hotpot.BadArgument(f"{size} bytes do not make a store with {number} buckets")
        dataset = session.create(name, size, mode=mode, chunk=_CHUNK)
        try:
            dataset.run(partial(cls._format, dataset, number), replicas)
        except BaseException:
            dataset.close()
            session.delete(name)
            raise
        return cls(dataset, replicas, order)

    @classmethod
    def open(cls, session: hotpot.Session, name: str, *, replicas: int = 1, order: Order = unordered) -> Store:
        """Open a store that is there. BadArgument: the dataset is something else.

        replicas -- places where an update of this program is durable when it returns
        order -- of a key and its value: by which (and then by key) the sorted index is sorted; up to 255 bytes. The
            same in all programs
        """
        dataset = session.open(name)
        try:
            return cls(dataset, replicas, order)
        except BaseException:
            dataset.close()
            raise

    @staticmethod
    def _format(dataset: hotpot.Dataset, buckets: int, transaction: hotpot.Transaction) -> None:
        work, spares = Work(transaction), Allocator(dataset, dataset.address + _SPARES)
        work.store(dataset.address, Page(_ABOUT, 0, [(_NAME, buckets.to_bytes(8, "little"), b"")]))
        spares.format(work, dataset.address + _BUCKETS + buckets * PAGE)
        Tree(dataset.address + _ROOT, partial(peek, dataset), spares.take).format(work)

    # Reading

    def get(self, key: bytes) -> bytes | None:
        """The value of a key, None if there is none.

        By plain loads, without asking anybody: what is committed, or what a program of this blade is just committing.
        """
        address = self._bucket(key)
        first = page = self._peek(address)
        while True:
            for found, value, _ in page.rows:
                if found == key:
                    return value
            if not page.link:
                break
            page = self._peek(page.link)
        # With several pages, one may be newer than another: a record can be missed that has just moved.
        return self.read(key) if first.link else None

    def read(self, key: bytes) -> bytes | None:
        """The same in a transaction: what is committed, and nothing else."""
        return self.dataset.run(lambda transaction: self._find(Work(transaction), key)[0])

    def scan(self, start: bytes, count: int, order: bytes = b"") -> list[tuple[bytes, bytes]]:
        """Up to `count` records from (order, start) on, sorted; by plain loads, so not all of one moment."""
        found: list[tuple[bytes, bytes]] = []
        for _, key in self._tree.walk((order, start)):
            if len(found) == count:
                break
            value = self.get(key)
            if value is not None:  # else it has been deleted since
                found.append((key, value))
        return found

    # Changing

    def put(self, key: bytes, value: bytes) -> None:
        """Set the value of a key. BadArgument: it does not fit in a page; what Transaction.commit raises but Retry."""
        self.modify(key, lambda _: value)

    def delete(self, key: bytes) -> bool:
        """Remove a key; whether it was there."""
        return self.modify(key, lambda _: None) is not None

    def modify(self, key: bytes, change: Callable[[bytes | None], bytes | None]) -> bytes | None:
        """Set the value to what `change` makes of it (None: there is none), in one transaction; returns the old one.

        `change` is called again if others were first.
        """
        return self.dataset.run(lambda transaction: self._modify(Work(transaction), key, change), self.replicas)

    def _modify(self, work: Work, key: bytes, change: Callable[[bytes | None], bytes | None]) -> bytes | None:
        old, chain = self._find(work, key)
        new = change(old)
        if new is not None and (not 0 < len(key) <= MOST or span((key, new, b"")) > ROOM):
            raise hotpot.BadArgument(f"a record of {len(key)} and {len(new)} bytes; 255 and all in {ROOM - 6} go")
        before = None if old is None else (self._order(key, old), key)
        after = None if new is None else (self._order(key, new), key)
        if before != after:
            if before is not None:
                self._tree.remove(work, before)
            if after is not None:
                self._tree.add(work, after)
        if new != old:
            self._place(work, chain, key, None if new is None else (key, new, b""))
        return old

    def _find(self, work: Work, key: bytes) -> tuple[bytes | None, dict[int, Page]]:
        """The value, and the pages of the bucket by address."""
        chain: dict[int, Page] = {}
        address, old = self._bucket(key), None
        while address:
            page = chain[address] = work.load(address)
            if page.kind not in (_BUCKET, FRESH) or (page.kind == FRESH and len(chain) > 1):
                raise hotpot.Retry("a page of a bucket has not arrived yet")
            old = next((value for found, value, _ in page.rows if found == key), old)
            address = page.link
        return old, chain

    def _place(self, work: Work, chain: dict[int, Page], key: bytes, row: Row | None) -> None:
        """Take away a key's record, and put the new one there, or where there is room."""
        changed = []
        for address, page in chain.items():
            kept = [other for other in page.rows if other[0] != key]
            if len(kept) < len(page.rows):
                page.rows = kept
                changed.append(address)
        if row is not None:
            roomy = (address for address in (*changed, *chain) if chain[address].room >= span(row))
            address = next(roomy, 0)
            if not address:
                address, last = self._spares.take(work), [*chain][-1]
                chain[address], chain[last].link = Page(), address
                changed.append(last)
            chain[address].rows.append(row)
            changed.append(address)
        for address in dict.fromkeys(changed):
            chain[address].kind = _BUCKET
            work.store(address, chain[address])

    def _bucket(self, key: bytes) -> int:
        number = int.from_bytes(blake2b(key, digest_size=8).digest(), "little") % self._buckets
        return self.dataset.address + _BUCKETS + number * PAGE

    def close(self) -> None:
        """Close the dataset."""
        self.dataset.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def perform(store: Store, words: Sequence[str]) -> Iterator[str]:
    """What a line asks for, as lines of text."""
    do, key, *more = words
    if do == "get":
        value = store.get(key.encode())
        yield "-" if value is None else value.decode()
    elif do == "put":
        store.put(key.encode(), " ".join(more).encode())
    elif do == "delete":
        store.delete(key.encode())
    elif do == "scan":
        yield from (f"{found.decode()} {value.decode()}" for found, value in store.scan(key.encode(), int(more[0])))
    else:
        raise hotpot.BadArgument(f"{do}? put, get, delete and scan there are")


def main(words: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="store", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", help="of the dataset; made if there is none")
    parser.add_argument("--mib", type=int, default=16, help="size of a new one (16)")
    parser.add_argument("--replicas", type=int, default=1, help="places where an update is durable (1)")
    asked = parser.parse_args(words)
    with hotpot.connect() as session:
        with suppress(hotpot.DatasetExists):
            Store.create(session, asked.name, asked.mib << 20, replicas=asked.replicas).close()
        with Store.open(session, asked.name, replicas=asked.replicas) as store:
            for line in sys.stdin:
                for answer in perform(store, line.split()):
                    print(answer, flush=True)


if __name__ == "__main__":
    main()
