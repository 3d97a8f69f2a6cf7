"""Two real processes over gloo: the same numbers as one, and nobody waits for a failed save."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest

from jobs.data.dataset import Dataset
from jobs.training.checkpointing import FolderStore
from jobs.training.config import TrainConfig
from jobs.training.events import Event, Fault, Progress, Saved
from jobs.training.process_group import start_process_group
from jobs.training.worker import Outcome, WorkerJob, run_worker
from tests.unit.jobs.training.conftest import MakeConfig
from tests.unit.jobs.training.ranks import run_ranks


def train(job: WorkerJob) -> list[Event]:
    events: list[Event] = []
    outcome: Outcome = run_worker(job, events.append)
    assert outcome.exported.directory.is_dir()
    return events


def train_on_a_full_disk(job: WorkerJob) -> list[Event]:
    """The second worker cannot write its part of the first checkpoint."""
    events: list[Event] = []
    group = start_process_group()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if group.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))

    def tell(event: Event) -> None:
        events.append(event)

    write = FolderStore.write

    def write_then_free_space(*arguments: Any) -> None:
        try:
            write(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))

    FolderStore.write = write_then_free_space  # type: ignore[method-assign]
    run_worker(job, tell)
    group.barrier()
    return events


def losses(events: list[Event]) -> dict[int, float]:
    return {event.step: event.loss for event in events if isinstance(event, Progress)}


@pytest.fixture
def config(make_config: MakeConfig) -> TrainConfig:
    # Without dropout, which differs by worker, the mathematics is that of one process.
    model = {"family": "cnn", "channels": [4], "hidden_size": 16, "dropout": 0.0}
    return make_config(
        model=model, checkpoint={"every_steps": 4}, deepspeed={"zero_optimization": {"stage": 2}}
    )


def test_two_workers_have_the_losses_of_one(
    config: TrainConfig, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = run_ranks(train, WorkerJob(config, digits.directory, tmp_path / "two"), 2)
    alone: list[Event] = []
    monkeypatch.setattr("jobs.training.worker._Worker._export", lambda self: None)
    run_worker(WorkerJob(config, digits.directory, tmp_path / "one"), alone.append)
    assert losses(first) == pytest.approx(losses(alone), rel=1e-4)
    assert second == []


def test_a_worker_that_cannot_write_costs_the_checkpoint_and_nothing_else(
    config: TrainConfig, digits: Dataset, tmp_path: Path
) -> None:
    events, _ = run_ranks(train_on_a_full_disk, WorkerJob(config, digits.directory, tmp_path), 2)
    faults = [event.text for event in events if isinstance(event, Fault)]
    assert faults == [
        "checkpoint at step 4 was not saved: 1 worker(s) could not write: [Errno 27] File too large"
    ]
    assert [event.step for event in events if isinstance(event, Saved)] == [8]
    assert sorted(losses(events)) == list(range(1, 9))
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step-00000008"]
