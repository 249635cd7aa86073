"""LITE-DSM: memory that programs on several blades share and cache; one writer or many readers, release consistency.

    from guest_agents.lite.apps.dsm import Shared
    with Shared(node, "table", size=1 << 20, port=7, homes=["mb0", "mb1"]) as shared:
        with shared.writing(0, 8) as view: view[:] = b"01234567"
        with shared.reading(0, 8) as view: print(bytes(view))

Each page has its home in the LMR of that name. Whoever wants to write acquires the pages' locks, and at release writes
them back and has all who cache them invalidate their copies (by RPC, all at once) before it lets go. So a reader that
acquires after a release sees what was written; until it acquires anew, it keeps what it had.

As a program it counts the letters of a text, each member a part of its lines, in a table all of them write to:

    python3 -m guest_agents.lite.apps.dsm letters text --member 0 --members 2 --homes mb0 --port 7
"""

from __future__ import annotations

import argparse
import struct
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType

from guest_agents import lite

PAGE = 4096
MEMBERS = 64  # a bit of a word for each
PAGE_NUMBER = struct.Struct("<I")
ADDRESS = struct.Struct("<II")  # node id, port
TIMEOUT_SECONDS = 60.0


class Shared:
    """`size` bytes shared under `name`. One of the processes makes them, the others find them."""

    def __init__(self, node: lite.Node, name: str, size: int, port: int, homes: Sequence[str] = ()) -> None:
        """Take part, with a port of this node that no other process uses.

        homes -- nodes that hold the pages, if this is the first to come (none: this one)
        """
        self.node = node
        self.name = name
        self.pages = -(-size // PAGE)
        self._words = 8 + 8 * MEMBERS  # of the books: number of members, their addresses, then a word for each page
        with node.lock(f"{name}.start"):
            try:
                self._books = node.malloc(self._words + 8 * self.pages, name=f"{name}.books")
                self._home = node.malloc(self.pages * PAGE, list(homes) or None, spread=len(homes) > 1, name=name)
            except lite.NameTaken:
                self._books = node.map(f"{name}.books", lite.Permission.USE | lite.Permission.ATOMIC)
                self._home = node.map(name)
            self.member = self._books.fetch_add(0, 1)
            if self.member >= MEMBERS:
                raise lite.BadArgument(f"{MEMBERS} processes share {name} already")
            self._books.write(ADDRESS.pack(node.node_id, port), at=8 + 8 * self.member)
        self._memory = bytearray(self.pages * PAGE)
        self._valid = [False] * self.pages
        self._invalidated = [0] * self.pages  # how often: a fetch that met an invalidation must be done again
        self._fetching = threading.Lock()
        self._locks: dict[int, lite.Lock] = {}
        self.fetches = 0
        """Pages fetched from their homes."""
        self._port = node.register(port, max_message=4096)
        self._server = threading.Thread(target=self._port.serve, args=(self._invalidate,), daemon=True)
        self._server.start()

    @contextmanager
    def reading(self, offset: int, length: int) -> Iterator[memoryview]:
        """Acquire for reading: the bytes as they were when their last writer released them, or newer."""
        for page in self._range(offset, length):
            self._fetch(page)
        yield memoryview(self._memory).toreadonly()[offset : offset + length]

    @contextmanager
    def writing(self, offset: int, length: int) -> Iterator[memoryview]:
        """Acquire for writing, alone; at the end of the block all see what was written. Do not nest."""
        pages = self._range(offset, length)
        with ExitStack() as locks:
            for page in pages:  # in ascending order, as everybody: so nobody waits in a circle
                locks.enter_context(self._lock(page))
            for page in pages:
                self._fetch(page)
            yield memoryview(self._memory)[offset : offset + length]
            for page in pages:
                self._home.write_async(memoryview(self._memory)[page * PAGE : (page + 1) * PAGE], at=page * PAGE)
            self.node.fence()
            self._tell(pages)

    def _range(self, offset: int, length: int) -> range:
        if offset < 0 or length < 1 or offset + length > self.pages * PAGE:
            raise lite.OutOfRange(f"{length} bytes at {offset} of {self.pages * PAGE}")
        return range(offset // PAGE, (offset + length - 1) // PAGE + 1)

    def _lock(self, page: int) -> lite.Lock:
        if page not in self._locks:
            self._locks[page] = self.node.lock(f"{self.name}.{page}")
        return self._locks[page]

    def _fetch(self, page: int) -> None:
        """Make this process's copy valid. The bit in the page's word says that writers must tell us."""
        with self._fetching:
            while not self._valid[page]:
                before = self._invalidated[page]
                word = self._word(page)
                if not word & 1 << self.member:
                    self._books.fetch_add(self._words + 8 * page, 1 << self.member)
                self._home.read_into(memoryview(self._memory)[page * PAGE : (page + 1) * PAGE], at=page * PAGE)
                self.fetches += 1
                self._valid[page] = before == self._invalidated[page]

    def _tell(self, pages: Sequence[int]) -> None:
        """Have all others who cache these pages invalidate them, and wait until they have."""
        told: list[lite.Ticket[bytes]] = []
        for page in pages:
            word = self._word(page)
            own = word & 1 << self.member
            while (seen := self._books.compare_swap(self._words + 8 * page, word, own)) != word:
                word = seen
            for member in range(MEMBERS):
                if word >> member & 1 and member != self.member:
                    node, port = ADDRESS.unpack(self._books.read(8, at=8 + 8 * member))
                    told.append(self.node.call_async(node, port, PAGE_NUMBER.pack(page), timeout=TIMEOUT_SECONDS))
        for ticket in told:
            with suppress(lite.NodeDead, lite.PortClosed):  # it has left, and its copy with it
                ticket.wait()

    def _word(self, page: int) -> int:
        return int.from_bytes(self._books.read(8, at=self._words + 8 * page), "little")

    def _invalidate(self, request: lite.Request) -> bytes:
        (page,) = PAGE_NUMBER.unpack(request.data)
        self._invalidated[page] += 1
        self._valid[page] = False
        return b""

    def close(self) -> None:
        """Take part no longer. What all have left is gone."""
        self._port.close()
        self._server.join()
        self._home.unmap()
        self._books.unmap()

    def __enter__(self) -> Shared:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def count_letters(shared: Shared, lines: Sequence[str]) -> None:
    """Add the letters a to z of `lines` to the table: 26 words, a page each, so that members meet at some only."""
    for letter, count in Counter(char for line in lines for char in line.lower() if "a" <= char <= "z").items():
        with shared.writing((ord(letter) - ord("a")) * PAGE, 8) as view:
            view[:] = (int.from_bytes(view, "little") + count).to_bytes(8, "little")


def main(words: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="dsm", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("do", choices=["letters"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--member", type=int, default=0, help="which of the programs this is, from 0")
    parser.add_argument("--members", type=int, default=1, help="how many there are (1)")
    parser.add_argument("--homes", default="", help="blades that hold the pages (this one)")
    parser.add_argument("--port", type=int, default=7, help="a port of this blade's for invalidations (7)")
    parser.add_argument("--turns", type=int, default=4, help="how often to add to the table (4)")
    asked = parser.parse_args(words)
    lines = asked.file.read_text(errors="replace").splitlines()
    with lite.connect() as node:
        homes = [name for name in asked.homes.split(",") if name]
        with Shared(node, "letters", 26 * PAGE, asked.port, homes) as shared:
            node.barrier("letters.begin", asked.members, TIMEOUT_SECONDS)
            for turn in range(asked.turns):
                count_letters(shared, lines[asked.member :: asked.members][turn :: asked.turns])
            node.barrier("letters.counted", asked.members, TIMEOUT_SECONDS)
            for letter in range(26):
                with shared.reading(letter * PAGE, 8) as view:
                    print(chr(ord("a") + letter), int.from_bytes(view, "little"))
            node.barrier("letters.printed", asked.members, TIMEOUT_SECONDS)


if __name__ == "__main__":
    main()
