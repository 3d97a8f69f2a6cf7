"""The long forms of tests/integration/test_faults.py: many faults, torchrun, and a lost node."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import load_config
from jobs.prepare import open_catalog
from jobs.training.config import TrainConfig
from jobs.training.step_log import STEP_LOG_FILE, StepRecord, read_steps
from jobs.training.worker import WorkerJob, run_worker
from tests.faulty_runs import FaultyRun
from tests.stack import ROOT, Stack

pytestmark = [pytest.mark.stack, pytest.mark.soak, pytest.mark.timeout(3600)]

STEPS = 1200
TORCHRUN = Path(sys.executable).parent / "torchrun"
# See tests/integration/test_faults.py.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("long")
    lines = [f"{n} squared is {n * n}, and mirror number {n} turns\n" for n in range(4000)]
    (directory / "text.txt").write_text("".join(lines), encoding="utf-8")
    values = {
        "name": "long",
        "data": {
            "name": "long",
            "source": {"kind": "text", "paths": [str(directory / "text.txt")]},
            "splits": {"by": "position"},
            "text": {"tokenizer": {"kind": "bpe", "vocab_size": 400}, "sequence_length": 32},
        },
        "model": {"family": "causal_lm", "hidden_size": 64, "num_layers": 2, "num_heads": 4},
        "optimizer": {"learning_rate": 1e-3},
        "steps": STEPS,
        "batch_size": 16,
        "micro_batch_size": 4,
        "evaluate_every_steps": 400,
        "log_every_steps": 5,
        "checkpoint": {"every_steps": 25},
        "deepspeed": {"zero_optimization": {"stage": 2}},
        "hang_timeout_s": 15,
        "max_failures": 20,
    }
    path = directory / "long.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def unbroken(
    stack: Stack, config_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[StepRecord]:
    config = load_config(config_file, TrainConfig, [])
    dataset, _ = open_catalog(stack.settings).ensure(config.data)
    run_dir = tmp_path_factory.mktemp("unbroken")
    run_worker(WorkerJob(config, dataset.directory, run_dir), lambda _event: None)
    return list(read_steps(run_dir / STEP_LOG_FILE))


def assert_same_run(found: list[StepRecord], expected: list[StepRecord]) -> None:
    assert [record.step for record in found] == list(range(1, STEPS + 1))
    assert [record.rows for record in found] == [record.rows for record in expected]
    losses = [record.loss for record in expected]
    assert [record.loss for record in found] == pytest.approx(losses, rel=TOLERANCE)


def test_a_worker_killed_or_frozen_every_hundred_steps(
    stack: Stack, config_file: Path, unbroken: list[StepRecord], tmp_path: Path
) -> None:
    run = FaultyRun.start(stack, config_file, tmp_path / "log", "run_name=many-faults")
    harms = itertools.cycle((signal.SIGKILL, signal.SIGSTOP))
    for number, step in enumerate(range(100, STEPS - 100, 100)):
        run.wait_for_step(step, timeout_s=300)
        workers = run.workers()
        workers[number % len(workers)].send_signal(next(harms))
        faults = number + 1
        run.wait_for(lambda faults=faults: run.output.count("worker_lost") >= faults, "a fault")
        run.wait_for(lambda faults=faults: run.output.count("resumed") >= faults, "going on")
    assert run.wait(600) == 0, run.output[-3000:]
    assert_same_run(run.steps(), unbroken)


def test_torchrun_is_stopped_in_order_and_resumes(
    stack: Stack, config_file: Path, unbroken: list[StepRecord], tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "command": (TORCHRUN, "--nproc-per-node", "2", "-m", "jobs.train"),
    }
    overrides = ("run_name=torchrun", "launcher=local")
    first = FaultyRun.start(stack, config_file, tmp_path / "first", *overrides, **options)
    first.wait_for_step(60)
    first.process.terminate()
    assert first.wait() != 0
    stopped = first.steps()[-1].step
    assert f"stopped at step {stopped}; run it again to resume" in first.output
    second = FaultyRun.start(stack, config_file, tmp_path / "second", *overrides, **options)
    assert second.wait(600) == 0, second.output[-3000:]
    assert f"resumed from the checkpoint at step {stopped}" in second.output
    assert_same_run(second.steps(), unbroken)


def test_a_node_that_is_lost_and_another_that_joins_resize_the_run(
    stack: Stack, config_file: Path, unbroken: list[StepRecord], tmp_path: Path
) -> None:
    """On a Ray cluster of its own, of two nodes with one CPU each."""
    dataset, _ = open_catalog(stack.settings).ensure(load_config(config_file, TrainConfig, []).data)
    script = Path(__file__).parent / "elastic_cluster.py"
    done = subprocess.run(
        [sys.executable, script, config_file, dataset.directory, tmp_path],
        cwd=ROOT,
        env={**stack.environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = list(read_steps(tmp_path / "run" / STEP_LOG_FILE))
    assert_same_run(found, unbroken)
    sizes = [size for size, _ in itertools.groupby(record.world_size for record in found)]
    assert sizes == [2, 1, 2]
