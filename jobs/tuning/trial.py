"""One trial: an ordinary training run without its registration, in a process that Tune started.

It trains like `jobs.train` does, from its newest checkpoint if it was interrupted, and tells Tune
what evaluations measure.

    run_trial({"number": 3}, sweep=sweep)
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from cluster.errors import ConflictError, HeliostatError, JobFailedError
from cluster.settings import Settings
from jobs.prepare import open_catalog
from jobs.train import SweepLink, begin, check_config, log_dataset, peaks_path, tracked
from jobs.training.events import Evaluated, Event, Sink
from jobs.training.following import followed
from jobs.training.ray_trainer import RayLauncher
from jobs.training.run_directory import RunDirectory
from jobs.training.worker import WorkerJob
from jobs.tuning.plan import Plan, Trial

# A killed sweep's trials die some seconds after it, and hold their runs until then.
_LOCK_TIMEOUT_S = 60
FINISHED = "finished"
"""In a result: the trial has done all its steps."""
ERROR = "error"
"""In a result: why the trial failed, in one line."""


@dataclass(frozen=True)
class Sweep:
    """What all trials are told."""

    plan: Plan
    settings: Settings
    run_id: str
    """MLflow run of the sweep."""
    facts: dict[str, str]
    """About where it takes place, for the trials' records."""

    def link(self, trial: Trial) -> SweepLink:
        return SweepLink(
            run_id=self.run_id,
            tags={
                "job": "tune",
                "sweep_run_id": self.run_id,
                "trial": str(trial.number),
                "trial_values": json.dumps(trial.values),
            },
        )


def run_trial(config: dict[str, Any], *, sweep: Sweep) -> dict[str, Any]:
    """Train; the last result for Tune, also of a trial that failed.

    An exception would reach users as Tune's traceback instead of one line.
    """
    trial = sweep.plan.trials[config["number"] - 1]
    try:
        metrics = train_trial(trial, sweep)
    except HeliostatError as error:
        return _failure(sweep, str(error))
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return _failure(sweep, f"{type(error).__name__}: {lines[0]}")
    return {**metrics, "step": trial.config.steps, FINISHED: True}


def _failure(sweep: Sweep, error: str) -> dict[str, Any]:
    # Tune refuses results without the metric.
    return {sweep.plan.metric: math.nan, "step": 0, ERROR: error}


def train_trial(trial: Trial, sweep: Sweep) -> dict[str, float]:
    """Metrics by split and name; raises HeliostatError if the training fails."""
    train_config, settings = trial.config, sweep.settings
    launcher = RayLauncher(train_config, settings)
    launcher.check()
    deepspeed_config = check_config(train_config, launcher.world_size)
    with held(RunDirectory.of(train_config, settings.home)) as run:
        dataset, _ = open_catalog(settings).ensure(train_config.data)
        state = begin(run, train_config, dataset)
        with tracked(
            train_config,
            settings,
            deepspeed_config,
            launcher,
            {**sweep.facts, "dataset_digest": dataset.info.digest},
            state,
            sweep.link(trial),
        ) as tracker:
            state = state.driven(tracker.run_id)
            run.write(state)
            log_dataset(dataset, tracker)
            watch = _Watch(sweep.plan.metric, train_config.steps, tracker.flush)
            job = WorkerJob(
                train_config, dataset.directory, run.path, peaks_path=peaks_path(settings)
            )
            with followed(train_config, settings, dataset, run, state, tracker) as report:
                outcome = launcher.run(job, _both(report, watch))
            value = outcome.metrics[sweep.plan.metric]
            if not math.isfinite(value):
                raise JobFailedError(f"{sweep.plan.metric} is {value}")
    return outcome.metrics


class _Watch:
    """A sink that reports evaluations to Tune, which may end the trial's process for them.

    Not the last: until its result a trial that has all its steps done would count as stopped.
    """

    def __init__(self, metric: str, steps: int, flush: Callable[[], None]) -> None:
        self._metric = metric
        self._steps = steps
        self._flush = flush
        self._last_step = 0

    def __call__(self, event: Event) -> None:
        if not isinstance(event, Evaluated) or event.split != "validation":
            return
        # Early stopping measures its best step once more.
        if not self._last_step < event.step < self._steps:
            return
        from ray import tune

        self._last_step = event.step
        metrics = {f"validation/{name}": value for name, value in event.metrics.items()}
        if math.isfinite(metrics[self._metric]):
            # Its record must show what a stopped trial was judged by.
            self._flush()
            tune.report({**metrics, "step": event.step})


def _both(first: Sink, second: Sink) -> Sink:
    def tell(event: Event) -> None:
        first(event)
        second(event)

    return tell


@contextlib.contextmanager
def held(run: RunDirectory) -> Iterator[RunDirectory]:
    """The run, once its last process has gone."""
    deadline_s = time.monotonic() + _LOCK_TIMEOUT_S
    with contextlib.ExitStack() as stack:
        while True:
            try:
                held = stack.enter_context(run.locked())
                break
            except ConflictError:
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(0.5)
        yield held
