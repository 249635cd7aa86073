"""The latest records of datasets that this node has heard of: parts get other homes when nodes die."""

from __future__ import annotations

import threading

from guest_agents.hotpot.lease import Lease
from guest_agents.hotpot.records import Record


class Atlas:
    """Thread-safe."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._records: dict[int, Record] = {}
        self._lock = threading.Lock()

    def learn(self, record: Record) -> Record:
        """Somebody has said this; the latest."""
        with self._lock:
            known = self._records.get(record.id)
            if known is None or sum(record.moves) > sum(known.moves):
                self._records[record.id] = known = record
            return known

    def latest(self, record: Record) -> Record:
        """The latest of this dataset."""
        with self._lock:
            return self._records.get(record.id, record)

    def refresh(self, dataset: int) -> Record:
        """Ask the dispatcher. NoSuchDataset, NodeLost."""
        return self.learn(Record.from_json(self._lease.ask("find", {"dataset": dataset})["record"]))

    def forget(self, dataset: int) -> None:
        """It was deleted."""
        with self._lock:
            self._records.pop(dataset, None)
