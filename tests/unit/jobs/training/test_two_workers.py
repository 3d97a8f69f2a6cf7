"""Two real processes over gloo: the same numbers as one, and nobody waits for a failed save."""

from __future__ import annotations

import multiprocessing
import os
import resource
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.data.dataset import Dataset
from jobs.training.config import TrainConfig
from jobs.training.events import Event, Notice, Progress, Saved
from jobs.training.process_group import start_process_group
from jobs.training.worker import Outcome, WorkerJob, run_worker
from tests.unit.jobs.training.conftest import MakeConfig

Task = Callable[[int, WorkerJob], Any]


def _enter(task: Task, job: WorkerJob, rank: int, port: int, results: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    results.put((rank, task(rank, job)))


def run_two(task: Task, job: WorkerJob) -> list[Any]:
    """What `task` returns in each of two fresh processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "deepspeed", "jobs.training.worker"])
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    results = context.SimpleQueue()
    workers = [
        context.Process(target=_enter, args=(task, job, rank, port, results)) for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    try:
        assert [worker.exitcode for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    return [value for _, value in sorted(results.get() for _ in workers)]


def train(_rank: int, job: WorkerJob) -> list[Event]:
    events: list[Event] = []
    outcome: Outcome = run_worker(job, events.append)
    assert outcome.exported.directory.is_dir()
    return events


def train_on_a_full_disk(rank: int, job: WorkerJob) -> list[Event]:
    """The second worker cannot write its part of the first checkpoint."""
    events: list[Event] = []
    group = start_process_group()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))

    def tell(event: Event) -> None:
        events.append(event)

    from jobs.training import worker as module

    save = module.save_together

    def save_then_free_space(*arguments: Any) -> Any:
        try:
            return save(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))

    module.save_together = save_then_free_space
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
    first, second = run_two(train, WorkerJob(config, digits.directory, tmp_path / "two"))
    alone: list[Event] = []
    monkeypatch.setattr("jobs.training.worker._Worker._export", lambda self: None)
    run_worker(WorkerJob(config, digits.directory, tmp_path / "one"), alone.append)
    assert losses(first) == pytest.approx(losses(alone), rel=1e-4)
    assert second == []


def test_a_worker_that_cannot_write_costs_the_checkpoint_and_nothing_else(
    config: TrainConfig, digits: Dataset, tmp_path: Path
) -> None:
    events, _ = run_two(train_on_a_full_disk, WorkerJob(config, digits.directory, tmp_path))
    notices = [event.text for event in events if isinstance(event, Notice)]
    assert notices == ["checkpoint at step 4 was not saved: 1 worker(s) could not write"]
    assert [event.step for event in events if isinstance(event, Saved)] == [8]
    assert sorted(losses(events)) == list(range(1, 9))
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step-00000008"]
