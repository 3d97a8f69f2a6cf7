"""Asked to stop, all workers end at the same step, and resume as if nothing had happened."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import StoppedError
from jobs.data.dataset import Dataset
from jobs.training.config import TrainConfig
from jobs.training.events import Event, Fault, Saved
from jobs.training.process_group import start_process_group
from jobs.training.step_log import STEP_LOG_FILE, StepRecord, read_steps
from jobs.training.stopping import stop_on_signals
from jobs.training.worker import WorkerJob, run_worker
from tests.unit.jobs.training.conftest import MakeConfig
from tests.unit.jobs.training.ranks import run_ranks


@pytest.fixture
def config(make_config: MakeConfig) -> TrainConfig:
    return make_config(
        model={"family": "cnn", "channels": [4], "hidden_size": 16, "dropout": 0.0},
        checkpoint={"every_steps": 100},
        recovery={"first_steps": 4},
    )


def stop_and_resume(job: WorkerJob) -> dict[str, Any]:
    """SIGTERM comes to the second worker alone, while it reads the rows of step 4."""
    events: list[Event] = []
    told = ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jobs.training.worker._Worker._export", lambda self: None)
        with stop_on_signals() as request:
            calls = []

            def ask() -> bool:
                calls.append(1)
                if start_process_group().rank == 1 and len(calls) == 4:
                    os.kill(os.getpid(), signal.SIGTERM)
                return request.is_set()

            try:
                run_worker(job, events.append, ask)
            except StoppedError as error:
                told = str(error)
            # What came of it is done; leaving the context shall not end this process.
            request.__init__()  # type: ignore[misc]
        run_worker(job, events.append)
    return {"told": told, "events": events}


def test_one_worker_that_is_asked_stops_all_and_the_run_resumes(
    config: TrainConfig, digits: Dataset, tmp_path: Path
) -> None:
    job = WorkerJob(config, digits.directory, tmp_path / "stopped")
    first, second = run_ranks(stop_and_resume, job, 2)
    assert first["told"] == second["told"] == "stopped at step 4; run it again to resume"
    (fault,) = (event for event in first["events"] if isinstance(event, Fault))
    assert (fault.kind, fault.text) == ("stopped", "asked to stop at step 4 of 8")
    assert [event.step for event in first["events"] if isinstance(event, Saved)] == [4, 8]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jobs.training.worker._Worker._export", lambda self: None)
        run_worker(WorkerJob(config, digits.directory, tmp_path / "alone"), lambda _event: None)
    assert_equal_steps(steps(tmp_path / "stopped"), steps(tmp_path / "alone"))


def steps(run_dir: Path) -> list[StepRecord]:
    return list(read_steps(run_dir / STEP_LOG_FILE))


def assert_equal_steps(found: list[StepRecord], expected: list[StepRecord]) -> None:
    assert [record.rows for record in found] == [record.rows for record in expected]
    losses = [record.loss for record in expected]
    # Other workers add up the same numbers in another order.
    assert [record.loss for record in found] == pytest.approx(losses, rel=1e-4)


def test_a_request_at_the_last_step_changes_nothing(
    config: TrainConfig, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.training.worker._Worker._export", lambda self: None)
    calls: list[int] = []

    def ask_at_the_last() -> bool:
        calls.append(1)
        return len(calls) == config.steps

    job = WorkerJob(config, digits.directory, tmp_path)
    assert run_worker(job, lambda _event: None, ask_at_the_last).metrics


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_once_and_then_does_what_it_did_before(number: signal.Signals) -> None:
    calls: list[int] = []
    before = signal.signal(number, lambda number, _frame: calls.append(number))
    try:
        with stop_on_signals() as request:
            assert not request.is_set()
            os.kill(os.getpid(), number)
            assert request.is_set()
            assert calls == []
            os.kill(os.getpid(), number)
            assert calls == [number]
        # Nothing came of the request, so the signal counts after all.
        assert calls == [number, number]
    finally:
        signal.signal(number, before)
