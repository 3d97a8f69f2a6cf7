"""Records are written in batches and in order; what is lost is counted, nobody waits."""

from __future__ import annotations

import logging
import threading

import pytest

from cluster.observability.write_queue import WriteQueue


def test_everything_is_written_in_order() -> None:
    written: list[int] = []
    queue = WriteQueue(written.extend, name="numbers", max_batch=7)
    for number in range(100):
        queue.put(number)
    queue.close()
    assert written == list(range(100))
    assert queue.num_lost == 0


def test_flushing_waits_for_what_is_queued_and_for_no_longer_than_told() -> None:
    gate = threading.Event()
    written: list[int] = []

    def write(batch: list[int]) -> None:
        gate.wait()
        written.extend(batch)

    queue = WriteQueue(write, name="numbers", max_batch=2)
    for number in range(5):
        queue.put(number)
    queue.flush(timeout_s=0.05)
    assert written == []
    gate.set()
    queue.flush()
    assert written == list(range(5))
    queue.close()


def test_a_full_queue_loses_and_does_not_wait(caplog: pytest.LogCaptureFixture) -> None:
    gate = threading.Event()
    written: list[int] = []

    def write(batch: list[int]) -> None:
        gate.wait()
        written.extend(batch)

    queue = WriteQueue(write, name="numbers", max_items=5, max_batch=1)
    with caplog.at_level(logging.WARNING):
        for number in range(100):
            queue.put(number)
        gate.set()
        queue.close()
    assert len(written) + queue.num_lost == 100
    assert queue.num_lost >= 94
    assert "were lost" in caplog.text


def test_a_writer_that_fails_costs_its_batch_only() -> None:
    written: list[int] = []

    def write(batch: list[int]) -> None:
        if 3 in batch:
            raise RuntimeError("server is down")
        written.extend(batch)

    queue = WriteQueue(write, name="numbers", max_batch=1)
    for number in range(6):
        queue.put(number)
    queue.close()
    assert written == [0, 1, 2, 4, 5]
    assert queue.num_lost == 1
