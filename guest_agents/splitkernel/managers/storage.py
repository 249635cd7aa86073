"""The global storage manager (GSM): which storage blade has the files of a vNode, and which memory blade their buffers
(LegoOS, 4.6).

LegoOS computes the first from the vNode's id (gsm: vid % 2) and logs it; here it is part of the vNode. The second is a
constant there. Here every processor blade computes it from who lives: it changes only when a blade comes or goes.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from guest_agents.splitkernel.managers.vnode import DEFAULT, VNode


def choose(blades: Sequence[str], vnodes: Iterable[VNode]) -> str | None:
    """The storage blade with the fewest vNodes, the first of equal ones; None if there is no storage blade."""
    served = Counter(vnode.storage for vnode in vnodes)
    return min(sorted(blades), key=lambda blade: served[blade], default=None)


def buffers(vnodes: Mapping[str, VNode], storage: str, path: str, living: Collection[str]) -> str | None:
    """The memory blade with the buffers of a file, of its vNode's that live: its home. None if none lives.

    vnodes -- by name
    path -- at the storage blade `storage`: a vNode's files are below its name, all others are the default one's
    """
    vnode = vnodes.get(path.partition("/")[0])
    name = DEFAULT
    if vnode is not None and vnode.storage == storage:
        name, living = vnode.name, [blade for blade in living if blade in vnode.memory]
    return max(sorted(living), key=lambda blade: zlib.crc32(f"{name} {blade}".encode()), default=None)
