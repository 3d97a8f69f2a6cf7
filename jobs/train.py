"""Train a model, package it and register it as the `candidate` of its name.

    python -m jobs.train --config configs/train/digits.yaml
    python -m jobs.train --config configs/train/digits.yaml --check
    python -m jobs.train --config configs/train/digits.yaml --set launcher=local

Run again after an interruption, the same config goes on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from cluster.errors import NotFoundError
from cluster.model_ref import CANDIDATE, ModelRef
from cluster.registry import ModelRegistry, ModelVersion
from cluster.settings import Settings
from cluster.submission import git_commit
from cluster.tracking import RunTracker, has_run
from jobs._entrypoint import run_job
from jobs.data.dataset import Dataset
from jobs.models.families import make_family
from jobs.models.family import DataShape
from jobs.prepare import describe, open_catalog
from jobs.training.batching import BatchPlan
from jobs.training.checkpoint_location import forget, open_store, store_name
from jobs.training.config import TrainConfig
from jobs.training.deepspeed_config import make_deepspeed_config
from jobs.training.elastic import check_worker_counts
from jobs.training.estimate import estimate
from jobs.training.following import followed
from jobs.training.launchers import Launcher, LocalLauncher, check_local_device, follow
from jobs.training.matmul_peak import PEAKS_FILE
from jobs.training.monitor import check_metrics
from jobs.training.parallelism import Layout
from jobs.training.process_group import launched_rank, launched_world_size
from jobs.training.publishing import publish
from jobs.training.ray_trainer import RayLauncher
from jobs.training.reporter import say
from jobs.training.run_directory import RunDirectory, RunState
from jobs.training.starting_point import Start, check_tokenizer, find_start
from jobs.training.toolchain import require_compiler, require_torch_compiler
from jobs.training.worker import Outcome, WorkerJob

_VERSIONS_OF = ("torch", "deepspeed", "ray", "transformers", "numpy", "pyarrow", "mlflow")


@dataclass(frozen=True)
class SweepLink:
    """The sweep that a training is a trial of."""

    run_id: str
    """MLflow run that the trial's run is shown below."""
    tags: dict[str, str]
    """What the trial's run says of it."""


def train(config: TrainConfig, settings: Settings) -> None:
    """Do the whole job; see the module's first lines."""
    if config.launcher == "local" and launched_rank() > 0:
        follow()
        return
    announce(train_and_register(config, settings))


def train_and_register(
    config: TrainConfig, settings: Settings, sweep: SweepLink | None = None
) -> dict[str, JsonValue]:
    """The whole job at its first worker; what `announce` says."""
    launcher = make_launcher(config, settings)
    deepspeed_config = check_config(config, launcher.world_size)
    facts = launcher.check()
    start = find_start(config, settings)
    config = start.config
    with RunDirectory.of(config, settings.home).locked() as run:
        catalog = open_catalog(settings, may_use_cluster=config.launcher == "ray")
        dataset, _ = catalog.ensure(start.local.data)
        say(describe(dataset.info))
        state = begin(run, config, dataset)
        if state.result is not None and is_registered(state.result, settings):
            say(f"already trained: {state.result['name']}/{state.result['version']}")
            return state.result
        check_family(start, dataset)
        facts = {
            **facts,
            "git_commit": find_commit(settings),
            "dataset_digest": dataset.info.digest,
        }
        with tracked(config, settings, deepspeed_config, launcher, facts, state, sweep) as tracker:
            state = state.driven(tracker.run_id)
            run.write(state)
            log_dataset(dataset, tracker)
            job = WorkerJob(
                start.local,
                dataset.directory,
                run.path,
                compiled_dir=settings.home / "cache" / "compiled",
                peaks_path=peaks_path(settings),
            )
            with followed(config, settings, dataset, run, state, tracker) as sink:
                outcome = launcher.run(job, sink)
            version = publish(
                outcome,
                config,
                dataset,
                settings,
                run_id=tracker.run_id,
                job_id=facts.get("submission_id", facts.get("ray_job_id", "")),
                git_commit=facts["git_commit"],
                sweep_run_id=sweep.run_id if sweep else "",
                base=start.base,
            )
            tracker.set_tags({"model_version": f"{version.name}/{version.version}"})
            result = make_result(outcome, version, dataset, tracker)
            run.write(state.model_copy(update={"result": result}))
        return result


def begin(run: RunDirectory, config: TrainConfig, dataset: Dataset) -> RunState:
    """What a run on this data goes on from."""
    digest, location = dataset.info.digest, config.checkpoint.location
    store = open_store(config.checkpoint, run.path, digest)
    state = run.begin(config.resume, digest, notify=say, forget=lambda: forget(store))
    if not location:
        return state
    elsewhere = {
        "checkpoint_location": location,
        "checkpoint_name": store_name(run.path, digest),
    }
    return state.model_copy(update=elsewhere)


