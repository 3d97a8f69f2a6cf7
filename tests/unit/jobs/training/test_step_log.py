"""The step log: whole after a resume, whatever was written before a crash."""

from __future__ import annotations

from pathlib import Path

import numpy as np

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
