"""Ray Tune as what starts trials, stops the hopeless ones, and says how they end.

All knowledge of Tune is here. It gets points that are already drawn, so that its search has nothing
to decide; its own record of the sweep is thrown away, the ledger is ours.

    run_trials(sweep, todo, on_end=ledger.record, max_concurrent=1)
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

from ray import tune
from ray.tune.error import TuneError
from ray.tune.experimental.output import AirVerbosity, ProgressReporter

from cluster.errors import JobFailedError, StoppedError
from cluster.tracking import close_run
from jobs.training.run_directory import RunDirectory
from jobs.tuning.config import AshaScheduler
from jobs.tuning.ledger import TrialRecord
from jobs.tuning.plan import Plan, Trial
from jobs.tuning.trial import ERROR, FINISHED, Sweep, run_trial

# Bytes. Tune wants something reserved, and with a share of a CPU a trial's workers would not fit.
_NEXT_TO_NOTHING = {"memory": 1}

OnStart = Callable[[Trial], None]
OnEnd = Callable[[Trial, TrialRecord], None]


def run_trials(
    sweep: Sweep, todo: Sequence[Trial], *, max_concurrent: int, on_start: OnStart, on_end: OnEnd
) -> None:
    """Returns when all have ended; a failed one ends nothing but itself."""
    # It shows tracebacks; `on_end` gets one line.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    scratch = sweep.settings.home / "ray_tune"
    name = f"{sweep.plan.config.name}-{uuid.uuid4().hex[:8]}"
    scheduler = make_scheduler(sweep.plan)
    recorder = _Recorder(sweep, on_start, on_end)
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(run_trial, sweep=sweep), _NEXT_TO_NOTHING),
        param_space={"number": tune.grid_search([trial.number for trial in todo])},
        tune_config=tune.TuneConfig(
            metric=sweep.plan.metric,
            mode="max" if sweep.plan.config.is_maximised else "min",
            scheduler=scheduler,
            max_concurrent_trials=max_concurrent,
            # A stopped trial's process still waits for its workers: only its death ends them.
            reuse_actors=scheduler is None,
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=str(scratch),
            verbose=0,
            callbacks=[recorder, _Silence(AirVerbosity.SILENT)],
        ),
    )
    try:
        with _ending_in_order(recorder.is_stopping):
            tuner.fit()
    except TuneError as error:
        raise JobFailedError(
            f"Ray Tune failed: {str(error).strip().splitlines()[-1][:300]}",
            hint="run the same command again; trials that have ended are not repeated",
        ) from error
    finally:
        recorder.abandon()
        shutil.rmtree(scratch / name, ignore_errors=True)
    if recorder.is_stopping.is_set():
        raise StoppedError(
            "the sweep was stopped",
            hint="run the same command again: trials that have ended are not repeated",
        )


@contextlib.contextmanager
def _ending_in_order(is_stopping: threading.Event) -> Iterator[None]:
    """Let SIGTERM end Tune as SIGINT does: an exception would be lost in Ray's own code."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        is_stopping.set()
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def make_scheduler(plan: Plan) -> Any:
    """Tune's scheduler; None lets every trial run to its end."""
    config = plan.config.scheduler
    if not isinstance(config, AshaScheduler):
        return None
    from ray.tune.schedulers import ASHAScheduler

    return ASHAScheduler(
        time_attr="step",
        max_t=max(trial.config.steps for trial in plan.trials),
        grace_period=config.grace_steps,
        reduction_factor=config.reduction_factor,
        # Who has done the last step is finished, not stopped.
        stop_last_trials=False,
    )


class _Silence(ProgressReporter):  # type: ignore[misc]
    """In the place of Tune's own reporter, which tells of files that will be thrown away."""

    _heartbeat_threshold = AirVerbosity.DEFAULT
    _start_end_verbosity = AirVerbosity.DEFAULT
    _intermediate_result_verbosity = AirVerbosity.DEFAULT

    def experiment_started(self, *arguments: Any, **info: Any) -> None:
        """Nothing to say."""

    def on_trial_error(self, *arguments: Any, **info: Any) -> None:
        """Our table does."""


class _Recorder(tune.Callback):  # type: ignore[misc]
    """Tune's trials, seen as ours."""

    def __init__(self, sweep: Sweep, on_start: OnStart, on_end: OnEnd) -> None:
        self._sweep = sweep
        self._on_start = on_start
        self._on_end = on_end
        self._started_at: dict[int, float] = {}
        self.is_stopping = threading.Event()
        """The sweep is ending before its trials have; they go on with the next one."""

    def __getstate__(self) -> dict[str, Any]:
        # Tune writes callbacks down to restore them; this one is of its process alone.
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        ours = self._ours(trial)
        self._started_at[ours.number] = time.monotonic()
        self._on_start(ours)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        ours, result = self._ours(trial), trial.last_result
        if self.is_stopping.is_set() and not result.get(FINISHED):
            return
        if error := result.get(ERROR):
            self._on_end(ours, self._record(ours, status="failed", error=error))
        elif result.get(FINISHED):
            self._on_end(ours, self._record(ours, status="finished", **_measured(result)))
        else:
            end_interrupted_run(self._sweep, ours, "KILLED")
            self._on_end(ours, self._record(ours, status="stopped", **_measured(result)))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        ours = self._ours(trial)
        if self.is_stopping.is_set():
            return
        end_interrupted_run(self._sweep, ours, "FAILED")
        error = "its process died; see the Ray dashboard"
        self._on_end(ours, self._record(ours, status="failed", error=error))

    def abandon(self) -> None:
        """Close the records of trials that still run: the sweep was stopped."""
        for number in self._started_at:
            end_interrupted_run(self._sweep, self._sweep.plan.trials[number - 1], "KILLED")

    def _ours(self, trial: Any) -> Trial:
        number: int = trial.config["number"]
        return self._sweep.plan.trials[number - 1]

    def _record(self, trial: Trial, **values: Any) -> TrialRecord:
        now = time.monotonic()
        seconds = now - self._started_at.pop(trial.number, now)
        return TrialRecord(seconds=round(seconds, 1), **values)


def _measured(result: dict[str, Any]) -> dict[str, Any]:
    metrics = {
        name: value for name, value in result.items() if name.startswith(("validation/", "test/"))
    }
    return {"step": result["step"], "metrics": metrics}


def end_interrupted_run(sweep: Sweep, trial: Trial, status: str) -> None:
    """Close the record of a trial whose process could not."""
    state = RunDirectory.of(trial.config, sweep.settings.home).begin("auto")
    if state.tracking_run_id:
        close_run(sweep.settings, state.tracking_run_id, status)
