"""Predict rows offline with a registered model version, in parts that a killed job goes on from.

    python -m jobs.predict --config configs/predict/digits.yaml
    python -m jobs.predict --config configs/predict/digits.yaml --check

The package is verified, and rows go through the same processing and runtime as in serving: on the
cluster by Ray Data, if one is up, and in this process otherwise.
"""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from cluster.database import open_database
from cluster.errors import InputError, NotRunningError
from cluster.ledger import Ledger
from cluster.model_ref import ModelRef
from cluster.predictions import PartSummary
from cluster.registry import ModelRegistry, ModelVersion
from cluster.settings import Settings
from cluster.tracking import RunTracker, has_run
from jobs._entrypoint import run_job
from jobs.prediction.bill import KIND, Bill, Unlimited
from jobs.prediction.config import PredictConfig
from jobs.prediction.output import Output
from jobs.prediction.predictor import open_predictor, require_kind
from jobs.prediction.rows import Row, Values, to_json_lines
from jobs.prediction.source import InputPlan, plan_input, read_task
from jobs.prediction.work import Executor, Job, PartDone, in_process, predict_part, stand_back

FORMAT_VERSION = 1
_SAY_EVERY_S = 5.0


def predict(config: PredictConfig, settings: Settings) -> None:
    """Write what is not written yet, and say what came of it."""
    stand_back(config.nice)
    version = find_version(config, settings)
    plan = plan_input(config.input, config.rows_per_part, settings)
    output = Output.open(config.output, settings)
    output.begin(manifest(version, plan, config))
    done = output.done()
    name = f"{version.name}/{version.version}"
    if done:
        print(f"{len(done)} of {len(plan.parts)} parts are written already", flush=True)
    run = output.run()
    with _tracker(config, settings, version, plan, run.get("run_id")) as tracker:
        run = {"id": run.get("id") or uuid.uuid4().hex, "run_id": tracker.run_id}
        output.keep_run(run)
        print(f"run {tracker.url}", flush=True)
        tracker.log_dataset(config.input, plan.digest, source=config.input, context=KIND)
        bill = Bill(run["id"], run["run_id"], version.name, version.version)
        ledger = Ledger(open_database(settings.database))
        ledger.record([bill.entry(summary, 0.0, config) for summary in done.values()])
        progress = Progress(plan, config, done)
        started = time.monotonic()
        progress.check()
        job = Job(version.digest, plan.format, config, settings, bill)
        for part in _work(job, plan, done):
            ledger.record([bill.entry(part.summary, part.seconds, config)])
            progress.add(part)
        plan.require_unchanged()
        errors = [row for number in sorted(done) for row in done[number].bad_rows]
        output.finish(to_json_lines(errors))
        figures = progress.figures(time.monotonic() - started)
        tracker.log_metrics(figures, 0)
    print(
        f"{name} on {config.input}: {progress.num_rows:,} rows in {output.place}, "
        f"{progress.num_bad:,} bad rows{' in errors.jsonl' if errors else ''}"
    )
    result = {
        "name": version.name,
        "version": version.version,
        "digest": version.digest,
        "dataset_digest": plan.digest,
        "output": output.place,
        "run_id": tracker.run_id,
        **figures,
    }
    print("result: " + json.dumps(result), flush=True)


def check(config: PredictConfig, settings: Settings) -> None:
    """The version and the input are there; a few rows are predicted to see how long it takes."""
    version = find_version(config, settings)
    plan = plan_input(config.input, config.rows_per_part, settings)
    part, rows = next(read_task(plan.tasks()[0][:1]))
    readable = [row for row in rows if isinstance(row, Row)][: config.batch_size]
    predictor = open_predictor(version.digest, config, settings)
    started = time.monotonic()
    summary, _ = predict_part(predictor, part.number, readable, config, Unlimited())
    seconds = time.monotonic() - started
    print(
        f"{plan.num_rows:,} rows of {plan.format} in {len(plan.files)} files "
        f"({plan.digest[:19]}…), {len(plan.parts):,} parts"
    )
    for bad in summary.bad_rows[:1]:
        print(f"{bad['where']} would be a bad row: {bad['reason']}")
    if readable:
        whole_s = seconds / len(readable) * plan.num_rows / config.num_workers
        print(f"the first {len(readable)} rows took {seconds:.2f} s: about {whole_s:,.0f} s in all")
    print(f"config is valid; would predict with {version.name}/{version.version}")


