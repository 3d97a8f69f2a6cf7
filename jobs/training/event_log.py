"""The faults of a run as a file, one JSON object a line, kept across restarts of the driver.

log = EventLog(run.path / EVENTS_FILE)
log.add(Fault(120, "worker_lost", "worker 1 was killed; replacing it"))
log.counts()      # {'worker_lost': 1}
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from cluster.database import now
from jobs.training.events import Fault
from jobs.training.plain_files import read_file

logger = logging.getLogger(__name__)

EVENTS_FILE = "events.jsonl"


class EventLog:
    """One run's; raises MachineError if the file cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._kinds = Counter(_kinds_in(path))

    def add(self, fault: Fault) -> None:
        """A disk that takes no more lines must not end the training: the count still rises."""
        self._kinds[fault.kind] += 1
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"at": now(), **asdict(fault)}) + "\n")
        except OSError as error:
            logger.warning("%s does not get this fault: %s", self.path, error.strerror)

    def counts(self) -> dict[str, int]:
        """How many of each kind."""
        return dict(self._kinds)


def _kinds_in(path: Path) -> list[str]:
    """A last line that a crash cut short is none."""
    kinds = []
    for line in (read_file(path) or b"").splitlines():
        try:
            kinds.append(str(json.loads(line)["kind"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return kinds