def check(config: TrainConfig, settings: Settings) -> None:
    """Validate and estimate; the cluster is not touched."""
    world_size = make_launcher(config, settings).world_size
    check_config(config, world_size)
    found = estimate(find_start(config, settings).local, world_size, peaks_path(settings))
    for line in found.lines():
        print(line)


def peaks_path(settings: Settings) -> Path:
    return settings.home / "cache" / PEAKS_FILE


def make_launcher(config: TrainConfig, settings: Settings) -> Launcher:
    if config.launcher == "local":
        return LocalLauncher(launched_world_size())
    return RayLauncher(config, settings)


def check_config(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """The ds_config that workers will use; raises before anything is started."""
    if config.launcher == "ray":
        check_worker_counts(config)
    else:
        check_local_device(config)
    plan = BatchPlan.of(config, Layout.of(config, world_size).num_copies)
    deepspeed_config = make_deepspeed_config(config, plan)
    require_compiler(deepspeed_config)
    if config.compile:
        require_torch_compiler()
    return deepspeed_config


def check_family(start: Start, dataset: Dataset) -> None:
    """Raises before workers are placed if the data does not suit the model."""
    if start.base is not None and dataset.info.text is not None:
        check_tokenizer(dataset, start.base)
    if start.teacher is not None and dataset.info.text is not None:
        check_tokenizer(dataset, start.teacher, "model.distillation.teacher")
    check_metrics(start.local, make_family(start.local.model, DataShape.of(dataset.info)))


def log_dataset(dataset: Dataset, tracker: RunTracker) -> None:
    """What was trained on, and what cleaning did to it."""
    tracker.log_dict(dataset.info.model_dump(mode="json"), "dataset.json")
    info, source = dataset.info, str(dataset.directory)
    tracker.log_dataset(info.name, info.digest, source=source, context="training")
    if dataset.info.table is not None:
        tracker.log_metrics(dataset.info.table.counts(), 0)


@contextlib.contextmanager
def tracked(
    config: TrainConfig,
    settings: Settings,
    deepspeed_config: dict[str, Any],
    launcher: Launcher,
    facts: dict[str, str],
    state: RunState,
    sweep: SweepLink | None = None,
) -> Iterator[RunTracker]:
    """The run's record, new or continued."""
    run_id = state.tracking_run_id or None
    if run_id is not None and not has_run(settings, run_id):
        say(f"warning: MLflow no longer has run {run_id}, in which this training began: a new one")
        run_id = None
    values = config.model_dump(mode="json")
    versions = {name: importlib.metadata.version(name) for name in _VERSIONS_OF}
    with RunTracker.start(
        settings,
        config.experiment,
        config.run_name or config.name,
        params={**values, "world_size": launcher.world_size, "versions": versions},
        tags={"job": "train", "model": config.name, **facts, **(sweep.tags if sweep else {})},
        parent_run_id=sweep.run_id if sweep else None,
        run_id=run_id,
    ) as tracker:
        say(f"run {tracker.url}")
        tracker.log_dict(values, "config.json")
        tracker.log_dict(deepspeed_config, "deepspeed.json")
        yield tracker


def make_result(
    outcome: Outcome, version: ModelVersion, dataset: Dataset, tracker: RunTracker
) -> dict[str, JsonValue]:
    """What the last line of a training says, for programs."""
    text = dataset.info.text
    return {
        "name": version.name,
        "version": version.version,
        "digest": version.digest,
        "run_id": tracker.run_id,
        "run_url": tracker.url,
        "dataset_digest": dataset.info.digest,
        "num_parameters": outcome.num_parameters,
        "training_seconds": round(outcome.seconds, 2),
        "metrics": dict(outcome.metrics),
        **({"unigram_entropy": text.unigram_entropy} if text else {}),
    }


def is_registered(result: dict[str, JsonValue], settings: Settings) -> bool:
    """Whether the version of a finished run is still there."""
    reference = ModelRef.parse(f"{result['name']}/{result['version']}")
    try:
        return ModelRegistry.open(settings).resolve(reference).digest == result["digest"]
    except NotFoundError:
        return False


def announce(result: dict[str, JsonValue]) -> None:
    say(f"registered {result['name']}/{result['version']} ({result['digest']})")
    say(f"deploy it: heliostat deploy {result['name']}@{CANDIDATE}")
    say("result: " + json.dumps(result))


def find_commit(settings: Settings) -> str:
    return settings.git_commit or git_commit(settings.source_dir) or "unknown"


if __name__ == "__main__":
    run_job(
        TrainConfig,
        verb="train",
        description="Train a model, package it and register it.",
        run=train,
        check=check,
    )
