"""The memory that a blade's agent may register and give to others: one account for all who do."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

_UNIT = 4 << 20
_KEPT = 96 << 20
"""What a memory blade keeps for its own system."""
_LEAST = 16 << 20


class Budget:
    """`total` bytes, of which users take and give back parts. Thread-safe."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._taken: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.spare: Callable[[int], None] = lambda size: None
        """Gives back at least so many bytes of what can be done without, as far as there are any."""

    @property
    def room(self) -> int:
        """Bytes nobody has."""
        return self.total - self._taken.total()

    def press(self, size: int) -> None:
        """Have what can be done without given back until there is room for `size` bytes, if that can be."""
        lacking = size - self.room
        if lacking > 0:
            self.spare(lacking)

    def take(self, user: str, size: int, press: bool = True) -> bool:
        """Take `size` bytes for `user`; False when there are not so many left, although others were pressed."""
        if press:
            self.press(size)
        with self._lock:
            if size > self.room:
                return False
            self._taken[user] += size
            return True

    def grow(self, size: int) -> bool:
        """Have `size` bytes more, or fewer if negative; False when so many are not left."""
        self.press(-size)
        with self._lock:
            if size < -self.room:
                return False
            self.total += size
            return True

    def give(self, user: str, size: int) -> None:
        """Give back what was taken."""
        with self._lock:
            self._taken[user] -= size

    def taken(self) -> dict[str, int]:
        """Bytes by user."""
        with self._lock:
            return {user: size for user, size in self._taken.items() if size}


def budget_of(kind: str) -> Budget:
    """What a blade of this kind can give: a memory blade almost all that is free now, others a quarter of it."""
    free = free_memory()
    size = max(free - _KEPT, _LEAST) if kind == "memory" else free // 4
    return Budget(size // _UNIT * _UNIT)


def free_memory(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes the kernel believes can still be used (MemAvailable)."""
    for line in meminfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) << 10
    raise OSError(f"{meminfo} has no MemAvailable")
