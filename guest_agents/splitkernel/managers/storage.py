"""The global storage manager (GSM): which storage blade has the files of a vNode (LegoOS, 4.6).

LegoOS computes it from the vNode's id (gsm: vid % 2) and logs it; here it is part of the vNode.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from guest_agents.splitkernel.managers.vnode import VNode


def choose(blades: Sequence[str], vnodes: Iterable[VNode]) -> str | None:
    """The storage blade with the fewest vNodes, the first of equal ones; None if there is no storage blade."""
    served = Counter(vnode.storage for vnode in vnodes)
    return min(sorted(blades), key=lambda blade: served[blade], default=None)