def find_version(config: PredictConfig, settings: Settings) -> ModelVersion:
    """Raises InputError for a version of a kind that predicts nothing."""
    version = ModelRegistry.open(settings).resolve(ModelRef.parse(config.model))
    require_kind(version.kind)
    return version


def manifest(version: ModelVersion, plan: InputPlan, config: PredictConfig) -> dict[str, Any]:
    """What an output is of: the same manifest means the same bytes."""
    return {
        "format_version": FORMAT_VERSION,
        "model": version.digest,
        "input": plan.digest,
        "num_rows": plan.num_rows,
        "num_parts": len(plan.parts),
        "config": config.identity(),
    }


class Progress:
    """What is done so far, shown now and then; ends the job where too many rows are bad."""

    def __init__(
        self, plan: InputPlan, config: PredictConfig, done: dict[int, PartSummary]
    ) -> None:
        self._plan = plan
        self._limit = config.max_bad_rows
        self._done = done
        self._num_before = self.num_rows
        self._started = self._said = time.monotonic()

    @property
    def num_rows(self) -> int:
        return sum(summary.num_rows for summary in self._done.values())

    @property
    def num_bad(self) -> int:
        return sum(len(summary.bad_rows) for summary in self._done.values())

    def add(self, part: PartDone) -> None:
        """Raises InputError once more rows are bad than may be."""
        self._done[part.summary.number] = part.summary
        now = time.monotonic()
        if now - self._said >= _SAY_EVERY_S:
            self._said = now
            rate = (self.num_rows - self._num_before) / (now - self._started)
            print(
                f"part {len(self._done)}/{len(self._plan.parts)}  rows {self.num_rows:,}"
                f"/{self._plan.num_rows:,}  bad {self.num_bad:,}  {rate:,.1f} rows/s",
                flush=True,
            )
        self.check()

    def check(self) -> None:
        """Raises InputError if more rows are bad than may be."""
        if self._limit is None or self.num_bad <= self._limit:
            return
        bad: Values = min(
            (row for summary in self._done.values() for row in summary.bad_rows),
            key=lambda row: int(row["row"]),
        )
        raise InputError(
            f"{self.num_bad:,} rows cannot be predicted, more than max_bad_rows "
            f"{self._limit:,}; the first is {bad['where']}: {bad['reason']}",
            hint="correct the input, or raise max_bad_rows and run it again to go on",
            param="max_bad_rows",
        )

    def figures(self, seconds: float) -> dict[str, float]:
        """Sums over all parts, and the speed of this job."""
        summaries = self._done.values()
        return {
            "rows": self.num_rows,
            "bad_rows": self.num_bad,
            "prompt_tokens": sum(summary.prompt_tokens for summary in summaries),
            "completion_tokens": sum(summary.completion_tokens for summary in summaries),
            "rows_per_s": round((self.num_rows - self._num_before) / max(seconds, 1e-9), 3),
        }


def _tracker(
    config: PredictConfig,
    settings: Settings,
    version: ModelVersion,
    plan: InputPlan,
    run_id: str | None,
) -> RunTracker:
    name = f"{version.name}/{version.version}"
    return RunTracker.start(
        settings,
        config.experiment,
        f"predict {config.input} with {name}",
        params=config.model_dump(mode="json"),
        tags={
            "job": "predict",
            "model": version.name,
            "model_version": name,
            "model_digest": version.digest,
            "dataset_digest": plan.digest,
        },
        run_id=run_id if run_id and has_run(settings, run_id) else None,
    )


def _work(job: Job, plan: InputPlan, done: dict[int, PartSummary]) -> Any:
    tasks = plan.tasks(but=set(done))
    if not tasks:
        return iter(())
    executor = _on_cluster(job.settings) or in_process
    return executor(job, tasks)


def _on_cluster(settings: Settings) -> Executor | None:
    from jobs.prediction.ray_execution import on_cluster
    from jobs.training.ray_trainer import connected

    try:
        ray = connected(settings)
    except NotRunningError:
        print("no cluster is up: predicting in this process", flush=True)
        return None
    print(f"predicting on the cluster's {ray.cluster_resources().get('CPU', 0):g} CPUs", flush=True)
    return on_cluster


if __name__ == "__main__":
    run_job(
        PredictConfig,
        verb="predict",
        description="Predict rows offline with a registered model version.",
        run=predict,
        check=check,
    )
