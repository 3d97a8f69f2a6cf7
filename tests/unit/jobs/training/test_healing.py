"""Poisoned rows: found, masked and forgotten, in real trainings."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import JobFailedError
from cluster.storage import Storage
from jobs.data.catalog import DatasetCatalog
from jobs.data.dataset import Dataset
from jobs.training.config import TrainConfig
from jobs.training.events import Evaluated, Event, Fault, Progress, Quarantined, Saved, Started
from jobs.training.step_log import STEP_LOG_FILE, StepRecord, read_steps
from jobs.training.worker import WorkerJob, run_worker
from tests.unit.jobs.training.conftest import MakeConfig
from tests.unit.jobs.training.poison import poisoned, row_of_step
from tests.unit.jobs.training.ranks import run_ranks

BATCH_SIZE, STEPS = 96, 26
"""Hardly two epochs of the 1,258 training rows, so that those of early steps come up twice."""


@dataclass(frozen=True)
class Seen:
    events: list[Event]
    steps: list[StepRecord]

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def losses(self) -> dict[int, float]:
        return {record.step: record.loss for record in self.steps}

    @property
    def final_loss(self) -> float:
        return float(self.of(Evaluated)[-1].metrics["loss"])


class InterruptedRunError(Exception):
    pass


def train(job: WorkerJob, stop_at: int | None = None) -> Seen:
    events: list[Event] = []

    def tell(event: Event) -> None:
        events.append(event)
        if isinstance(event, Progress) and event.step == stop_at:
            raise InterruptedRunError

    with contextlib.suppress(InterruptedRunError):
        run_worker(job, tell)
    return Seen(events, list(read_steps(job.run_dir / STEP_LOG_FILE)))


@pytest.fixture(autouse=True)
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.training.worker._Worker._export", lambda self: None)


@pytest.fixture(scope="module")
def config(make_config: MakeConfig) -> TrainConfig:
    return make_config(
        model={"family": "cnn", "channels": [4], "hidden_size": 16, "dropout": 0.0},
        steps=STEPS,
        batch_size=BATCH_SIZE,
        micro_batch_size=24,
        evaluate_every_steps=100,
        checkpoint={"every_steps": 5},
        recovery={"first_steps": 4, "window_steps": 8},
    )


@pytest.fixture(scope="module")
def clean(config: TrainConfig, digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jobs.training.worker._Worker._export", lambda self: None)
        return train(WorkerJob(config, digits.directory, tmp_path_factory.mktemp("clean")))


@pytest.mark.parametrize(
    ("value", "step", "kind", "back_to"),
    [
        pytest.param(math.nan, 8, "loss_not_finite", "the checkpoint at step 5", id="no number"),
        pytest.param(math.nan, 2, "loss_not_finite", "the beginning", id="before any checkpoint"),
        pytest.param(1e5, 13, "loss_spike", "the checkpoint at step 10", id="spike"),
    ],
)
def test_a_poisoned_row_is_masked_and_the_run_ends_as_without_it(
    config: TrainConfig,
    digits: Dataset,
    clean: Seen,
    tmp_path: Path,
    value: float,
    step: int,
    kind: str,
    back_to: str,
) -> None:
    row = row_of_step(digits, step, BATCH_SIZE, place=30)
    bad = poisoned(digits, tmp_path / "bad", {row: value})
    seen = train(WorkerJob(config, bad.directory, tmp_path / "run"))
    first, second = seen.of(Fault)
    assert (first.step, first.kind) == (step, kind)
    assert first.text.endswith(f"; back to {back_to}")
    assert (second.step, second.kind) == (step, "quarantined")
    assert second.text.startswith(f"rows {row} are masked: their own loss is no number")
    assert [event.rows for event in seen.of(Quarantined)] == [(row,)]
    # Every step was committed once, with the rows of the clean run, and is the same until then.
    assert [record.rows for record in seen.steps] == [record.rows for record in clean.steps]
    before = {number: loss for number, loss in clean.losses.items() if number < step}
    assert before == {number: loss for number, loss in seen.losses.items() if number < step}
    assert seen.losses == pytest.approx(clean.losses, rel=0.1)
    assert seen.final_loss == pytest.approx(clean.final_loss, rel=0.05)
    # It comes up once more in the second epoch, masked.
    assert next(record.step for record in seen.steps if record.num_masked) == step
    assert sum(record.num_masked for record in seen.steps) == 2


def test_what_is_quarantined_stays_so_after_a_resume(
    config: TrainConfig, digits: Dataset, tmp_path: Path
) -> None:
    row = row_of_step(digits, 3, BATCH_SIZE)
    job = WorkerJob(
        config, poisoned(digits, tmp_path / "bad", {row: math.nan}).directory, tmp_path / "run"
    )
    unbroken = train(WorkerJob(config, job.dataset_dir, tmp_path / "unbroken"))
    assert train(job, stop_at=13).of(Quarantined)
    resumed = train(job)
    assert resumed.of(Started)[0].first_step == 10
    assert resumed.of(Fault) == []
    assert resumed.steps == unbroken.steps


def test_no_checkpoint_holds_a_step_gone_wrong(
    config: TrainConfig, digits: Dataset, tmp_path: Path
) -> None:
    row = row_of_step(digits, 10, BATCH_SIZE)
    bad = poisoned(digits, tmp_path / "bad", {row: math.inf})
    seen = train(WorkerJob(config, bad.directory, tmp_path / "run"))
    assert "back to the checkpoint at step 5" in seen.of(Fault)[0].text
    saved = [event.step for event in seen.of(Saved)]
    assert saved == [5, 10, 15, 20, 25, 26]
    quarantined = next(i for i, event in enumerate(seen.events) if isinstance(event, Quarantined))
    assert not any(isinstance(e, Saved) and e.step == 10 for e in seen.events[:quarantined])


def test_too_much_poison_ends_the_run_in_one_line(
    config: TrainConfig, digits: Dataset, tmp_path: Path
) -> None:
    rows = {
        row_of_step(digits, step, BATCH_SIZE, place): math.nan
        for step in (2, 3, 4)
        for place in range(40)
    }
    bad = poisoned(digits, tmp_path / "bad", rows)
    with pytest.raises(JobFailedError, match="would make 120 quarantined rows, and 96 are allowed"):
        train(WorkerJob(config, bad.directory, tmp_path / "run"))


def test_two_workers_find_what_one_finds(
    config: TrainConfig, digits: Dataset, tmp_path: Path
) -> None:
    rows = {
        row_of_step(digits, 7, BATCH_SIZE, place=5): math.nan,
        row_of_step(digits, 7, BATCH_SIZE, place=90): math.nan,
    }
    bad = poisoned(digits, tmp_path / "bad", rows)
    sharded = config.model_copy(update={"deepspeed": {"zero_optimization": {"stage": 2}}})
    alone = train(WorkerJob(config, bad.directory, tmp_path / "one"))
    seen, _ = run_ranks(train, WorkerJob(sharded, bad.directory, tmp_path / "two"), 2)
    assert [event.rows for event in seen.of(Quarantined)] == [tuple(sorted(rows))]
    assert seen.losses == pytest.approx(alone.losses, rel=1e-4)
    assert [record.num_masked for record in seen.steps] == [r.num_masked for r in alone.steps]


def train_texts(jobs: dict[str, WorkerJob]) -> dict[str, Seen]:
    return {name: train(job) for name, job in jobs.items()}


def test_a_spike_in_text_is_found_however_the_model_is_divided(
    make_config: MakeConfig, text_data: dict[str, Any], tmp_path: Path
) -> None:
    values: dict[str, Any] = {
        "data": text_data,
        "model": {"family": "causal_lm", "hidden_size": 32, "num_layers": 2, "num_heads": 4},
        "optimizer": {"learning_rate": 5e-3},
        "schedule": {"kind": "constant"},
        "steps": 40,
        "batch_size": 8,
        "micro_batch_size": 2,
        "checkpoint": {"every_steps": 15},
        "evaluate_every_steps": 100,
        # Late in training, one row of eight that makes no sense raises the mean by so much.
        "recovery": {
            "first_steps": 8,
            "window_steps": 8,
            "spike_factor": 1.0,
            "spike_deviations": 4.0,
            "spike_rise": 0.3,
        },
    }
    catalog = DatasetCatalog(Storage.open(str(tmp_path / "storage")), tmp_path / "cache")
    dataset, _ = catalog.ensure(make_config(**values).data)
    row = row_of_step(dataset, 35, 8, place=5)
    bad = poisoned(dataset, tmp_path / "bad", {row: 299}, column="tokens")
    divided = {
        "copies": {},
        "tensor": {"parallelism": {"tensor": 2}},
        "pipeline": {"parallelism": {"pipeline": 2}},
    }
    found, _ = run_ranks(
        train_texts,
        {
            name: WorkerJob(make_config(**values, **how), bad.directory, tmp_path / name)
            for name, how in divided.items()
        },
        2,
    )
    for name, seen in found.items():
        first, second = seen.of(Fault)
        assert (first.step, first.kind) == (35, "loss_spike"), name
        assert first.text.endswith("back to the checkpoint at step 30"), name
        assert second.text.startswith(f"rows {row} are masked: their own loss is"), name
        assert [record.step for record in seen.steps if record.num_masked] == [35], name
        assert seen.losses == pytest.approx(found["copies"].losses, rel=1e-3), name
