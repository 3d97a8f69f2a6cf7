"""Tune: train many versions of a config, and register the best as the `candidate` of its name.

    python -m jobs.tune --config configs/tune/digits.yaml
    python -m jobs.tune --config configs/tune/digits.yaml --check

Run again after an interruption, the same config goes on: trials that have ended are not repeated,
and those that were running continue from their checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

from pydantic import JsonValue

from cluster.errors import JobFailedError
from cluster.settings import Settings
from cluster.tracking import RunTracker
from jobs._entrypoint import run_job
from jobs.prepare import describe as describe_dataset
from jobs.prepare import open_catalog
from jobs.train import announce, find_commit, is_registered, train_and_register
from jobs.training.estimate import estimate
from jobs.training.ray_trainer import RayLauncher, connected
from jobs.training.reporter import say
from jobs.training.run_directory import RunDirectory
from jobs.tuning.concurrency import Capacity, num_concurrent
from jobs.tuning.config import TuneConfig
from jobs.tuning.ledger import Ledger, TrialRecord, find_best
from jobs.tuning.plan import Plan, Trial, make_plan
from jobs.tuning.space import describe, show
from jobs.tuning.table import trial_table
from jobs.tuning.trial import Sweep, held


def tune(config: TuneConfig, settings: Settings) -> None:
    """Do the whole job; see the module's first lines."""
    plan = make_plan(config)
    facts = connect(plan, settings)
    max_concurrent = num_concurrent(plan, capacity_of(settings))
    with Ledger.of(plan, settings.home).locked() as ledger:
        state = ledger.begin(config.resume)
        if state.result is not None and is_registered(state.result, settings):
            say(f"already tuned: {state.result['name']}/{state.result['version']}")
            finish(plan, ledger, state.result)
            return
        # Before the trials, which would otherwise prepare it at the same time.
        catalog = open_catalog(settings, may_use_cluster=True)
        dataset, _ = catalog.ensure(plan.trials[0].config.data)
        say(describe_dataset(dataset.info))
        if not state.tracking_run_id:
            clear_runs(plan, settings)
        with tracked_sweep(plan, settings, facts, ledger) as tracker:
            sweep = Sweep(plan, settings, tracker.run_id, facts)
            run_missing_trials(sweep, ledger, tracker, max_concurrent)
            result = register_best(sweep, ledger, tracker)
        finish(plan, ledger, result)


def check(config: TuneConfig, settings: Settings) -> None:
    """Validate and estimate; the cluster is not touched."""
    plan = make_plan(config)
    capacity = Capacity(settings.num_cpus or os.cpu_count() or 1, settings.num_gpus or 0)
    for name, dimension in config.space.items():
        print(f"space       {name}: {show(dimension.model_dump(exclude_none=True, by_alias=True))}")
    steps = sum(trial.config.steps for trial in plan.trials)
    print(f"search      {config.search}, scheduler {config.scheduler.kind}")
    print(
        f"trials      {len(plan.trials)}, {num_concurrent(plan, capacity)} at a time on "
        f"{capacity.num_cpus} CPUs; {steps:,} steps at most; the best by {plan.metric}"
        f"{plan.shortage}"
    )
    print("the first of them:")
    first = plan.trials[0].config
    for line in estimate(first, first.num_workers).lines():
        print(line)


def connect(plan: Plan, settings: Settings) -> dict[str, str]:
    """Facts about the cluster; raises before anything is taken if a trial does not fit it."""
    largest = max((trial.config for trial in plan.trials), key=lambda config: config.num_workers)
    return {**RayLauncher(largest, settings).check(), "git_commit": find_commit(settings)}


def capacity_of(settings: Settings) -> Capacity:
    resources = connected(settings).cluster_resources()
    return Capacity(int(resources.get("CPU", 0)), int(resources.get("GPU", 0)))


def clear_runs(plan: Plan, settings: Settings) -> None:
    """A new sweep's trials do not go on from those of another."""
    for trial in plan.trials:
        with held(RunDirectory.of(trial.config, settings.home)) as run:
            run.begin("never")


