"""The step log: whole after a resume, whatever was written before a crash."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cluster.errors import MachineError
from jobs.training.step_log import StepLog, StepRecord, digest_ids, read_steps


def record(step: int) -> StepRecord:
    return StepRecord(step, digest_ids(np.arange(step)), 1 / step, 1e-3, world_size=2)


def test_what_was_logged_after_the_checkpoint_is_undone(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    log = StepLog.resume(path, step=0)
    for step in range(1, 8):
        log.add(record(step))
    log.flush()
    # A crash cuts the last line.
    path.write_bytes(path.read_bytes()[:-10])
    again = StepLog.resume(path, step=4)
    again.add(record(5))
    again.flush()
    assert list(read_steps(path)) == [record(step) for step in range(1, 6)]


@pytest.mark.parametrize(
    "damage",
    [
        b'{"step": "x"',
        b"[" * 200_000,
        b"\xff",
        b'{"step": "x", "rows": "", "loss": 0, "learning_rate": 0, "world_size": 1}',
    ],
)
def test_a_damaged_line_is_the_end(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "steps.jsonl"
    log = StepLog.resume(path, step=0)
    assert log.last is None
    log.add(record(1))
    log.flush()
    path.write_bytes(path.read_bytes() + damage + b"\n")
    assert StepLog.resume(path, step=9).last == record(1)
    assert list(read_steps(path)) == [record(1)]


def test_a_log_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "steps.jsonl").mkdir()
    with pytest.raises(MachineError, match=r"steps.jsonl cannot be used: it is no plain file; "):
        StepLog.resume(tmp_path / "steps.jsonl", step=0)


def test_nothing_is_written_before_it_is_flushed(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    log = StepLog.resume(path, step=0)
    log.add(record(1))
    assert list(read_steps(path)) == []
    log.flush()
    assert list(read_steps(path)) == [record(1)]


def test_the_digest_is_of_the_ids_and_their_order() -> None:
    ids = np.arange(10)
    assert digest_ids(ids) == digest_ids(ids.copy())
    assert digest_ids(ids) != digest_ids(ids[::-1])
