"""What a node has of a dataset, page by page, and what is not at rest: for whoever compares nodes."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from guest_agents.hotpot import blocks
from guest_agents.hotpot.blocks import STRIDE, Copy
from guest_agents.hotpot.errors import HotpotError
from guest_agents.hotpot.messages import Message

if TYPE_CHECKING:
    from guest_agents.hotpot.home import Home
    from guest_agents.hotpot.service import Service

MOST_PAGES = 4096
"""Of one dataset; the others are not looked at."""


def audit(service: Service, name: str) -> Message:
    """Of the dataset `name`: pages of homes here with their copies, pages of copies here, and what is still going on.

    A page is [number, version, checksum of its bytes]; version -1: it cannot be read.
    """
    homes = [home for home in service.owner.homes() if home.record.name == name]
    records = [record for record in service.copies.records() if record.name == name]
    return {
        "node": service.node.node_id,
        "homes": [{"part": home.part, "pages": [*_pages_of(home)], "differing": _differing(home)} for home in homes],
        "copies": [_seen(page, service.copies.read(record.id, page))
                   for record in records for page in sorted(service.copies.held(record.id))[:MOST_PAGES]],
        "busy": [*_unrest(service)],
    }  # fmt: skip


def _pages_of(home: Home) -> Iterator[dict[str, Any]]:
    for page in list(home.record.pages_of(home.part))[:MOST_PAGES]:
        try:
            copy = home.read(page)
        except HotpotError as failure:
            yield {"page": _seen(page, None), "wrong": failure.message}
        else:
            yield {"page": _seen(page, copy), "degree": copy.degree, "copies": sorted(home.copies[page])}


def _differing(home: Home) -> list[int]:
    """Pages that readers find otherwise than they are on media."""
    found = []
    for page in list(home.record.pages_of(home.part))[:MOST_PAGES]:
        with suppress(HotpotError):
            block = home.memory.read(STRIDE, at=home.record.slot(page) * STRIDE)
            if blocks.unseal(block) != home.read(page):
                found.append(page)
    return found


def _unrest(service: Service) -> Iterator[str]:
    """What a node has still to do, in words."""
    for entry in service.owner.entries():
        yield f"transaction {entry.xid:x} is {entry.state.name}"
    for home in service.owner.homes():
        key = f"part {home.part} of {home.record.name}"
        if not home.ready:
            yield f"{key} is not in use yet"
        if home.locks or home.claims:
            yield f"{key} has locks of {sorted({*home.locks.values(), *home.claims})}"
        if home.short:
            yield f"{key} has too few copies of pages {sorted(home.short)[:10]}"
        if home.missed & service.links.living():
            yield f"{key} has news for nodes {sorted(home.missed)}"
    for record in service.copies.records():
        if any(service.copies.doubtful(record.id, part) for part in range(len(record.homes))):
            yield f"copies of {record.name} are doubtful"
    if service.coordinator.unfinished:
        yield f"{service.coordinator.unfinished} commits go on by themselves"
    if not service.lease.valid:
        yield "the dispatcher has not answered lately"
    if suspects := service.suspects():
        yield f"cached pages may be old: {suspects}"


def _seen(page: int, copy: Copy | None) -> list[int]:
    return [page, -1, 0] if copy is None else [page, copy.version, zlib.crc32(copy.data)]
