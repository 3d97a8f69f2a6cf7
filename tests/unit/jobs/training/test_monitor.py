"""What evaluations decide: reducing the rate, stopping, and whose weights are the best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ConfigError
from jobs.data.dataset import Dataset
from jobs.training.config import TrainConfig
from jobs.training.events import Decided, Evaluated, Notice, Progress, Started
from jobs.training.monitor import MonitorState, explain, observe
from jobs.training.worker import Outcome, WorkerJob, run_worker
from tests.unit.jobs.training.conftest import MakeConfig
from tests.unit.jobs.training.test_worker import InterruptedRunError, Recorder

PLATEAU: dict[str, Any] = {"kind": "reduce_on_plateau", "factor": 0.5, "patience": 2}
# A rate that rises too far: the validation loss is lowest after 5 steps.
OVERSHOOTING: dict[str, Any] = {
    "optimizer": {"name": "sgd", "learning_rate": 0.5, "momentum": 0.9},
    "schedule": {"kind": "constant", "warmup_steps": 8},
    "gradient_clipping": 0,
    "steps": 12,
    "evaluate_every_steps": 1,
    "checkpoint": {"every_steps": 4, "keep": 1, "blocking": True},
    "early_stopping": {"patience": 3},
}


def states(config: TrainConfig, metric: str, values: list[float]) -> list[MonitorState]:
    found, state = [], MonitorState()
    for step, value in enumerate(values, start=1):
        state = observe(state, config, {metric: value}, step)
        found.append(state)
    return found


def test_the_rate_falls_after_each_stretch_without_improvement(make_config: MakeConfig) -> None:
    config = make_config(schedule={**PLATEAU, "min_ratio": 0.2})
    losses = [1.0, 0.9, 0.9, 0.95, 0.92, 0.8, 0.8, 0.8, 0.8, 0.8]
    scales = [state.rate_scale for state in states(config, "loss", losses)]
    assert scales == [1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.2]


def test_a_run_stops_after_its_patience_and_remembers_its_best(make_config: MakeConfig) -> None:
    config = make_config(early_stopping={"patience": 2, "metric": "accuracy"})
    found = states(config, "accuracy", [0.5, 0.7, 0.6, 0.7])
    assert [state.stopped for state in found] == [False, False, False, True]
    assert found[-1].best_step == 2
    (line,) = explain(found[-2], found[-1], config)
    assert line == (
        "stopped early: validation/accuracy was 0.7 at step 2, and no better in 2 evaluations"
    )


def test_gains_that_are_too_small_or_no_numbers_are_none(make_config: MakeConfig) -> None:
    config = make_config(early_stopping={"patience": 3, "min_improvement": 0.1})
    found = states(config, "loss", [float("nan"), 1.0, 0.95, float("inf"), float("nan")])
    assert [state.best_step for state in found] == [0, 2, 2, 2, 2]
    assert found[-1].stopped


def test_a_metric_that_the_family_lacks_is_refused_before_training(
    make_config: MakeConfig, digits: Dataset, tmp_path: Path
) -> None:
    config = make_config(early_stopping={"metric": "r2"})
    with pytest.raises(ConfigError, match=r"early_stopping.metric is 'r2'.*loss, accuracy"):
        run_worker(WorkerJob(config, digits.directory, tmp_path), Recorder())


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.training.worker._Worker._export", lambda self: None)


def run(config: TrainConfig, dataset: Dataset, run_dir: Path, recorder: Recorder) -> Outcome:
    return run_worker(WorkerJob(config, dataset.directory, run_dir), recorder)


@pytest.mark.usefixtures("no_export")
def test_the_best_weights_are_what_an_early_stop_leaves(
    make_config: MakeConfig, digits: Dataset, tmp_path: Path
) -> None:
    recorder = Recorder()
    outcome = run(make_config(**OVERSHOOTING), digits, tmp_path, recorder)
    by_step = {e.step: e.metrics["loss"] for e in recorder.of(Evaluated) if e.split != "test"}
    best_step = min(by_step, key=by_step.__getitem__)
    assert max(recorder.losses()) == best_step + 3 < 12
    measured = [e.metrics["loss"] for e in recorder.of(Evaluated) if e.split == "validation"]
    assert outcome.metrics["validation/loss"] == pytest.approx(min(measured), rel=1e-6)
    assert "stopped early" in recorder.of(Decided)[0].text


@pytest.mark.usefixtures("no_export")
@pytest.mark.parametrize("interrupted_at", [4, 7])
def test_an_interrupted_run_stops_where_an_unbroken_one_does(
    make_config: MakeConfig, digits: Dataset, tmp_path: Path, interrupted_at: int
) -> None:
    config = make_config(**OVERSHOOTING)
    unbroken, second = Recorder(), Recorder()
    whole = run(config, digits, tmp_path / "unbroken", unbroken)
    with pytest.raises(InterruptedRunError):
        run(config, digits, tmp_path / "broken", Recorder(stop_after=interrupted_at))
    resumed = run(config, digits, tmp_path / "broken", second)
    assert second.of(Started)[0].first_step > 0
    assert max(second.losses()) == max(unbroken.losses())
    assert resumed.metrics == whole.metrics
    again = Recorder()
    assert run(config, digits, tmp_path / "broken", again).metrics == whole.metrics
    assert again.losses() == {}


@pytest.mark.usefixtures("no_export")
def test_a_best_checkpoint_that_is_gone_costs_one_warning(
    make_config: MakeConfig, digits: Dataset, tmp_path: Path
) -> None:
    config = make_config(**OVERSHOOTING)
    run(config, digits, tmp_path, Recorder())
    best, last = sorted((tmp_path / "checkpoints").glob("step-*"))
    best.rename(tmp_path / "elsewhere")
    recorder = Recorder()
    run(config, digits, tmp_path, recorder)
    (notice,) = recorder.of(Notice)
    assert notice.text.endswith(
        "the best, is gone; what is packaged is of step " + str(int(last.name[5:]))
    )


@pytest.mark.usefixtures("no_export")
def test_a_reduced_rate_outlives_an_interruption(
    make_config: MakeConfig, digits: Dataset, tmp_path: Path
) -> None:
    schedule = {**PLATEAU, "patience": 1, "warmup_steps": 8}
    values = {**OVERSHOOTING, "early_stopping": None, "schedule": schedule}
    config = make_config(**values)
    unbroken, first, second = Recorder(), Recorder(stop_after=10), Recorder()
    run(config, digits, tmp_path / "unbroken", unbroken)
    with pytest.raises(InterruptedRunError):
        run(config, digits, tmp_path / "broken", first)
    run(config, digits, tmp_path / "broken", second)
    rates = {event.step: event.learning_rate for event in unbroken.of(Progress)}
    assert second.of(Started)[0].first_step == 8
    assert second.of(Progress)[0].learning_rate == rates[9] < 0.5
    assert {**first.losses(), **second.losses()} == unbroken.losses()
    assert any("learning rate reduced" in event.text for event in unbroken.of(Decided))
