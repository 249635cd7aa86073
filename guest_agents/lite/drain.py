"""Empty a node of LITE before it is removed: blocks of LMRs move to other nodes while they are used, as by LT_move.

What only programs of that node use stays, for it ends with them; a lock's word cannot move.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from guest_agents.control import Message
from guest_agents.lite.errors import LiteError, NodeDead, NodeUnreachable, NoMemory
from guest_agents.membership import Life

if TYPE_CHECKING:
    from guest_agents.lite.directory import Directory, Entry


def drain(directory: Directory, request: Message, settle: float = 0.5) -> Message:
    """lite.directory.drain: move what lies on `node` and others use, and put no more there where it need not be.

    Answers `moved` (bytes), `own` (LMRs of its own programs alone) and `locks` (names, with users elsewhere). With
    `dry` nothing moves; with `cancel` the node is one as others are again. LMRs whose names begin with `but` are left
    to who has made them. NO_MEMORY when there is no room elsewhere: then some has moved, and the node is as before
    otherwise.
    """
    life = directory.life_of(request["node"])
    dry, but = bool(request.get("dry")), str(request.get("but") or "")
    if request.get("cancel"):
        directory.leaving.discard(life)
        return {}
    if not dry:
        directory.leaving.add(life)
        time.sleep(settle)  # who has just made an LMR learns by the answer where it is: let that arrive
    moved, own = 0, 0
    try:
        for entry in directory.entries():
            with entry.lock:
                here = [index for index, piece in enumerate(entry.record.blocks) if piece.life == life]
                if entry.freed or not here or (but and (entry.record.name or "").startswith(but)):
                    continue
                if entry.mappers() == {life} and not entry.record.keep:
                    own += 1
                    continue
                for index in here:
                    moved += entry.record.blocks[index].length
                    if not dry:
                        _move(directory, entry, index, life)
    except LiteError:
        directory.leaving.discard(life)
        raise
    return {"moved": moved, "own": own, "locks": directory.locks.used_by_others(life)}


def _move(directory: Directory, entry: Entry, index: int, life: Life) -> None:
    failure: LiteError = NoMemory("there is no other node")
    for target in directory.candidates(None, True, life):
        try:
            directory.move_block(entry, index, target)
        except (NoMemory, NodeDead, NodeUnreachable) as error:
            failure = error
        else:
            return
    name = f"LMR {entry.record.name!r}" if entry.record.name else f"an LMR of {entry.record.size} bytes"
    raise NoMemory(f"{name} finds no other node: {failure.message}", hint="add a memory blade, or free some memory")
