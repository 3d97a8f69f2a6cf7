"""A sweep before it starts: its trials as training configs, each of them validated.

Whatever a trial would refuse at its start is refused here, before anything is taken: every value
that is listed, the ends of every range, and every point that was drawn. Knows nothing of Ray.

    plan = make_plan(config)
    plan.trials[0].config, plan.trials[0].values
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from cluster.config import parse_config, read_mapping
from cluster.errors import ConfigError, HeliostatError
from jobs.models.config import LanguageModelConfig, PretrainedLmConfig
from jobs.models.families import make_family
from jobs.models.family import DataShape
from jobs.train import check_config
from jobs.training.config import TrainConfig
from jobs.training.expected_shape import expected_shape
from jobs.training.monitor import check_metrics
from jobs.tuning.config import AshaScheduler, TuneConfig
from jobs.tuning.space import Point, candidates, draw_points, show, with_values

_NOT_TUNED = ("name", "run_name", "experiment", "data", "launcher", "resume")


@dataclass(frozen=True)
class Trial:
    """One training of the sweep."""

    number: int
    """From 1."""
    values: Point
    config: TrainConfig

    @property
    def identity(self) -> str:
        return self.config.identity


@dataclass(frozen=True)
class Plan:
    """All that is to be done."""

    config: TuneConfig
    trials: list[Trial]

    @property
    def metric(self) -> str:
        """As a training names it."""
        return f"validation/{self.config.metric}"

    @property
    def shortage(self) -> str:
        """What to say where the space has fewer points than were asked for."""
        wanted = self.config.num_trials or 0
        if len(self.trials) >= wanted:
            return ""
        return f" (num_trials is {wanted}, and the space has no more different points)"

    @property
    def identity(self) -> str:
        """Hexadecimal digest of all that decides the result."""
        decisive = self.config.model_dump(
            mode="json", include={"name", "scheduler", "metric", "mode"}
        )
        text = json.dumps([decisive, [trial.identity for trial in self.trials]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def make_plan(config: TuneConfig) -> Plan:
    """Raises ConfigError, or whatever a trial's own start would raise, naming what is wrong."""
    source, base = _base(config)
    _refuse_fields(config)
    shape = expected_shape(base.data)
    values = _as_written(base, config)
    points = draw_points(config)
    for point, changed in _to_validate(config, points):
        _validate(values, point, changed, config, shape, source)
    trials = [
        Trial(number, point, _trial_config(values, point, f"{config.name}-{number:03}", source))
        for number, point in enumerate(points, 1)
    ]
    return Plan(config, trials)


def _base(config: TuneConfig) -> tuple[str, TrainConfig]:
    """What all trials have in common, and its name for messages."""
    if isinstance(config.train, str):
        source, values = config.train, read_mapping(Path(config.train))
    else:
        source, values = "train", dict(config.train)
    values = with_values(values, config.overrides)
    values = {**values, "run_name": "", "experiment": config.experiment, "resume": "auto"}
    base = parse_config(values, TrainConfig, source=source)
    if isinstance(base.model, PretrainedLmConfig):
        raise ConfigError(
            f"{source} goes on from model.base '{base.model.base}', which trials of a sweep do not",
            hint="train it by jobs.train",
            param="train.model.base",
        )
    if isinstance(base.model, LanguageModelConfig) and base.model.distillation:
        raise ConfigError(
            f"{source} has a model.distillation.teacher, and trials of a sweep have none",
            hint="train it by jobs.train",
            param="train.model.distillation",
        )
    if base.launcher != "ray":
        raise ConfigError(
            f"launcher is '{base.launcher}', and trials are placed by Ray",
            hint="leave launcher out of the training config",
            param="launcher",
        )
    return source, base


def _as_written(base: TrainConfig, config: TuneConfig) -> dict[str, Any]:
    """What the training config states, so that all else keeps a trial's own defaults.

    A section that it leaves out, and the space reaches into, keeps its kind.
    """
    values = base.model_dump(mode="json", exclude_unset=True)
    for field in config.space:
        section, _, inner = field.partition(".")
        kind = getattr(getattr(base, section, None), "kind", None)
        if inner and section not in values and kind is not None:
            values[section] = {"kind": kind}
    return values


def _refuse_fields(config: TuneConfig) -> None:
    for field, other in itertools.permutations(config.space, 2):
        if field.startswith(f"{other}."):
            raise ConfigError(
                f"space.{field} lies inside space.{other}, which would replace it",
                hint="keep one of the two",
                param=f"space.{field}",
            )
    for field in config.space:
        if field.split(".")[0] in _NOT_TUNED:
            raise ConfigError(
                f"space.{field}: trials of a sweep share the field '{field.split('.')[0]}'",
                hint="change it with overrides, for all of them",
                param=f"space.{field}",
            )


def _to_validate(config: TuneConfig, points: list[Point]) -> list[tuple[Point, str]]:
    """Points, each with the field that is tried in it; the first names none in particular."""
    first = points[0]
    return [
        ({**first, field: value}, field)
        for field, dimension in config.space.items()
        for value in candidates(dimension)
    ] + [(point, "") for point in points]


def _validate(
    values: Mapping[str, Any],
    point: Point,
    changed: str,
    config: TuneConfig,
    shape: DataShape,
    source: str,
) -> None:
    tried = {changed: point[changed]} if changed else point
    where = "space " + ", ".join(f"{field}: {show(value)}" for field, value in tried.items())
    trial = _trial_config(values, point, config.name, f"{source} with {where}")
    try:
        check_config(trial, trial.num_workers)
        family = make_family(trial.model, shape)
        check_metrics(trial, family)
    except HeliostatError as error:
        error.message = f"{where}: {error.message}"
        raise
    if config.metric not in family.metric_names:
        raise ConfigError(
            f"metric is '{config.metric}', which model.family '{trial.model.family}' does not "
            "measure on this data",
            hint=f"expected one of: {', '.join(family.metric_names)}",
            param="metric",
        )
    _check_scheduler(config, trial)


def _check_scheduler(config: TuneConfig, trial: TrainConfig) -> None:
    scheduler = config.scheduler
    if isinstance(scheduler, AshaScheduler) and (
        scheduler.grace_steps >= trial.steps or trial.evaluate_every_steps >= trial.steps
    ):
        raise ConfigError(
            f"scheduler asha cannot stop a trial of {trial.steps} steps that is measured every "
            f"{trial.evaluate_every_steps} and not stopped before {scheduler.grace_steps}",
            hint="set scheduler.grace_steps and evaluate_every_steps below steps",
            param="scheduler",
        )


def _trial_config(
    values: Mapping[str, Any], point: Mapping[str, JsonValue], run_name: str, source: str
) -> TrainConfig:
    changed = with_values(values, {**point, "run_name": run_name})
    return parse_config(changed, TrainConfig, source=source)
