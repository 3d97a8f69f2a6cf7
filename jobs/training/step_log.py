"""The step log: what every committed step trained on, so that exactly-once data can be audited.

One JSON object a line: step, digest of the global batch's row ids, loss, learning rate, number of
workers. The first worker writes it beside the checkpoints; going back to a checkpoint cuts it at
that checkpoint's step. It knows nothing of how steps are taken.

    log = StepLog.resume(run_dir / STEP_LOG_FILE, step=100)      # keeps steps 1 to 100
    log.add(StepRecord(step=101, rows=digest_ids(ids), loss=2.3, learning_rate=1e-3, world_size=2))
    log.flush()                                                  # before a checkpoint is written
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from jobs.data.sampler import Ids
from jobs.training.plain_files import read_file, usable

_log = logging.getLogger(__name__)

STEP_LOG_FILE = "steps.jsonl"
_BUFFER_LINES = 1000


@dataclass(frozen=True)
class StepRecord:
    step: int
    rows: str
    """Digest of the row ids of the whole step, in their order."""
    loss: float
    learning_rate: float
    world_size: int
    num_masked: int = 0
    """Rows of the step that were quarantined."""


class StepLog:
    """Appends in memory until flushed.

    Args:
        last: the last step on the disk; None if there is none.
    """

    def __init__(self, path: Path, last: StepRecord | None) -> None:
        self._path, self.last = path, last
        self._lines: list[str] = []

    @classmethod
    def resume(cls, path: Path, *, step: int) -> StepLog:
        """Go on after `step`; what was logged of later steps is undone.

        A last step before `step` says that the steps between are lost.

        Raises:
            MachineError: the file cannot be used.
        """
        with usable(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            size, last = _up_to(read_file(path) or b"", step)
            os.truncate(path, size)
        return cls(path, last)

    def add(self, record: StepRecord) -> None:
        self._lines.append(json.dumps(asdict(record)))
        if len(self._lines) >= _BUFFER_LINES:
            self.flush()

    def flush(self) -> None:
        """On the disk, so that a checkpoint written after it never knows of more steps.

        What cannot be written, to a full disk say, is kept for the next time: it costs the run
        nothing.
        """
        if not self._lines:
            return
        size = self._path.stat().st_size
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in self._lines))
                file.flush()
                os.fsync(file.fileno())
            self._lines.clear()
        except OSError as error:
            os.truncate(self._path, size)
            _log.warning("step log not written, trying again later: %s", error)


def read_steps(path: Path) -> Iterator[StepRecord]:
    """The records in the order of their steps; a line that a crash cut off is the end."""
    if not path.is_file():
        return
    for line in path.read_bytes().splitlines():
        record = _parse(line)
        if record is None:
            return
        yield record


def _up_to(data: bytes, step: int) -> tuple[int, StepRecord | None]:
    """Bytes of the records of no later step, and the last of them."""
    size, last = 0, None
    for line in data.splitlines(keepends=True):
        record = _parse(line) if line.endswith(b"\n") else None
        if record is None or record.step > step:
            break
        size, last = size + len(line), record
    return size, last


def _parse(line: bytes) -> StepRecord | None:
    try:
        record = StepRecord(**json.loads(line))
    except (ValueError, TypeError, RecursionError):
        return None
    return record if isinstance(record.step, int) else None


def digest_ids(ids: Ids) -> str:
    return hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()[:16]
