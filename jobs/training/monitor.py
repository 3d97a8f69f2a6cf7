"""What validation metrics decide: a lower learning rate, the best weights, and when to stop.

Pure: a frozen state and an evaluation give the next state. The state is part of every checkpoint,
so a resumed run decides what an unbroken one does. It knows nothing of engines or files.

    state = observe(MonitorState(), config, {"loss": 0.7}, step=100)
    state.rate_scale, state.stopped, state.best_step
"""

from __future__ import annotations

import math

from pydantic import Field

from cluster.config import StrictModel
from cluster.errors import ConfigError
from jobs.models.config import HIGHER_IS_BETTER, Metric
from jobs.models.family import Family
from jobs.training.config import EarlyStoppingConfig, ReduceOnPlateauSchedule, TrainConfig


class Watch(StrictModel):
    """One metric, followed from evaluation to evaluation."""

    best: float | None = None
    best_step: int = 0
    num_stale: int = Field(0, ge=0)
    """Evaluations in a row without improvement."""


class MonitorState(StrictModel):
    """All that past evaluations have decided."""

    stopping: Watch = Watch()
    plateau: Watch = Watch()
    rate_scale: float = 1.0
    """What reducing on a plateau has made of the learning rate so far."""
    stopped: bool = False

    @property
    def best_step(self) -> int:
        """Step whose weights are to be packaged; 0 if early stopping has seen no evaluation."""
        return self.stopping.best_step


def observe(
    state: MonitorState, config: TrainConfig, metrics: dict[str, float], step: int
) -> MonitorState:
    """The state after an evaluation on the validation split."""
    if config.early_stopping is not None:
        state = _watch_for_the_end(state, config.early_stopping, metrics, step)
    if isinstance(config.schedule, ReduceOnPlateauSchedule):
        state = _watch_for_a_plateau(state, config.schedule, metrics, step)
    return state


def explain(before: MonitorState, after: MonitorState, config: TrainConfig) -> list[str]:
    """What was decided between two states, in words."""
    lines = []
    if after.rate_scale < before.rate_scale and isinstance(
        config.schedule, ReduceOnPlateauSchedule
    ):
        why = _reason(after.plateau, config.schedule.metric, config.schedule.patience)
        lines.append(f"learning rate reduced to {after.rate_scale:g} of the schedule's: {why}")
    if after.stopped and not before.stopped and config.early_stopping is not None:
        why = _reason(after.stopping, config.early_stopping.metric, config.early_stopping.patience)
        lines.append(f"stopped early: {why}")
    return lines


def _reason(watch: Watch, metric: Metric, patience: int) -> str:
    best = "never a number" if watch.best is None else f"{watch.best:.4g} at step {watch.best_step}"
    return f"validation/{metric} was {best}, and no better in {patience} evaluations"


def check_metrics(config: TrainConfig, family: Family) -> None:
    """Raises ConfigError for a metric that the family does not measure."""
    watched: dict[str, Metric] = {}
    if config.early_stopping is not None:
        watched["early_stopping.metric"] = config.early_stopping.metric
    if isinstance(config.schedule, ReduceOnPlateauSchedule):
        watched["schedule.metric"] = config.schedule.metric
    for param, metric in watched.items():
        if metric not in family.metric_names:
            raise ConfigError(
                f"{param} is '{metric}', which model.family '{config.model.family}' does not "
                "measure on this data",
                hint=f"expected one of: {', '.join(family.metric_names)}",
                param=param,
            )


def _watch_for_the_end(
    state: MonitorState, config: EarlyStoppingConfig, metrics: dict[str, float], step: int
) -> MonitorState:
    watch = _follow(state.stopping, config.metric, metrics, step, config.min_improvement)
    stopped = watch.num_stale >= config.patience
    return state.model_copy(update={"stopping": watch, "stopped": stopped})


def _watch_for_a_plateau(
    state: MonitorState, config: ReduceOnPlateauSchedule, metrics: dict[str, float], step: int
) -> MonitorState:
    watch = _follow(state.plateau, config.metric, metrics, step, 0.0)
    scale = state.rate_scale
    if watch.num_stale >= config.patience:
        watch = watch.model_copy(update={"num_stale": 0})
        scale = max(scale * config.factor, config.min_ratio)
    return state.model_copy(update={"plateau": watch, "rate_scale": scale})


def _follow(
    watch: Watch, metric: Metric, metrics: dict[str, float], step: int, min_improvement: float
) -> Watch:
    value = metrics[metric]
    if math.isfinite(value) and (
        watch.best is None or _gain(metric, watch.best, value) > min_improvement
    ):
        return Watch(best=value, best_step=step)
    return watch.model_copy(update={"num_stale": watch.num_stale + 1})


def _gain(metric: Metric, best: float, value: float) -> float:
    return value - best if metric in HIGHER_IS_BETTER else best - value