@contextlib.contextmanager
def tracked_sweep(
    plan: Plan, settings: Settings, facts: dict[str, str], ledger: Ledger
) -> Iterator[RunTracker]:
    """The sweep's own record, new or continued; its trials' are shown below it."""
    values = plan.config.model_dump(mode="json", by_alias=True, exclude_none=True)
    with RunTracker.start(
        settings,
        plan.config.experiment,
        plan.config.name,
        params={**values, "num_trials": len(plan.trials)},
        tags={"job": "tune", "model": plan.trials[0].config.name, **facts},
        run_id=ledger.state.tracking_run_id or None,
    ) as tracker:
        say(f"sweep {tracker.url}: {len(plan.trials)} trials{plan.shortage}")
        ledger.write(ledger.state.model_copy(update={"tracking_run_id": tracker.run_id}))
        tracker.log_dict(values, "config.json")
        yield tracker


def run_missing_trials(
    sweep: Sweep, ledger: Ledger, tracker: RunTracker, max_concurrent: int
) -> None:
    """All that have not ended yet."""
    # Ray reads its environment, which `connect` has set, when it is imported.
    from jobs.tuning.sweep import run_trials

    trials = sweep.plan.trials
    todo = [trial for trial in trials if trial.identity not in ledger.state.trials]
    if len(todo) < len(trials):
        say(f"{len(trials) - len(todo)} of {len(trials)} trials have ended before")
    if not todo:
        return
    say(f"{len(todo)} trials, {max_concurrent} at a time")

    def on_end(trial: Trial, record: TrialRecord) -> None:
        ledger.record(trial.identity, record)
        say(f"trial {trial.number}/{len(trials)} {outcome_of(record, sweep.plan)}")
        log_best(sweep.plan, ledger, tracker)

    run_trials(
        sweep,
        todo,
        max_concurrent=max_concurrent,
        on_start=lambda trial: say(
            f"trial {trial.number}/{len(trials)} started: {describe(trial.values)}"
        ),
        on_end=on_end,
    )


def outcome_of(record: TrialRecord, plan: Plan) -> str:
    """'finished in 14 s: validation/loss 0.0981'"""
    if record.status == "failed":
        return f"failed in {record.seconds:.0f} s: {record.error}"
    return (
        f"{record.status} in {record.seconds:.0f} s at step {record.step}: "
        f"{plan.metric} {record.metrics[plan.metric]:.4f}"
    )


def log_best(plan: Plan, ledger: Ledger, tracker: RunTracker) -> None:
    """The best so far, over the number of ended trials."""
    best = find_best(plan, ledger.state)
    if best is not None:
        metrics = ledger.state.trials[plan.trials[best].identity].metrics
        tracker.log_metrics(metrics, len(ledger.state.trials))


def register_best(sweep: Sweep, ledger: Ledger, tracker: RunTracker) -> dict[str, JsonValue]:
    """Go on with the best trial as `jobs.train` would: from its last checkpoint to a version.

    Raises:
        JobFailedError: no trial has finished.
    """
    plan = sweep.plan
    tracker.log_text("\n".join(trial_table(plan, ledger.state)), "trials.txt")
    index = find_best(plan, ledger.state)
    if index is None:
        errors = [record.error for record in ledger.state.trials.values() if record.error]
        raise JobFailedError(
            f"none of {len(plan.trials)} trials has finished: {(errors or ['all stopped'])[0]}",
            hint="correct the space, or --set resume=never to try the same trials again",
        )
    best = plan.trials[index]
    say(f"the best is trial {best.number}; it is packaged from its last checkpoint")
    config = best.config.model_copy(update={"resume": "reuse"})
    trained = train_and_register(config, sweep.settings, sweep.link(best))
    record = ledger.state.trials[best.identity]
    result: dict[str, Any] = {
        **trained,
        # Of the trial; packaging took up where it had ended.
        "training_seconds": round(record.seconds, 2),
        "sweep_run_id": sweep.run_id,
        "trial": best.number,
        "values": best.values,
        "trials": count_by_status(ledger),
    }
    tracker.set_tags(
        {
            "model_version": f"{result['name']}/{result['version']}",
            "best_run_id": result["run_id"],
            "best_trial": str(best.number),
            "best_values": json.dumps(best.values),
        }
    )
    ledger.write(ledger.state.model_copy(update={"result": result}))
    return result


def count_by_status(ledger: Ledger) -> dict[str, int]:
    statuses = [record.status for record in ledger.state.trials.values()]
    return {status: statuses.count(status) for status in ("finished", "stopped", "failed")}


def finish(plan: Plan, ledger: Ledger, result: dict[str, JsonValue]) -> None:
    for line in trial_table(plan, ledger.state):
        say(line)
    announce(result)


if __name__ == "__main__":
    run_job(
        TuneConfig,
        verb="tune",
        description="Train many versions of a config and register the best.",
        run=tune,
        check=check,
    )
