"""Trainings on the stack that are killed, frozen, stopped and resized, and end as unbroken ones."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from cluster.config import load_config
from jobs.prepare import open_catalog
from jobs.training.config import TrainConfig
from jobs.training.step_log import STEP_LOG_FILE, StepRecord, read_steps
from jobs.training.worker import WorkerJob, run_worker
from tests.faulty_runs import FaultyRun
from tests.stack import HELIOSTAT, Stack

# Several trainings each, whose workers start anew after every fault.
pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]

CONFIG: dict[str, Any] = {
    "name": "faulty",
    "data": {"name": "digits", "source": {"kind": "sklearn", "dataset": "digits"}},
    # Without dropout, which differs by worker, any number of workers computes the same.
    "model": {"family": "cnn", "channels": [4], "hidden_size": 16, "dropout": 0.0},
    "schedule": {"kind": "constant"},
    "steps": 600,
    "batch_size": 64,
    # Small, so that steps take long enough to be interfered with.
    "micro_batch_size": 4,
    "evaluate_every_steps": 1000,
    "log_every_steps": 5,
    "checkpoint": {"every_steps": 20},
    "hang_timeout_s": 8,
}
# Workers add up the same fp32 numbers in another order. One worker and two differ by at most 2.3e-7
# of the loss over these steps, and by 3.4e-7 over 1,200 steps of a language model (2026-11, gloo);
# training may amplify that by some orders, a wrong or missing row would show at once.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faults") / "faulty.yaml"
    path.write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def unbroken(
    stack: Stack, config_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[StepRecord]:
    """What one process does that nothing happens to."""
    config = load_config(config_file, TrainConfig, [])
    dataset, _ = open_catalog(stack.settings).ensure(config.data)
    run_dir = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jobs.training.worker._Worker._export", lambda self: None)
        run_worker(WorkerJob(config, dataset.directory, run_dir), lambda _event: None)
    return list(read_steps(run_dir / STEP_LOG_FILE))


def assert_same_run(found: list[StepRecord], expected: list[StepRecord]) -> None:
    """No sample repeated or skipped over committed steps, and the same losses."""
    assert [record.step for record in found] == list(range(1, CONFIG["steps"] + 1))
    assert [record.rows for record in found] == [record.rows for record in expected]
    losses = [record.loss for record in expected]
    assert [record.loss for record in found] == pytest.approx(losses, rel=TOLERANCE)


def test_a_run_whose_workers_are_killed_and_frozen_ends_like_an_unbroken_one(
    stack: Stack, config_file: Path, unbroken: list[StepRecord], tmp_path: Path
) -> None:
    run = FaultyRun.start(stack, config_file, tmp_path / "log", "run_name=killed")
    run.wait_for_step(30)
    run.workers()[-1].kill()
    run.wait_for_text("worker_lost at step")
    run.wait_for_text("resumed from the checkpoint at step")
    run.wait_for_step(run.last_step + 10)
    frozen = run.workers()[0]
    frozen.suspend()
    run.wait_for_text("worker_hung at step")
    assert run.wait() == 0, run.output[-3000:]
    assert not frozen.is_running() or frozen.status() == psutil.STATUS_ZOMBIE
    assert_same_run(run.steps(), unbroken)


def test_a_run_that_is_stopped_and_resized_ends_like_an_unbroken_one(
    stack: Stack, config_file: Path, unbroken: list[StepRecord], tmp_path: Path
) -> None:
    submitted = FaultyRun.start(
        stack,
        config_file,
        tmp_path / "submitted",
        "run_name=resized",
        command=(HELIOSTAT, "submit", "train"),
    )
    submitted.wait_for_step(10)
    job_id = submitted.output.split()[1]
    assert stack.run_cli("jobs", "stop", job_id).returncode == 0
    assert submitted.wait() == 1
    first = stopped_at(submitted)

    alone = FaultyRun.start(
        stack, config_file, tmp_path / "alone", "run_name=resized", "num_workers=1"
    )
    alone.wait_for_step(first + 30)
    alone.process.send_signal(signal.SIGINT)
    assert alone.wait() == 130, alone.output[-3000:]
    second = stopped_at(alone)
    assert f"resized at step {first}: going on with 1 worker(s) instead of 2" in alone.output

    last = FaultyRun.start(stack, config_file, tmp_path / "last", "run_name=resized")
    assert last.wait() == 0, last.output[-3000:]
    assert_same_run(last.steps(), unbroken)
    assert [record.world_size for record in last.steps()] == (
        [2] * first + [1] * (second - first) + [2] * (CONFIG["steps"] - second)
    )


def stopped_at(run: FaultyRun) -> int:
    """The step that it says it has stopped at, which is the last that it has committed."""
    found = re.search(r"^stopped at step (\d+); run it again to resume$", run.output, re.MULTILINE)
    assert found, run.output[-3000:]
    assert run.steps()[-1].step == int(found[1])
    return int(found[1])
